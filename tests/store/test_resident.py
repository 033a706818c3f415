# SPDX-License-Identifier: Apache-2.0
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attncache_vllm.store.resident import ResidentSet, ResidentStats


def test_of_equal_items_the_least_used_goes_first_and_then_the_oldest() -> None:
    resident: ResidentSet[str, int] = ResidentSet(30)
    for value, key in enumerate("abc"):
        resident.put(key, value, 10)
    assert resident.get("a") == 0
    resident.put("d", 3, 10)
    assert [resident.get(key) for key in "abcd"] == [0, None, 2, 3]
    assert resident.stats() == ResidentStats(hits=4, misses=1, bytes=30, entries=3)


def test_one_big_item_may_push_out_several() -> None:
    resident: ResidentSet[str, int] = ResidentSet(30)
    for value, key in enumerate("abc"):
        resident.put(key, value, 10)
    resident.put("big", 9, 25)
    assert [resident.get(key) for key in ("a", "b", "c", "big")] == [None, None, None, 9]


def test_small_and_dear_items_outlive_big_and_cheap_ones() -> None:
    resident: ResidentSet[str, int] = ResidentSet(100)
    resident.put("small", 1, 10, cost=1.0)
    resident.put("dear", 2, 40, cost=8.0)
    resident.put("big", 3, 50, cost=1.0)
    resident.put("new", 4, 20, cost=1.0)
    held = [key for key in ("small", "dear", "big", "new") if resident.get(key) is not None]
    assert held == ["small", "dear", "new"]


def test_what_was_popular_once_goes_in_the_end() -> None:
    resident: ResidentSet[object, int] = ResidentSet(30)
    resident.put("old favourite", 0, 10)
    for _ in range(20):
        assert resident.get("old favourite") == 0
    for number in range(60):
        resident.put(number, number, 10)
    assert resident.get("old favourite") is None


def test_uses_do_not_pile_up_in_memory() -> None:
    resident: ResidentSet[int, int] = ResidentSet(30)
    for number in range(5000):
        resident.put(number % 3, number, 10)
        resident.get(number % 3)
    assert len(resident._queue) < 100


def test_an_item_bigger_than_the_bound_is_not_kept_and_evicts_nothing() -> None:
    resident: ResidentSet[str, int] = ResidentSet(30)
    resident.put("a", 1, 10)
    resident.put("huge", 2, 31)
    assert resident.get("huge") is None
    assert resident.get("a") == 1


def test_replacing_an_item_counts_its_bytes_once_and_never_leaves_the_old_value() -> None:
    resident: ResidentSet[str, int] = ResidentSet(30)
    resident.put("a", 1, 10)
    resident.put("a", 2, 20)
    assert resident.get("a") == 2
    assert resident.stats().bytes == 20
    resident.put("a", 3, 31)
    assert resident.get("a") is None
    assert resident.stats().bytes == 0


def test_a_put_says_what_it_evicted() -> None:
    resident: ResidentSet[str, int] = ResidentSet(30)
    assert [resident.put(key, 0, 10) for key in "abc"] == [[], [], []]
    assert resident.put("d", 0, 15) == ["a", "b"]
    assert resident.put("d", 0, 15) == []  # replaced, not evicted
    assert resident.put("huge", 0, 31) == []


def test_evict_gives_up_what_has_least_priority_and_ages_the_rest() -> None:
    resident: ResidentSet[str, int] = ResidentSet(100)
    for key, cost in {"dear": 5.0, "cheap": 1.0, "cheaper": 0.5}.items():
        resident.put(key, 0, 10, cost)
    resident.get("cheaper")
    resident.get("cheaper")
    assert [resident.evict(), resident.evict()] == ["cheap", "cheaper"]
    resident.put("new", 0, 10, 4.0)  # and what was evicted counts in its favour
    assert resident.evict() == "dear"
    assert (resident.evict(), resident.bytes) == ("new", 0)
    with pytest.raises(ValueError, match="got an empty set"):
        resident.evict()


def test_what_is_removed_is_neither_held_nor_evicted() -> None:
    resident: ResidentSet[str, int] = ResidentSet(30)
    for key in "abc":
        resident.put(key, 0, 10)
    resident.remove("a")
    resident.remove("never put")
    assert resident.get("a") is None
    assert resident.bytes == 20
    assert resident.put("d", 0, 10) == []
    assert resident.evict() == "b"


def test_a_bound_of_zero_keeps_nothing() -> None:
    resident: ResidentSet[str, int] = ResidentSet(0)
    resident.put("a", 1, 1)
    assert resident.get("a") is None


@settings(deadline=None)
@given(
    bound=st.integers(0, 40),
    puts=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 45)), max_size=40),
)
def test_the_bound_holds_and_the_bytes_add_up(bound: int, puts: list[tuple[int, int]]) -> None:
    resident: ResidentSet[int, int] = ResidentSet(bound)
    for key, nbytes in puts:
        resident.put(key, nbytes, nbytes)
        held = [value for k in range(6) if (value := resident.get(k)) is not None]
        stats = resident.stats()
        assert stats.bytes == sum(held) <= bound
        assert stats.entries == len(held)
        assert resident.get(key) == (nbytes if nbytes <= bound else None)


def test_threads_may_share_it() -> None:
    resident: ResidentSet[int, int] = ResidentSet(50)

    def work(seed: int) -> None:
        for step in range(2000):
            key = (seed * 7 + step) % 13
            assert resident.get(key) in (None, key)
            resident.put(key, key, key)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    stats = resident.stats()
    assert stats.hits + stats.misses == 8000
    assert stats.bytes == sum(k for k in range(13) if resident.get(k) is not None) <= 50


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="max_bytes must be >= 0"):
        ResidentSet(-1)
    with pytest.raises(ValueError, match="nbytes must be >= 0"):
        ResidentSet[str, int](10).put("a", 1, -1)
    with pytest.raises(ValueError, match="cost, too"):
        ResidentSet[str, int](10).put("a", 1, 1, -1.0)
