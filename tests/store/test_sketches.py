# SPDX-License-Identifier: Apache-2.0
"""Which entries share tokens with a sequence, by the values that their sketches have in common."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from attncache_vllm.errors import StoreDamaged, StoreError, StoreTimeout
from attncache_vllm.store.records import MAX_SKETCH
from attncache_vllm.store.sketches import MAX_POSTINGS, SketchIndex, encode_sketches

NEVER = math.inf
# Few values, so that sketches have many in common, among them the largest there is.
VALUES = st.sampled_from([*range(20), (1 << 64) - 1])
SKETCHES = arrays.arrays(np.uint64, st.integers(0, 12), elements=VALUES, unique=True).map(np.sort)


def index_of(sketches: list[np.ndarray]) -> SketchIndex:
    return SketchIndex(encode_sketches(sketches), range(1, len(sketches) + 1))


def values(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint64)


@settings(max_examples=200, deadline=None)
@given(
    stored=st.lists(SKETCHES, min_size=1, max_size=MAX_POSTINGS),
    asked=st.lists(SKETCHES, max_size=4),
    neighbours=st.integers(0, 70),
    forgotten=st.sets(st.integers(0, MAX_POSTINGS)),
)
def test_a_search_equals_brute_force(
    stored: list[np.ndarray], asked: list[np.ndarray], neighbours: int, forgotten: set[int]
) -> None:
    index = index_of(stored)
    for entry_id in forgotten:
        index.forget(entry_id)  # of which some are not indexed
    answers = index.search(asked, neighbours, NEVER)
    for query, answer in zip(asked, answers, strict=True):
        common = [len(set(query.tolist()) & set(sketch.tolist())) for sketch in stored]
        sharing = [i for i, n in enumerate(common) if n and i not in forgotten]
        expected = sorted(sharing, key=lambda i: -common[i])[:neighbours]
        assert [(o.entry_id, o.common, o.length) for o in answer] == [
            (i, common[i], i + 1) for i in expected
        ]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1 << 20), own=st.integers(1, 5))
def test_a_few_values_of_its_own_find_an_entry_among_many_with_the_same_beginning(
    seed: int, own: int
) -> None:
    random = np.random.default_rng(seed)
    beginning = random.integers(0, 1 << 63, 50, dtype=np.uint64)
    stored = [
        np.unique(np.append(beginning, random.integers(1 << 63, 1 << 64, 14, dtype=np.uint64)))
        for _ in range(10 * MAX_POSTINGS)
    ]
    index = index_of(stored)
    wanted = int(random.integers(len(stored)))
    others = random.integers(1 << 63, 1 << 64, 14 - own, dtype=np.uint64)
    query = np.unique(np.concatenate([beginning, stored[wanted][-own:], others]))
    [[found]] = index.search([query], 1, NEVER)
    assert (found.entry_id, found.common) == (wanted, 50 + own)


def test_the_longest_posting_lists_are_not_followed_to_their_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index = index_of([values(1, 2, 3)] * (20 * MAX_POSTINGS))
    looked_at = []
    unique = np.unique
    monkeypatch.setattr(
        np, "unique", lambda array, **how: (looked_at.append(len(array)), unique(array, **how))[1]
    )
    [found] = index.search([values(1, 2, 3)], 5, NEVER)
    assert [(o.entry_id, o.common) for o in found] == [(i, 3) for i in range(5)]
    assert looked_at == [3 * MAX_POSTINGS]


def test_more_neighbours_than_are_counted_by_default_are_found() -> None:
    index = index_of([values(number) for number in range(200)])
    [found] = index.search([np.arange(200, dtype=np.uint64)], 150, NEVER)
    assert [o.entry_id for o in found] == list(range(150))


@pytest.mark.parametrize("in_time", [0, 1, 2])
def test_a_late_search_looks_at_no_further_query(
    monkeypatch: pytest.MonkeyPatch, in_time: int
) -> None:
    deadline = time.monotonic() + 60
    looked_at, propose = [], SketchIndex._propose

    def slow(index: SketchIndex, sketch: np.ndarray, most: int) -> np.ndarray:
        looked_at.append(sketch)
        if len(looked_at) == in_time:
            monkeypatch.setattr(time, "monotonic", lambda: deadline + 1)
        return propose(index, sketch, most)

    monkeypatch.setattr(SketchIndex, "_propose", slow)
    if not in_time:
        monkeypatch.setattr(time, "monotonic", lambda: deadline + 1)
    with pytest.raises(StoreTimeout):
        index_of([values(1)]).search([values(1)] * 2, 1, deadline)
    assert len(looked_at) == in_time


@pytest.mark.parametrize(
    "query",
    [np.zeros(3), np.zeros(3, np.int64), np.zeros((1, 1), np.uint64), np.zeros(257, np.uint64)],
)
def test_a_query_that_is_no_sketch_is_refused(query: np.ndarray) -> None:
    with pytest.raises(StoreError, match="a sketch must be uint64"):
        index_of([values(1)]).search([values(1), query], 1, NEVER)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        encode_sketches([values(1), values(2)])[:-1],
        encode_sketches([values(1), values(2)])[:-8],
        encode_sketches([values(1), values(2)]) + bytes(8),
        encode_sketches([values(1)]),
        np.array([1 << 63, 1 << 63], "<u8").tobytes(),  # wraps around to the right sum
        np.array([MAX_SKETCH + 1, 0, *range(MAX_SKETCH + 1)], "<u8").tobytes(),
    ],
)
def test_sketches_of_other_sizes_are_damage(data: bytes) -> None:
    with pytest.raises(StoreDamaged, match="sketches must be those of 2 entries"):
        SketchIndex(data, [1, 1])
