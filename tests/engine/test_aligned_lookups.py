# SPDX-License-Identifier: Apache-2.0
"""Lookups of entries that share tokens with a text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lookup_samples import (
    BIDIRECTIONAL,
    CAUSAL,
    EVERY,
    EVERY_CAUSAL,
    GROUPS,
    NOVELTY,
    PROJECTOR,
    WINDOWED,
    FakeStore,
    Groups,
    Layouts,
    assert_maps_of,
    edit,
    faults,
    known,
    look_up,
    make_lookups,
    make_records,
    near,
    other_model,
    overlap,
    pooled,
    shared,
    tokens_of,
)

from attncache_vllm.engine import step
from attncache_vllm.engine.lookups import OVERLAPS, Lookups
from attncache_vllm.engine.step import Hit
from attncache_vllm.reuse.align import align
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.match import AlignedGate, AlignedMatch
from attncache_vllm.reuse.plan import Plan, Source
from attncache_vllm.reuse.sketch import sketch
from attncache_vllm.store import (
    MAX_LENGTH,
)


def matched(
    entry_id: int, ids: np.ndarray, aligned: float, prefix: float = 0.0, causal: bool = True
) -> AlignedMatch:
    """What the gate makes of an entry."""
    gate = AlignedGate(causal, NOVELTY, aligned, prefix)
    return gate.match(entry_id, align(ids, tokens_of(entry_id)))


def assert_same_alignment(served: step.Served, expected: Any) -> None:
    assert served.alignment is not None and expected is not None
    assert served.alignment.rows.tolist() == expected.rows.tolist()
    assert served.alignment.entry_rows.tolist() == expected.entry_rows.tolist()
    assert served.alignment.entry_length == served.maps.length == expected.entry_length


def hit_of(
    plan: Plan, store: FakeStore, *ids: np.ndarray, layouts: Layouts | None = None
) -> list[Hit | None]:
    lookups = make_lookups(store, plan, layouts or {2: CAUSAL, 3: CAUSAL})
    store.records.update(make_records(layouts or {2: CAUSAL, 3: CAUSAL}))
    try:
        return look_up(lookups, known(*ids))
    finally:
        lookups._thread.shutdown()


def test_the_candidate_that_leaves_the_fewest_rows_to_compute_serves_the_rows_it_shares(
    fake_store: FakeStore,
) -> None:
    # Of entry 4 some tokens were edited; entries 3 and 0 share the beginning of one and the whole
    # of the other.
    first = edit(4, 20, 40, 41)
    second = np.append(tokens_of(3), np.arange(3, dtype=np.int32) + 77)
    fake_store.overlapping = [overlap(3, 4), overlap(0, 3, 4), []]
    unrelated = np.arange(30, dtype=np.int32) + 50_000
    fake_store.answers = [[]]
    plan = shared({"aligned": ((), (), (0, 1), (1,)), "neighbour": ((), (), (0, 1), ())})
    hits = hit_of(plan, fake_store, first, second, unrelated)
    [asked] = fake_store.asked_overlaps
    assert [s.tolist() for s in asked["sketches"]] == [
        sketch(ids).tolist() for ids in (first, second, unrelated)
    ]
    assert (asked["neighbours"], asked["deadline"]) == (OVERLAPS, float("inf"))
    assert fake_store.read == [[0, 3, 4]]
    assert fake_store.loaded == [[3, 4]]
    for hit, entry_id, ids in zip(hits[:2], (4, 3), (first, second), strict=True):
        assert_maps_of(hit, entry_id, {2: CAUSAL, 3: CAUSAL}, "aligned")
        assert hit is not None
        match = matched(entry_id, ids, 3 / GROUPS)
        for served in hit.served.values():
            assert_same_alignment(served, match.aligned)
        assert [served.maps.groups for served in hit.served.values()] == [(0, 1), (1,)]
        lse = hit.served[3].maps.lse
        assert lse is not None
        assert set(lse.flatten().tolist()) == {float(entry_id)}
    assert hits[2] is None


@pytest.mark.parametrize("length", [40, 39])
def test_a_text_that_is_stored_or_how_a_stored_one_begins_needs_no_alignment(
    fake_store: FakeStore, length: int
) -> None:
    # A window hides the same columns from the rows of both.
    layouts: Layouts = {2: CAUSAL, 3: WINDOWED}
    fake_store.overlapping = [overlap(3)]
    plan = shared({"aligned": ((), (), (0, 1), ()), "prefix": ((), (), (), (0,))})
    [hit] = hit_of(plan, fake_store, tokens_of(3)[:length], layouts=layouts)
    assert hit is not None
    assert {layer: served.source for layer, served in hit.served.items()} == {
        2: "aligned",
        3: "prefix",
    }
    assert [served.alignment for served in hit.served.values()] == [None, None]
    assert {served.maps.length for served in hit.served.values()} == {40}


def test_what_shares_tokens_comes_before_what_is_near(fake_store: FakeStore) -> None:
    fake_store.overlapping = [overlap(4), []]
    fake_store.answers = [near(3)]
    plan = shared({"aligned": ((), (), (0, 1), ()), "neighbour": EVERY_CAUSAL})
    hits = hit_of(plan, fake_store, edit(4, 20), edit(1, 1, 2, 3))
    assert [hit.source if hit else None for hit in hits] == ["aligned", "neighbour"]
    assert_maps_of(hits[1], 3, {2: CAUSAL, 3: CAUSAL})
    # Only the second is looked up by its feature, which is its own.
    [asked] = fake_store.asked
    assert asked["lengths"] == [(24, MAX_LENGTH)]
    with torch.no_grad():
        first, second = PROJECTOR(pooled(2)).numpy()
    np.testing.assert_allclose(asked["features"], second[None], rtol=1e-3)
    assert np.abs(first - second).max() > 0.1


def test_an_entry_that_serves_fewer_rows_than_a_template_leaves_them_to_it(
    fake_store: FakeStore,
) -> None:
    # 24 of 42 rows of 4 of 7 KV groups: a third of all.
    ids = np.append(tokens_of(3)[:24], np.arange(18, dtype=np.int32) + 50_000)
    aligned: Groups = ((), (), (0, 1), (0, 1))
    assert 2 / GROUPS < matched(3, ids, 4 / GROUPS).reused < 3 / GROUPS
    templates: list[tuple[Groups | None, bool]] = [
        (None, True),
        (((), (), (0, 1), ()), True),
        (((), (), (0, 1), (0,)), False),
    ]
    for template, served in templates:
        fake_store.overlapping = [overlap(3)]
        sources: dict[Source, Groups] = {"aligned": aligned}
        if template is not None:
            sources["template"] = template
        [hit] = hit_of(shared(sources, gate=1.0), fake_store, ids)
        assert (hit is not None) is served


def test_layers_that_tolerate_no_approximation_take_the_rows_of_the_common_prefix(
    fake_store: FakeStore,
) -> None:
    fake_store.overlapping = [overlap(4), overlap(4)]
    edited, other = edit(4, 40, 50), np.append(tokens_of(4)[:30], 5).astype(np.int32)
    plan = shared({"aligned": ((), (), (0, 1), ()), "prefix": ((), (), (), (0, 1))})
    first, second = hit_of(plan, fake_store, edited, other)
    assert first is not None and second is not None
    match = matched(4, edited, 2 / GROUPS, 2 / GROUPS)
    assert first.source == "aligned"
    assert {layer: served.source for layer, served in first.served.items()} == {
        2: "aligned",
        3: "prefix",
    }
    assert_same_alignment(first.served[2], match.aligned)
    assert_same_alignment(first.served[3], match.prefix)
    assert match.prefix is not None
    assert match.prefix.rows.tolist() == list(range(40))
    assert second.served.keys() == {2, 3}


def test_edits_beyond_the_gate_leave_the_common_prefix(fake_store: FakeStore) -> None:
    layouts: Layouts = {1: CAUSAL, 2: CAUSAL, 3: CAUSAL}
    sources: dict[Source, Groups] = {
        "aligned": ((), (), (0, 1), ()),
        "prefix": ((), (0, 1), (), (0, 1)),
    }
    ids = edit(4, *range(24, 64, 3))
    fake_store.overlapping = [overlap(4)]
    found = [
        hit_of(shared(sources, gate), fake_store, ids, layouts=layouts)[0] for gate in (0.05, 0.2)
    ]
    assert [(hit.source, set(hit.served)) for hit in found if hit] == [
        ("prefix", {1, 3}),
        ("aligned", {1, 2, 3}),
    ]
    # Fewer rows than are worth it: the other sources serve more.
    few: dict[Source, Groups] = {**sources, "prefix": ((), (), (), (0, 1))}
    assert hit_of(shared(few, 0.05), fake_store, ids, layouts=layouts) == [None]


def test_a_window_that_is_shorter_than_either_text_leaves_the_layer_exact(
    fake_store: FakeStore,
) -> None:
    # A window of 24: the entry of 24 tokens and a text of as many see all, one of 25 does not.
    wide = MapLayout(4, 2, Mask(window=24))
    layouts: Layouts = {2: CAUSAL, 3: wide}
    fake_store.overlapping = [overlap(1), overlap(1), overlap(3)]
    longer = np.append(tokens_of(1), 7).astype(np.int32)
    plan = shared({"aligned": ((), (), (0, 1), (0, 1))})
    hits = hit_of(plan, fake_store, edit(1, 12), longer, edit(3, 5)[:24], layouts=layouts)
    assert [hit.served.keys() if hit else None for hit in hits] == [{2, 3}, {2}, {2}]


def test_a_match_whose_layers_all_have_short_windows_is_no_hit(fake_store: FakeStore) -> None:
    fake_store.overlapping = [overlap(3)]
    fake_store.answers = [near(4)]
    layouts: Layouts = {3: WINDOWED}
    plan = shared({"aligned": EVERY, "neighbour": EVERY})
    [hit] = hit_of(plan, fake_store, edit(3, 12), layouts=layouts)
    assert_maps_of(hit, 4, layouts)


@pytest.mark.parametrize("other", [BIDIRECTIONAL, CAUSAL])
def test_with_a_bidirectional_layer_no_prefix_is_exact_and_the_first_token_is_computed(
    fake_store: FakeStore, other: MapLayout
) -> None:
    layouts: Layouts = {2: BIDIRECTIONAL, 3: other}
    fake_store.overlapping = [overlap(4)]
    ids = edit(4, 40)
    plan = shared({"aligned": ((), (), (0, 1), ()), "prefix": ((), (), (), (0, 1))})
    [hit] = hit_of(plan, fake_store, ids, layouts=layouts)
    assert hit is not None
    assert hit.served.keys() == {2}
    match = matched(4, ids, 2 / GROUPS, 2 / GROUPS, causal=False)
    assert_same_alignment(hit.served[2], match.aligned)
    assert match.aligned is not None
    assert {0, 40, 63}.isdisjoint(match.aligned.rows.tolist())


def test_texts_whose_tokens_are_unknown_are_looked_up_by_feature_only(
    fake_store: FakeStore, lookups: Lookups
) -> None:
    lookups = make_lookups(fake_store, shared({"aligned": EVERY, "neighbour": EVERY}))
    fake_store.answers = [near(3)]
    assert_maps_of(look_up(lookups, [20])[0], 3)
    assert fake_store.asked_overlaps == []


def test_a_plan_without_neighbours_needs_no_features(fake_store: FakeStore) -> None:
    lookups = make_lookups(fake_store, shared({"aligned": EVERY}), {2: CAUSAL})
    assert not lookups.uses_features
    fake_store.overlapping = [overlap(4)]
    future = lookups.start(known(edit(4, 20)), None, float("inf"))
    assert future is not None
    [hit] = future.result(timeout=60)
    lookups._thread.shutdown()
    assert hit is not None and hit.source == "aligned"
    assert fake_store.asked == []


@pytest.mark.parametrize("damage", ["tokens", "maps"])
def test_a_damaged_candidate_leaves_the_sequence_to_the_next(
    fake_store: FakeStore, damage: str
) -> None:
    layouts: Layouts = {2: CAUSAL, 3: CAUSAL}
    plan = shared({"aligned": EVERY_CAUSAL, "neighbour": EVERY_CAUSAL}, gate=1.0)
    lookups = make_lookups(fake_store, plan, layouts)
    fake_store.records.update(make_records(layouts))
    fake_store.overlapping, fake_store.answers = [overlap(4, 3)], [near(3)]
    ids = np.concatenate([tokens_of(3)[:16], tokens_of(4)[:20]])
    assert_maps_of(look_up(lookups, known(ids))[0], 4, layouts, "aligned")
    lookups._thread.shutdown()

    lookups, before = make_lookups(fake_store, plan, layouts), faults("damaged record")
    assert fake_store.records[4] is not None
    fake_store.records[4] = (
        None if damage == "tokens" else other_model(fake_store.records[4], layer=2)
    )
    [hit] = look_up(lookups, known(ids))
    # Without its tokens it is no candidate; that its maps are damaged is known too late for the
    # next one to be aligned.
    assert_maps_of(hit, 3, layouts, "aligned" if damage == "tokens" else "neighbour")
    assert faults("damaged record") == before + (damage == "maps")
    lookups._thread.shutdown()


def test_maps_of_aligned_matches_stay_in_memory_apart_from_those_of_neighbours(
    fake_store: FakeStore,
) -> None:
    plan = shared({"aligned": ((), (), (0,), (0, 1)), "neighbour": ((), (), (0, 1), ())})
    lookups = make_lookups(fake_store, plan, {2: CAUSAL, 3: CAUSAL})
    fake_store.records.update(make_records({2: CAUSAL, 3: CAUSAL}))
    fake_store.overlapping, fake_store.answers = [overlap(4), []], [near(4)]
    for _ in range(2):
        aligned, neighbour = look_up(lookups, known(edit(4, 20), edit(0, 1)))
        assert aligned is not None and neighbour is not None
        assert aligned.served[2].maps.groups == (0,)
        assert neighbour.served[2].maps.groups == (0, 1)
    lookups._thread.shutdown()
    assert fake_store.loaded == [[4], [4]]
