# SPDX-License-Identifier: Apache-2.0
"""Who owns an entry while shards are drained, and what is no placement."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attncache_vllm.store.ray.placement import Placement
from attncache_vllm.store.ray.ring import owners

IDS = st.integers(0, (1 << 63) - 1)


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    shards = draw(st.integers(1, 9))
    drained = draw(st.sets(st.integers(0, shards - 1), max_size=shards - 1))
    return Placement(1, shards, draw(st.integers(1, shards)), tuple(sorted(drained)))


@given(placements(), IDS)
def test_an_entry_is_owned_by_different_shards_that_are_not_drained(
    placement: Placement, entry_id: int
) -> None:
    found = placement.owners(entry_id)
    assert len(set(found)) == len(found) == min(placement.replicas, len(placement.active))
    assert set(found) <= set(placement.active)


@given(placements(), IDS)
def test_a_drained_shard_moves_only_its_own_entries(placement: Placement, entry_id: int) -> None:
    before = owners(entry_id, placement.shards, placement.replicas)
    kept = tuple(shard for shard in before if shard in placement.active)
    assert placement.owners(entry_id)[: len(kept)] == kept


@given(placements())
def test_a_placement_is_read_back_as_it_was_written(placement: Placement) -> None:
    assert Placement.from_dict(placement.to_dict()) == placement


@pytest.mark.parametrize(
    "change",
    [
        {"generation": -1},
        {"shards": 0},
        {"shards": True},
        {"replicas": 0},
        {"replicas": 4},
        {"drained": [3]},
        {"drained": [1, 0]},
        {"drained": [0, 1, 2]},
        {"drained": "0"},
        {"more": 1},
    ],
)
def test_anything_odd_is_no_placement(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Placement.from_dict(Placement(1, 3, 2).to_dict() | change)
