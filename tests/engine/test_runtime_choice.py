# SPDX-License-Identifier: Apache-2.0
"""What of a hit is taken: canaries, rows of maps, what pays."""

from __future__ import annotations

import numpy as np
import torch
from batches import counted
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_samples import (
    GROUPS,
    LONGEST,
    NO_TEMPLATES,
    NUM_LAYERS,
    TEMPLATES,
    FakeLookups,
    Rows,
    begin,
    hits,
    make_canaries,
    make_maps,
    make_serving,
    neighbour,
    served_by,
    sources_of,
)

from attncache_vllm.engine.canary import Canaries
from attncache_vllm.engine.costs import Cost, Costs
from attncache_vllm.engine.step import Hit, Served
from attncache_vllm.reuse.align import Alignment
from attncache_vllm.reuse.plan import Plan, Source, SourcePlan

# -- canaries ----------------------------------------------------------------------------------


def test_a_share_of_the_hits_is_computed_exactly_and_counted_apart() -> None:
    serving = make_serving(None, TEMPLATES, make_canaries(0.25))
    names = [
        ("attncache_canaries_total", {"source": "template"}),
        ("attncache_misses_total", {"reason": "canary"}),
        ("attncache_hits_total", {"source": "template"}),
    ]
    before, rows = [counted(name, **labels) for name, labels in names], Rows()
    # A miss in between is no hit, and no canary is drawn for it.
    found = begin(serving, [5, 6, 50, 7, 8, 9, 10])
    assert found.served(3).keys() == {0, 1, 3, 5, 6}
    assert found.canaries(3).keys() == {4}
    assert found.canaries(3)[4].maps is TEMPLATES.get(3, 8)
    assert serving.outcomes.sequences == {"hit": 5, "miss": 2}
    assert serving.outcomes.reasons == {
        "hit: template": 5,
        "miss: nothing close enough": 1,
        "miss: canary": 1,
    }
    after = [counted(name, **labels) for name, labels in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 5]
    # A canary's rows are computed, all of them.
    assert rows.since == (3 * (5 + 6 + 7 + 9 + 10), GROUPS * 95 - 3 * 37)


def test_a_layer_that_left_its_band_is_exact_where_that_source_would_serve_it() -> None:
    every = tuple((0, 1) for _ in range(NUM_LAYERS))
    parts: dict[Source, SourcePlan] = {
        source: SourcePlan(every, errors=((0.1, 0.01),) * NUM_LAYERS)
        for source in ("neighbour", "template")
    }
    canaries = Canaries(Plan(0, NUM_LAYERS, parts), 0.0, lambda: 0, "attncache rearm")
    hits = [served_by("neighbour", {1: (0, 1), 3: (0, 1)}), None]
    serving, rows = make_serving(FakeLookups(hits), TEMPLATES, canaries), Rows()
    both = {0: "neighbour", 1: "template"}
    assert sources_of(begin(serving, [5, 6])) == [{}, both, {}, both, {}]
    assert rows.since[0] == 4 * 5 + 3 * 6
    lost, served, rows = torch.ones(2, 4), Served("template", make_maps(6)), Rows()
    serving.compare(3, served, lost * float("nan"), lost)
    assert sources_of(begin(serving, [5, 6])) == [{}, both, {}, {0: "neighbour"}, {}]
    assert rows.since[0] == 4 * 5 + 1 * 6


# -- rows of maps ------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.data())
def test_every_row_of_every_map_counts_once_as_reused_or_computed(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=6))
    templates = data.draw(st.sampled_from([TEMPLATES, NO_TEMPLATES]))
    canaries = make_canaries(data.draw(st.sampled_from([0.0, 0.4, 1.0])))
    found, spared = [], {}
    for row, length in enumerate(lengths):
        if length < 4:
            continue
        hit, spares = data.draw(hits(length))
        found.append(hit)
        if hit is None and templates is TEMPLATES and length <= LONGEST:
            spares = 3 * length
        spared[row] = spares
    serving, rows = make_serving(FakeLookups(found), templates, canaries), Rows()
    step = begin(serving, lengths)
    exact = {row for layer in range(NUM_LAYERS) for row in step.canaries(layer)}
    reused, computed = rows.since
    assert reused == sum(spares for row, spares in spared.items() if row not in exact)
    assert reused + computed == GROUPS * sum(lengths)
    assert serving.outcomes.sequences.total() == len(lengths)


# -- what pays ---------------------------------------------------------------------------------


def test_texts_too_short_to_pay_are_bypassed_and_only_those_worth_it_are_looked_up() -> None:
    lookups = FakeLookups([neighbour()])
    serving, rows = make_serving(lookups, TEMPLATES), Rows()
    # From 6 tokens on a template pays in layer 3, from 10 on it does in both, and a lookup as well.
    serving.costs = Costs(
        {
            (1, "template"): [Cost(5, 2, 3), Cost(6, 2, 3), Cost(10, 4, 1)],
            (3, "template"): [Cost(5, 2, 3), Cost(6, 2, 1), Cost(10, 4, 1)],
            (2, "neighbour"): [Cost(5, 2, 1), Cost(6, 2, 1), Cost(10, 9, 1)],
            (4, "neighbour"): [Cost(5, 2, 3), Cost(6, 2, 3), Cost(10, 2, 3)],
        },
        lookup=3.0,
    )
    found = begin(serving, [5])
    assert sources_of(found) == [{}] * NUM_LAYERS
    assert lookups.asked == []
    assert serving.outcomes.reasons == {"bypass: reuse would not pay at its length": 1}
    assert rows.since == (0, GROUPS * 5)

    found, rows = begin(serving, [7]), Rows()
    assert sources_of(found) == [{}, {}, {}, {0: "template"}, {}]
    assert lookups.asked == []
    assert rows.since == (2 * 7, (GROUPS - 2) * 7)

    found, rows = begin(serving, [11]), Rows()
    assert sources_of(found) == [{}, {}, {0: "neighbour"}, {}, {}]
    assert len(lookups.asked) == 1
    assert rows.since == (2 * 11, (GROUPS - 2) * 11)
    assert serving.outcomes.sequences == {"bypass": 1, "hit": 2}


def test_what_was_found_for_another_text_of_the_step_serves_only_where_it_pays() -> None:
    lookups = FakeLookups([neighbour(), neighbour()])
    serving = make_serving(lookups, TEMPLATES)
    serving.costs = Costs(
        {
            (3, "template"): [Cost(6, 2, 1), Cost(10, 4, 1)],
            (2, "neighbour"): [Cost(6, 2, 3), Cost(10, 9, 1)],
        },
        lookup=3.0,
    )
    found = begin(serving, [7, 11])
    assert sources_of(found) == [{}, {}, {1: "neighbour"}, {0: "template"}, {}]


def test_a_texts_own_map_may_pay_where_an_aligned_one_does_not() -> None:
    edited = Alignment(8, 8, np.arange(7), np.arange(7))
    own = Hit("aligned", {2: Served("aligned", make_maps(64))})
    other = Hit("aligned", {2: Served("aligned", make_maps(64), edited)})
    serving = make_serving(FakeLookups([own, other]))
    serving.costs = Costs({(2, "own"): [Cost(8, 2, 1)], (2, "aligned"): [Cost(8, 2, 3)]})
    found = begin(serving, [8, 8])
    assert sources_of(found)[2] == {0: "aligned"}
    assert serving.outcomes.sequences == {"hit": 1, "miss": 1}
