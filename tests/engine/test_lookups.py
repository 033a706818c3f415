# SPDX-License-Identifier: Apache-2.0
"""Lookups beside the forward pass: candidates, the best match, its maps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lookup_samples import (
    BIDIRECTIONAL,
    CAUSAL,
    ENCODER,
    ENCODER_RECORDS,
    EVERY_CAUSAL,
    GATE,
    LENGTHS,
    NUM_LAYERS,
    PROJECTOR,
    RECORDS,
    WINDOWED,
    FakeStore,
    Groups,
    Layouts,
    assert_maps_of,
    look_up,
    make_lookups,
    make_lse,
    make_probs,
    make_records,
    near,
    other_model,
    pooled,
    shared,
    unknown,
)

from attncache_vllm.engine.lookups import NEIGHBOURS, Lookups
from attncache_vllm.engine.step import Hit
from attncache_vllm.reuse.match import nearest
from attncache_vllm.reuse.plan import Plan, SourcePlan
from attncache_vllm.reuse.tile_codec import encode_tiles
from attncache_vllm.store import (
    MAX_LENGTH,
    Neighbour,
)


def test_a_batch_is_one_lookup_and_one_load(fake_store: FakeStore, lookups: Lookups) -> None:
    fake_store.answers = [near(3), near(1), [], near(3)]
    features = pooled(4)
    future = lookups.start(unknown([30, 20, 17, 40]), features, deadline=12345.0)
    assert future is not None
    hits = future.result(timeout=60)
    [asked] = fake_store.asked
    # A causal map serves every text that is not longer.
    assert asked["lengths"] == [(length, MAX_LENGTH) for length in (30, 20, 17, 40)]
    assert (asked["neighbours"], asked["deadline"]) == (NEIGHBOURS, 12345.0)
    assert asked["features"].dtype == np.float32
    assert asked["features"].flags.c_contiguous
    with torch.no_grad():
        np.testing.assert_allclose(asked["features"], PROJECTOR(features).numpy(), rtol=1e-4)
    assert fake_store.loaded == [[1, 3]]
    assert_maps_of(hits[0], 3)
    assert_maps_of(hits[1], 1)
    assert hits[2] is None
    assert_maps_of(hits[3], 3)


distances = st.floats(0, 2 * GATE) | st.just(GATE)

candidates = st.builds(
    lambda entry_id, distance: Neighbour(entry_id, distance, LENGTHS[entry_id]),
    st.sampled_from(sorted(LENGTHS)),
    distances,
)

lengths_asked = st.integers(1, 70) | st.sampled_from(sorted(LENGTHS.values()))

queries = st.lists(st.tuples(lengths_asked, st.lists(candidates, max_size=5)), min_size=1)

Queries = list[tuple[int, list[Neighbour]]]


def answered(store: FakeStore, lookups: Lookups, queries: Queries) -> list[Hit | None]:
    store.answers = [found for _, found in queries]
    try:
        return look_up(lookups, [length for length, _ in queries])
    finally:
        lookups._thread.shutdown()


@settings(deadline=None, max_examples=50)
@given(queries)
def test_hits_are_those_chosen_by_hand(queries: Queries) -> None:
    store = FakeStore([])
    hits = answered(store, make_lookups(store), queries)
    for hit, (length, found) in zip(hits, queries, strict=True):
        chosen = nearest(found, length, GATE, longer=True)
        if chosen is None:
            assert hit is None
        else:
            assert_maps_of(hit, chosen.entry_id)
            assert hit is not None
            assert {served.alignment for served in hit.served.values()} == {None}


# -- lengths that bidirectional maps serve -----------------------------------------------------


def encoder_store() -> FakeStore:
    store = FakeStore([])
    store.records.update(ENCODER_RECORDS)
    return store


@settings(deadline=None, max_examples=30)
@given(queries)
def test_bidirectional_maps_serve_their_own_length_only(queries: Queries) -> None:
    store = encoder_store()
    hits = answered(store, make_lookups(store, layouts=ENCODER), queries)
    [asked] = store.asked
    assert asked["lengths"] == [(length, length) for length, _ in queries]
    for hit, (length, found) in zip(hits, queries, strict=True):
        chosen = nearest(found, length, GATE, longer=False)
        if chosen is None:
            assert hit is None
        else:
            assert_maps_of(hit, chosen.entry_id, ENCODER)


def test_of_a_model_with_both_kinds_of_layers_a_longer_entry_serves_the_causal_ones() -> None:
    layouts: Layouts = {2: BIDIRECTIONAL, 3: CAUSAL}
    store = FakeStore([near(3), near(3)])
    store.records.update(make_records(layouts))
    lookups = make_lookups(store, shared({"neighbour": EVERY_CAUSAL}), layouts)
    short, equal = look_up(lookups, [25, 40])
    lookups._thread.shutdown()
    assert store.asked[0]["lengths"] == [(25, MAX_LENGTH), (40, MAX_LENGTH)]
    assert short is not None
    assert short.served.keys() == {3}
    assert torch.equal(short.served[3].maps.to_dense(), make_probs(3, 3, CAUSAL))
    assert_maps_of(equal, 3, layouts)


def test_a_longer_entry_is_no_hit_if_no_layer_that_it_could_serve_is_in_the_plan() -> None:
    # The causal layer is there, but neighbours serve the bidirectional one only.
    layouts: Layouts = {2: BIDIRECTIONAL, 3: CAUSAL}
    plan = Plan(
        0,
        NUM_LAYERS,
        {
            "neighbour": SourcePlan(((), (), (0, 1), ()), GATE),
            "template": SourcePlan(((), (), (), (0, 1))),
        },
    )
    store = FakeStore([near(3), near(3)])
    store.records.update(make_records(layouts))
    lookups = make_lookups(store, plan, layouts)
    short, equal = look_up(lookups, [25, 40])
    lookups._thread.shutdown()
    assert short is None
    assert_maps_of(equal, 3, {2: BIDIRECTIONAL})


def test_only_layers_with_reuse_in_this_engine_count() -> None:
    # The plan's layer 2 is bypassed here, and its maps are not decoded: they need not even fit.
    layouts: Layouts = {3: WINDOWED}
    store = FakeStore([near(3)])
    store.records[3] = other_model(RECORDS[3], layer=2)
    lookups = make_lookups(store, layouts=layouts)
    [hit] = look_up(lookups, [20])
    lookups._thread.shutdown()
    assert_maps_of(hit, 3, layouts)


def test_only_the_kv_groups_of_the_plan_are_decoded() -> None:
    plan = Plan(0, NUM_LAYERS, {"neighbour": SourcePlan(((), (), (1,), ()), GATE)})
    store = FakeStore([near(3)])
    lookups = make_lookups(store, plan)
    [hit] = look_up(lookups, [20])
    lookups._thread.shutdown()
    assert_maps_of(hit, 3, {2: CAUSAL})
    assert hit is not None
    assert hit.served[2].maps.groups == (1,)
    assert lookups.resident.stats().bytes == hit.served[2].maps.nbytes


def test_a_layer_loses_of_its_maps_what_its_source_may() -> None:
    # One column holds all: of the others the tiles may go.
    probs = torch.full((4, 64, 64), 1e-4).tril()
    probs[:, :, 0] = 1 - probs[:, :, 1:].sum(-1)
    encoded = encode_tiles(probs, make_lse(4, CAUSAL), CAUSAL.mask).numpy()
    record = replace(RECORDS[4], codec="tiles-u8-lse", maps={2: encoded, 3: encoded})
    groups: Groups = ((), (), (0, 1), (0, 1))
    part = SourcePlan(groups, GATE, dropped=(0.0, 0.0, 0.0, 0.6))
    store = FakeStore([near(4)])
    store.records[4] = record
    lookups = make_lookups(
        store, Plan(0, NUM_LAYERS, {"neighbour": part}), layouts={2: CAUSAL, 3: CAUSAL}
    )
    [hit] = look_up(lookups, [20])
    lookups._thread.shutdown()
    assert hit is not None
    whole, less = (hit.served[layer].maps.to_dense() for layer in (2, 3))
    assert (whole[:, 63, 33] > 0).all() and (less[:, 63, 33] == 0).all()
    assert (less[:, 63, 0] > 0.99).all()
