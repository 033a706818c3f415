# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import Counter

import pytest

from attncache_vllm.evaluate.shares import Counts, shares
from attncache_vllm.reuse.plan import Plan, SourcePlan

KV_HEADS = 2
PLAN = Plan(
    0,
    4,
    {
        "aligned": SourcePlan(((0, 1), (0, 1), (0, 1), (0, 1)), 0.5),
        "template": SourcePlan(((), (), (0,), (0, 1))),
    },
)


def test_shares_weigh_each_source_by_its_hits() -> None:
    counts = Counts(
        outcomes=Counter(hit=3, miss=1),
        hits=Counter(aligned=1, template=2),
        rows=Counter(reused=30, computed=70),
    )
    assert shares(PLAN, KV_HEADS, counts) == {
        "hit_rate": 0.75,
        "groups_reused_share": (8 + 2 * 3) / 8 / 4,
        "layers_reused_share": (4 + 2 * 1) / 4 / 4,  # half a layer is no layer
        "rows_reused_share": 0.3,
    }


def test_bypassed_sequences_lower_every_share() -> None:
    counts = Counts(outcomes=Counter(hit=1, bypass=1), hits=Counter(aligned=1))
    found = shares(PLAN, KV_HEADS, counts)
    assert (found["hit_rate"], found["groups_reused_share"]) == (0.5, 0.5)


def test_without_a_hit_nothing_is_reused() -> None:
    found = shares(PLAN, KV_HEADS, Counts(outcomes=Counter(miss=3)))
    assert (found["hit_rate"], found["groups_reused_share"]) == (0, 0)


def test_what_the_server_does_not_count_is_not_invented() -> None:
    found = shares(PLAN, KV_HEADS, Counts(outcomes=Counter(hit=2)))
    assert found["hit_rate"] == 1
    assert found["groups_reused_share"] is found["rows_reused_share"] is None
    assert set(shares(PLAN, KV_HEADS, Counts()).values()) == {None}


def test_a_hit_by_a_source_outside_the_plan_is_an_error() -> None:
    counts = Counts(outcomes=Counter(hit=1), hits=Counter(neighbour=1))
    with pytest.raises(KeyError):
        shares(PLAN, KV_HEADS, counts)


def test_counts_of_a_stretch_are_what_was_added() -> None:
    before = Counts(outcomes=Counter(hit=2, miss=1), rows=Counter(reused=5))
    after = Counts(outcomes=Counter(hit=2, miss=4), rows=Counter(reused=9), misses=Counter(far=3))
    added = after.since(before).plain()
    assert added["outcomes"] == {"miss": 3}
    assert (added["rows"], added["misses"], added["hits"]) == ({"reused": 4}, {"far": 3}, {})
