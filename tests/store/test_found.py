# SPDX-License-Identifier: Apache-2.0
"""What several places found, put together."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from attncache_vllm.store.found import answers_of, found_of, merge

answers = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=4, max_size=4),
    min_size=1,
    max_size=4,
)


@given(answers, st.booleans())
def test_merging_takes_the_best_of_all_shards_each_once(
    shards: list[list[tuple[int, int]]], distances: bool
) -> None:
    # Of one id all shards say the same.
    value = {entry_id: number for shard in shards for entry_id, number in shard}
    kind = np.float32 if distances else np.int64
    parts = []
    for shard in shards:
        ids = np.array([[entry_id for entry_id, _ in shard]])
        values = np.array([[value[i] for i in ids[0].tolist()]], dtype=kind)
        parts.append((ids, values, ids + 100))
    sign = 1 if distances else -1
    best = sorted(value, key=lambda i: (sign * value[i], i))[:3]
    ids, values, lengths = merge(parts, 1, 3, kind)
    assert ids[0].tolist() == best + [-1] * (3 - len(best))
    assert values[0, : len(best)].tolist() == [value[i] for i in best]
    assert lengths[0, : len(best)].tolist() == [i + 100 for i in best]


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 9)))))
def test_answers_are_read_back_as_they_were_padded(
    answers: list[list[tuple[int, int, int]]],
) -> None:
    most = max(map(len, answers), default=0) + 1
    assert answers_of(found_of(answers, most, np.int64)) == answers


def test_of_nothing_nothing_is_merged() -> None:
    ids, distances, lengths = merge([], 2, 3, np.float32)
    assert (ids == -1).all() and ids.shape == distances.shape == lengths.shape == (2, 3)
    assert answers_of((ids, distances, lengths)) == [[], []]
