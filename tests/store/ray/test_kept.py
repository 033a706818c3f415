# SPDX-License-Identifier: Apache-2.0
"""Who must give up entries where there is no room for all, and when an entry is too old."""

from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attncache_vllm.store.ray.kept import Entry, KeptEntries, Limits

_NUMBERS = count()


def entry(tenant: str = "", size: int = 10, born: float = 0.0, cost: float = 1.0) -> Entry:
    return Entry(tenant, next(_NUMBERS).to_bytes(32, "big"), size, cost, born, sound=True)


def ids(kept: KeptEntries, tenant: str | None = None) -> set[int]:
    return {entry_id for _, entry_id in kept.keys_of(tenant=tenant)}


def test_a_tenant_beyond_its_quota_gives_up_its_own() -> None:
    kept = KeptEntries(Limits(100, tenant_bytes=30))
    for number in range(3):
        assert kept.add(("e", number), entry("b0")) == []
    for number in range(10, 15):
        kept.add(("e", number), entry("a1"))
    assert ids(kept, "b0") == {0, 1, 2}
    assert ids(kept, "a1") == {12, 13, 14}


def test_a_full_shard_takes_from_whoever_has_most() -> None:
    kept = KeptEntries(Limits(100))
    for number in range(2):
        kept.add(("e", number), entry("b0"))
    for number in range(10, 30):
        kept.add(("e", number), entry("a1"))
    assert ids(kept, "b0") == {0, 1}
    assert ids(kept, "a1") == set(range(22, 30))
    [(gone, of)] = kept.add(("e", 3), entry("c2"))
    assert (gone, of.tenant) == (("e", 22), "a1")


def test_what_is_used_or_saves_much_stays() -> None:
    kept = KeptEntries(Limits(30))
    kept.add(("e", 0), entry(cost=3.0))
    kept.add(("e", 1), entry())
    kept.add(("e", 2), entry())
    kept.use(("e", 1))
    kept.use(("e", 99))  # not here
    assert [key for key, _ in kept.add(("e", 3), entry())] == [("e", 2)]
    assert ids(kept) == {0, 1, 3}


def test_one_that_is_too_large_goes_itself_and_alone() -> None:
    kept = KeptEntries(Limits(100, tenant_bytes=30))
    kept.add(("e", 0), entry())
    large = entry(size=31)
    assert kept.add(("e", 1), large) == [(("e", 1), large)]
    assert (ids(kept), kept.bytes) == ({0}, 10)


def test_what_is_removed_leaves_its_room() -> None:
    kept = KeptEntries(Limits(20))
    for number in range(2):
        kept.add(("e", number), entry())
    assert [key for key, _ in kept.remove([("e", 0), ("e", 0), ("f", 1)])] == [("e", 0)]
    assert kept.add(("e", 2), entry()) == []
    kept.remove([("e", 1), ("e", 2)])
    assert (kept.bytes, kept.tenants, len(kept), kept.keys_of()) == (0, 0, 0, [])


def test_expired_entries_are_named_once_and_none_that_went_otherwise() -> None:
    kept = KeptEntries(Limits(1000, ttl_s=10.0))
    for number in range(4):
        kept.add(("e", number), entry(born=float(number)))
    kept.remove([("e", 0)])
    kept.add(("e", 0), entry(born=9.0))  # again, and younger
    kept.remove([("e", 2)])
    assert kept.expired(9.9) == []
    assert kept.expired(12.5) == [("e", 1)]
    assert kept.expired(12.5) == []
    assert kept.expired(99.0) == [("e", 3), ("e", 0)]


def test_without_a_ttl_nothing_expires_or_is_queued_for_it() -> None:
    kept = KeptEntries(Limits(1000))
    kept.add(("e", 0), entry())
    assert kept.expired(1e12) == []
    assert kept._oldest == []


def test_the_queue_of_ages_does_not_grow_without_bound() -> None:
    kept = KeptEntries(Limits(30, ttl_s=1e6))
    for number in range(3000):
        kept.add(("e", number), entry(born=float(number)))
    assert len(kept._oldest) < 100


@settings(deadline=None)
@given(
    limit=st.integers(0, 60),
    quota=st.none() | st.integers(0, 60),
    steps=st.lists(
        st.tuples(
            st.sampled_from("pur"),
            st.integers(0, 9),
            st.sampled_from(["", "a1", "b0"]),
            st.integers(1, 40),
        ),
        max_size=40,
    ),
)
def test_bounds_hold_and_bytes_add_up(
    limit: int, quota: int | None, steps: list[tuple[str, int, str, int]]
) -> None:
    kept = KeptEntries(Limits(limit, tenant_bytes=quota))
    model: dict[tuple[str, int], Entry] = {}
    for action, number, tenant, size in steps:
        key = f"edition of {number % 2}", number
        if action == "p" and key not in model:
            model[key] = entry(tenant, size)
            for evicted, gone in kept.add(key, model[key]):
                assert model.pop(evicted) is gone
        elif action == "u":
            kept.use(key)
        elif action == "r":
            assert [gone for _, gone in kept.remove([key])] == (
                [model.pop(key)] if key in model else []
            )
        assert {key: kept.of(key[0])[key[1]] for key in kept.keys_of()} == model
        assert len(kept) == len(model)
        assert kept.bytes == sum(item.size for item in model.values()) <= limit
        tenants = {item.tenant for item in model.values()}
        assert kept.tenants == len(tenants)
        for tenant in tenants:
            held = sum(item.size for item in model.values() if item.tenant == tenant)
            assert quota is None or held <= quota


@pytest.mark.parametrize("name", ["max_bytes", "tenant_bytes", "ttl_s"])
def test_negative_limits_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be >= 0, got -1"):
        Limits(**{"max_bytes": 10, name: -1})
