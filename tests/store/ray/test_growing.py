# SPDX-License-Identifier: Apache-2.0
"""An index that entries join and leave answers as one that was built with what is in it now."""

import math
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attncache_vllm.errors import StoreTimeout
from attncache_vllm.store import index as index_module
from attncache_vllm.store.found import answers_of
from attncache_vllm.store.index import FeatureIndex
from attncache_vllm.store.protocol import Neighbour
from attncache_vllm.store.ray import growing
from attncache_vllm.store.ray.growing import GrowingIndex

NEVER = math.inf
DIM = 3
# Few values each, so that there are ties, and lengths and sketches that many share.
RANDOM = np.random.default_rng(11)
POOL = 48
FEATURES = RANDOM.integers(0, 3, (POOL, DIM)).astype(np.float32)
LENGTHS = RANDOM.integers(1, 9, POOL)
SKETCHES = [np.unique(RANDOM.integers(0, 20, 6, dtype=np.uint64)) for _ in range(POOL)]
IDS = [int(number) for number in RANDOM.permutation(POOL) * 2**57]

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sets(st.integers(0, POOL - 1), max_size=12)),
        st.tuples(st.just("remove"), st.sets(st.integers(0, POOL - 1), max_size=12)),
        st.tuples(st.just("compact"), st.just(set[int]())),
    ),
    max_size=12,
)
QUERIES = st.lists(
    st.tuples(
        st.lists(st.integers(-1, 3), min_size=DIM, max_size=DIM),
        st.tuples(st.integers(0, 9), st.integers(0, 12)),
        st.sets(st.integers(0, 22), max_size=8),
    ),
    max_size=4,
)


def add(index: GrowingIndex, rows: list[int]) -> None:
    index.add(
        [IDS[row] for row in rows],
        FEATURES[rows],
        [SKETCHES[row] for row in rows],
        LENGTHS[rows].tolist(),
    )


def look_up(
    index: GrowingIndex, features: np.ndarray, bounds: list[tuple[int, int]], neighbours: int
) -> list[list[Neighbour]]:
    found = answers_of(index.lookup(features, bounds, neighbours, NEVER))
    return [[Neighbour(*answer) for answer in answers] for answers in found]


@pytest.fixture(autouse=True)
def small_levels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(growing, "_SMALLEST", 2)
    yield


@settings(max_examples=300, deadline=None)
@given(STEPS, QUERIES, st.integers(0, 60))
def test_any_sequence_of_changes_answers_as_brute_force(
    steps: list[tuple[str, set[int]]],
    queries: list[tuple[list[int], tuple[int, int], set[int]]],
    neighbours: int,
) -> None:
    index, inside = GrowingIndex(), set[int]()
    for step, rows in steps:
        if step == "add":
            add(index, sorted(rows - inside, reverse=True))
            inside |= rows
        elif step == "remove":
            index.remove([IDS[row] for row in rows])
            inside -= rows
        else:
            index.compact()
    assert len(index) == len(inside)

    features = np.array([query for query, _, _ in queries], np.float32).reshape(-1, DIM)
    bounds = [bound for _, bound, _ in queries]
    nearest = look_up(index, features, bounds, neighbours)
    asked = [np.array(sorted(values), np.uint64) for _, _, values in queries]
    sharing = answers_of(index.overlaps(asked, neighbours, NEVER))
    for number, (query, (shortest, longest), values) in enumerate(queries):
        distance = {row: float(np.linalg.norm(FEATURES[row] - query)) for row in inside}
        usable = [row for row in inside if shortest <= LENGTHS[row] <= longest]
        expected = sorted(usable, key=lambda row: (distance[row], IDS[row]))[:neighbours]
        found = nearest[number]
        assert [n.distance for n in found] == pytest.approx([distance[row] for row in expected])
        assert {n.entry_id for n in found} <= {IDS[row] for row in usable}
        assert len({n.entry_id for n in found}) == len(found)
        for n in found:
            row = IDS.index(n.entry_id)
            assert (n.length, n.distance) == (LENGTHS[row], pytest.approx(distance[row]))

        common = {row: len(values & set(SKETCHES[row].tolist())) for row in inside}
        expected = sorted((r for r in inside if common[r]), key=lambda r: (-common[r], IDS[r]))
        assert sharing[number] == [
            (IDS[row], common[row], LENGTHS[row]) for row in expected[:neighbours]
        ]


def test_entries_without_ties_are_answered_as_by_one_index_of_all() -> None:
    random = np.random.default_rng(5)
    features = random.normal(size=(500, 16)).astype(np.float32)
    lengths = random.integers(1, 50, 500)
    index = GrowingIndex()
    for start in range(0, 500, 50):
        rows = range(start, start + 50)
        index.add(list(rows), features[rows], [SKETCHES[0]] * 50, lengths[rows].tolist())
        if start % 100:
            index.compact()
    queries = random.normal(size=(20, 16)).astype(np.float32)
    bounds = [(int(low), int(low) + 20) for low in random.integers(1, 30, 20)]
    static = FeatureIndex(features, lengths.tolist(), "Flat")
    assert look_up(index, queries, bounds, 8) == static.search(queries, bounds, 8, NEVER)


def test_what_joins_and_leaves_inverted_files_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_EXACT_UP_TO", 512)
    random = np.random.default_rng(6)
    features = random.normal(size=(4096, 16)).astype(np.float32)
    lengths = random.integers(1, 50, 4096)
    index, gone = GrowingIndex(), set(range(0, 4096, 8))
    for start in range(0, 4096, 1024):
        rows = range(start, start + 1024)
        index.add(list(rows), features[rows], [SKETCHES[0]] * 1024, lengths[rows].tolist())
        index.compact()
        index.remove([row for row in rows if row in gone])
    assert any(level.index._inverted is not None for level in index._levels)
    queried = range(4, 4096, 16)
    bounds = [(int(length), 99) for length in lengths[queried]]
    found = look_up(index, features[queried] + np.float32(0.01), bounds, 4)
    assert np.mean([n[0].entry_id == row for n, row in zip(found, queried, strict=True)]) >= 0.99
    assert not gone & {n.entry_id for answer in found for n in answer}
    for answer, (shortest, _) in zip(found, bounds, strict=True):
        assert all(shortest <= n.length == lengths[n.entry_id] for n in answer)


def test_levels_stay_few_and_each_entry_is_built_a_few_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = 0

    class Counting(growing._Level):
        def __init__(self, ids: np.ndarray, *rest: object) -> None:
            nonlocal built
            built += len(ids)
            super().__init__(ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(growing, "_Level", Counting)
    index, total = GrowingIndex(), 1024
    for number in range(total):
        index.add([number], FEATURES[:1], SKETCHES[:1], [1])
        index.compact()
        assert len(index._levels) <= 2 + math.log2(number + 1)
    assert built <= total * (2 + math.log2(total))


def test_a_level_of_which_half_is_gone_is_built_anew() -> None:
    index = GrowingIndex()
    add(index, list(range(20)))
    index.remove([IDS[row] for row in range(9)])
    index.compact()
    assert [len(level.ids) for level in index._levels] == [20]
    index.remove([IDS[row] for row in range(9, 11)])
    index.compact()
    assert [len(level.ids) for level in index._levels] == [9]
    index.remove(IDS)
    assert index._levels == ()


def test_searches_and_changes_go_on_while_levels_are_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index = GrowingIndex()
    add(index, [0, 1, 2])
    add(index, [3, 4, 5])
    building, go_on = threading.Event(), threading.Event()

    def slowly(*arguments: object) -> object:
        building.set()
        assert go_on.wait(30)
        return FeatureIndex(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(growing, "FeatureIndex", slowly)
    compacting = threading.Thread(target=index.compact)
    compacting.start()
    try:
        assert building.wait(30)
        monkeypatch.setattr(growing, "FeatureIndex", FeatureIndex)
        index.compact()  # returns at once
        index.remove([IDS[1], IDS[4]])
        add(index, [6, 1])
        expected = {IDS[row] for row in (0, 1, 2, 3, 5, 6)}
        assert everything(index) == expected
    finally:
        go_on.set()
        compacting.join(30)
    assert everything(index) == expected
    assert len(index) == 6


def everything(index: GrowingIndex) -> set[int]:
    [found] = look_up(index, np.zeros((1, DIM), np.float32), [(1, 99)], POOL)
    assert len({n.entry_id for n in found}) == len(found)
    return {n.entry_id for n in found}


def test_searches_in_other_threads_always_see_what_stays() -> None:
    index, staying = GrowingIndex(), list(range(10))
    add(index, staying)
    stop, wrong = threading.Event(), list[object]()

    def search() -> None:
        while not stop.is_set():
            found = everything(index)
            if not {IDS[row] for row in staying} <= found:
                wrong.append(found)

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 1
    while time.monotonic() < until:
        for row in range(10, 30):
            add(index, [row])
            index.compact()
        index.remove([IDS[row] for row in range(10, 30)])
        index.compact()
    stop.set()
    for thread in threads:
        thread.join(30)
    assert wrong == []


def test_a_deadline_that_has_passed_is_a_timeout() -> None:
    index = GrowingIndex()
    add(index, [0])
    with pytest.raises(StoreTimeout):
        index.lookup(FEATURES[:1], [(1, 9)], 1, 0.0)
    with pytest.raises(StoreTimeout):
        index.overlaps(SKETCHES[:1], 1, 0.0)
