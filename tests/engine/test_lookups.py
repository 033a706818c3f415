# SPDX-License-Identifier: Apache-2.0
"""Lookups beside the forward pass, against a store whose every answer is set by the test."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from batches import counted
from hypothesis import given, settings
from hypothesis import strategies as st

from attncache_vllm.engine import step
from attncache_vllm.engine.lookups import NEIGHBOURS, OVERLAPS, Lookups
from attncache_vllm.engine.step import Hit
from attncache_vllm.errors import StoreError, StoreTimeout
from attncache_vllm.reuse.align import align
from attncache_vllm.reuse.codec import CODEC, encode_map
from attncache_vllm.reuse.feature import Projector
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.match import AlignedGate, AlignedMatch, nearest
from attncache_vllm.reuse.plan import Plan, Source, SourcePlan
from attncache_vllm.reuse.sketch import sketch
from attncache_vllm.reuse.tile_codec import encode_tiles
from attncache_vllm.store import (
    MAX_LENGTH,
    Neighbour,
    Overlap,
    Record,
    StoreHealth,
    StoreStats,
    token_hash,
)
from attncache_vllm.tenants import SHARED_TENANT, tenant_of

CAUSAL, BIDIRECTIONAL = MapLayout(4, 2, Mask()), MapLayout(4, 2, Mask(causal=False))
WINDOWED = MapLayout(4, 1, Mask(window=16))
GATE = 0.5
NUM_LAYERS = 4
# KV groups of all layers together, that of the windowed one included.
GROUPS = 7
Groups = tuple[tuple[int, ...], ...]
EVERY: Groups = ((), (), (0, 1), (0,))
EVERY_CAUSAL: Groups = ((), (), (0, 1), (0, 1))
PLAN = Plan(0, NUM_LAYERS, {"neighbour": SourcePlan(EVERY, GATE)})
LAYERS = PLAN.reused_layers
Layouts = dict[int, MapLayout]
LAYOUTS: Layouts = dict(zip(LAYERS, (CAUSAL, WINDOWED), strict=True))
with torch.random.fork_rng():  # the same weights, whatever ran before
    torch.manual_seed(0)
    PROJECTOR = Projector(hidden_size=6, slots=2, width=8, dim=3)
LENGTHS = {0: 20, 1: 24, 2: 24, 3: 40, 4: 64}


def make_probs(entry_id: int, layer: int, layout: MapLayout) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * entry_id + layer)
    length = LENGTHS[entry_id]
    scores = torch.randn(layout.num_heads, length, length, generator=generator)
    return scores.masked_fill(~layout.mask.visible(length), float("-inf")).softmax(-1).bfloat16()


def tokens_of(entry_id: int) -> np.ndarray:
    """Token ids of an entry, none of which another entry has."""
    return np.arange(1000 * entry_id, 1000 * entry_id + LENGTHS[entry_id], dtype=np.int32)


def make_lse(entry_id: int, layout: MapLayout) -> torch.Tensor:
    return torch.full((layout.num_heads, LENGTHS[entry_id]), float(entry_id))


def make_record(entry_id: int, layouts: Layouts) -> Record:
    return Record(
        token_hash=token_hash(tokens_of(entry_id)),
        length=LENGTHS[entry_id],
        codec=CODEC,
        pooled=np.zeros((2, 6), dtype=np.float32),
        maps={
            layer: encode_map(
                make_probs(entry_id, layer, layout),
                make_lse(entry_id, layout),
                layout.mask,
            ).numpy()
            for layer, layout in layouts.items()
        },
        token_ids=tokens_of(entry_id),
        sketch=sketch(tokens_of(entry_id)),
    )


def make_records(layouts: Layouts) -> dict[int, Record]:
    return {entry_id: make_record(entry_id, layouts) for entry_id in LENGTHS}


RECORDS = make_records(LAYOUTS)


class FakeStore:
    """A ``MapStore`` that answers ``answers``, ``overlapping`` and ``records``, and writes down how
    it was asked.

    ``fail`` names calls and what they raise; ``lookup`` waits until ``may_answer`` is set.
    """

    def __init__(self, answers: list[list[Neighbour]]) -> None:
        self.answers = answers
        self.overlapping: list[list[Overlap]] = []
        self.records: dict[int, Record | None] = dict(RECORDS)
        self.asked: list[dict[str, Any]] = []
        self.asked_overlaps: list[dict[str, Any]] = []
        self.read: list[list[int]] = []
        self.loaded: list[list[int]] = []
        self.fail: dict[str, Exception] = {}
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.troubles = StoreHealth({}, 0)

    def lookup(
        self,
        features: np.ndarray,
        lengths: Sequence[tuple[int, int]],
        *,
        tenants: Sequence[str],
        neighbours: int,
        deadline: float,
    ) -> list[list[Neighbour]]:
        self.asked.append(
            {
                "features": features,
                "lengths": list(lengths),
                "tenants": list(tenants),
                "neighbours": neighbours,
                "deadline": deadline,
            }
        )
        assert self.may_answer.wait(60)
        self._fail("lookup")
        return self.answers

    def overlaps(
        self,
        sketches: Sequence[np.ndarray],
        *,
        tenants: Sequence[str],
        neighbours: int,
        deadline: float,
    ) -> list[list[Overlap]]:
        self.asked_overlaps.append(
            {
                "sketches": list(sketches),
                "tenants": list(tenants),
                "neighbours": neighbours,
                "deadline": deadline,
            }
        )
        self._fail("overlaps")
        return self.overlapping

    def token_ids(self, entry_ids: Sequence[int], *, deadline: float) -> list[np.ndarray | None]:
        self.read.append(list(entry_ids))
        self._fail("token_ids")
        records = [self.records[entry_id] for entry_id in entry_ids]
        return [None if record is None else record.token_ids for record in records]

    def load(self, entry_ids: Sequence[int], *, deadline: float) -> list[Record | None]:
        self.loaded.append(list(entry_ids))
        self._fail("load")
        return [self.records[entry_id] for entry_id in entry_ids]

    def _fail(self, call: str) -> None:
        if call in self.fail:
            raise self.fail[call]

    def put(self, record: Record) -> int:
        raise AssertionError("serving does not write")

    def health(self) -> StoreHealth:
        return self.troubles

    def stats(self) -> StoreStats:
        raise AssertionError("not asked for by lookups")

    def close(self) -> None:
        raise AssertionError("not asked for by lookups")


def near(*entries: int, distance: float = 0.1) -> list[Neighbour]:
    return [Neighbour(entry_id, distance, LENGTHS[entry_id]) for entry_id in entries]


def make_lookups(
    store: FakeStore, plan: Plan = PLAN, layouts: Layouts = LAYOUTS, resident: int = 2**30
) -> Lookups:
    cpu = torch.device("cpu")
    return Lookups(store, PROJECTOR, plan, resident, layouts, GROUPS, cpu, lambda stored: stored)


@pytest.fixture
def store() -> FakeStore:
    return FakeStore([])


@pytest.fixture
def lookups(store: FakeStore) -> Iterator[Lookups]:
    lookups = make_lookups(store)
    yield lookups
    store.may_answer.set()
    lookups._thread.shutdown()


def pooled(rows: int) -> torch.Tensor:
    return torch.randn(rows, 2, 6, generator=torch.Generator().manual_seed(rows))


def unknown(lengths: Sequence[int]) -> list[step.Sequence]:
    """Sequences of which only the lengths are known, and whose they are."""
    return [
        step.Sequence(row, 100 * row, length, None, SHARED_TENANT)
        for row, length in enumerate(lengths)
    ]


def known(*ids: np.ndarray) -> list[step.Sequence]:
    """Sequences with their token ids."""
    return [
        step.Sequence(row, 100 * row, len(own), own, SHARED_TENANT) for row, own in enumerate(ids)
    ]


def of_tenants(
    sequences: list[step.Sequence], tenants: Sequence[str | None]
) -> list[step.Sequence]:
    return [replace(s, tenant=tenant) for s, tenant in zip(sequences, tenants, strict=True)]


def begin(lookups: Lookups, sequences: Sequence[int] | list[step.Sequence]) -> Future[Any]:
    asked = [s if isinstance(s, step.Sequence) else unknown([s])[0] for s in sequences]
    inputs = pooled(len(asked)) if lookups.uses_features else None
    future = lookups.start(asked, inputs, deadline=float("inf"))
    assert future is not None
    return future


def look_up(lookups: Lookups, sequences: Sequence[int] | list[step.Sequence]) -> list[Hit | None]:
    found: list[Hit | None] = begin(lookups, sequences).result(timeout=60)
    return found


def faults(kind: str) -> float:
    return counted("attncache_store_faults_total", kind=kind)


def assert_maps_of(
    hit: Hit | None,
    entry_id: int,
    layouts: Layouts = LAYOUTS,
    source: Source = "neighbour",
) -> None:
    assert hit is not None
    assert hit.source == source
    assert hit.served.keys() == layouts.keys()
    for layer, served in hit.served.items():
        layout, maps = layouts[layer], served.maps
        assert (served.source, maps.layout) == (source, layout)
        probs = make_probs(entry_id, layer, layout)
        probs.view(layout.num_kv_heads, -1, *probs.shape[1:])[
            [group for group in range(layout.num_kv_heads) if group not in maps.groups]
        ] = 0
        assert torch.equal(maps.to_dense(), probs)


def test_a_batch_is_one_lookup_and_one_load(store: FakeStore, lookups: Lookups) -> None:
    store.answers = [near(3), near(1), [], near(3)]
    features = pooled(4)
    future = lookups.start(unknown([30, 20, 17, 40]), features, deadline=12345.0)
    assert future is not None
    hits = future.result(timeout=60)
    [asked] = store.asked
    # A causal map serves every text that is not longer.
    assert asked["lengths"] == [(length, MAX_LENGTH) for length in (30, 20, 17, 40)]
    assert (asked["neighbours"], asked["deadline"]) == (NEIGHBOURS, 12345.0)
    assert asked["features"].dtype == np.float32
    assert asked["features"].flags.c_contiguous
    with torch.no_grad():
        np.testing.assert_allclose(asked["features"], PROJECTOR(features).numpy(), rtol=1e-4)
    assert store.loaded == [[1, 3]]
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

ENCODER: Layouts = dict.fromkeys(LAYERS, BIDIRECTIONAL)
ENCODER_RECORDS = make_records(ENCODER)


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


# -- entries that share tokens -----------------------------------------------------------------

# Novelty up to which edits are tolerated here.
NOVELTY = 0.3


def shared(sources: dict[Source, Groups], gate: float = NOVELTY) -> Plan:
    parts = {
        source: SourcePlan(groups, {"neighbour": GATE, "aligned": gate}.get(source, 0.0))
        for source, groups in sources.items()
    }
    return Plan(0, NUM_LAYERS, parts)


def edit(entry_id: int, *places: int) -> np.ndarray:
    """The tokens of an entry, other ones at these places."""
    ids = tokens_of(entry_id).copy()
    ids[list(places)] = 90_000 + np.arange(len(places))
    return ids


def overlap(*entries: int) -> list[Overlap]:
    return [Overlap(entry_id, 5, LENGTHS[entry_id]) for entry_id in entries]


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
    store: FakeStore,
) -> None:
    # Of entry 4 some tokens were edited; entries 3 and 0 share the beginning of one and the whole
    # of the other.
    first = edit(4, 20, 40, 41)
    second = np.append(tokens_of(3), np.arange(3, dtype=np.int32) + 77)
    store.overlapping = [overlap(3, 4), overlap(0, 3, 4), []]
    unrelated = np.arange(30, dtype=np.int32) + 50_000
    store.answers = [[]]
    plan = shared({"aligned": ((), (), (0, 1), (1,)), "neighbour": ((), (), (0, 1), ())})
    hits = hit_of(plan, store, first, second, unrelated)
    [asked] = store.asked_overlaps
    assert [s.tolist() for s in asked["sketches"]] == [
        sketch(ids).tolist() for ids in (first, second, unrelated)
    ]
    assert (asked["neighbours"], asked["deadline"]) == (OVERLAPS, float("inf"))
    assert store.read == [[0, 3, 4]]
    assert store.loaded == [[3, 4]]
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
    store: FakeStore, length: int
) -> None:
    # A window hides the same columns from the rows of both.
    layouts: Layouts = {2: CAUSAL, 3: WINDOWED}
    store.overlapping = [overlap(3)]
    plan = shared({"aligned": ((), (), (0, 1), ()), "prefix": ((), (), (), (0,))})
    [hit] = hit_of(plan, store, tokens_of(3)[:length], layouts=layouts)
    assert hit is not None
    assert {layer: served.source for layer, served in hit.served.items()} == {
        2: "aligned",
        3: "prefix",
    }
    assert [served.alignment for served in hit.served.values()] == [None, None]
    assert {served.maps.length for served in hit.served.values()} == {40}


def test_what_shares_tokens_comes_before_what_is_near(store: FakeStore) -> None:
    store.overlapping = [overlap(4), []]
    store.answers = [near(3)]
    plan = shared({"aligned": ((), (), (0, 1), ()), "neighbour": EVERY_CAUSAL})
    hits = hit_of(plan, store, edit(4, 20), edit(1, 1, 2, 3))
    assert [hit.source if hit else None for hit in hits] == ["aligned", "neighbour"]
    assert_maps_of(hits[1], 3, {2: CAUSAL, 3: CAUSAL})
    # Only the second is looked up by its feature, which is its own.
    [asked] = store.asked
    assert asked["lengths"] == [(24, MAX_LENGTH)]
    with torch.no_grad():
        first, second = PROJECTOR(pooled(2)).numpy()
    np.testing.assert_allclose(asked["features"], second[None], rtol=1e-3)
    assert np.abs(first - second).max() > 0.1


def test_an_entry_that_serves_fewer_rows_than_a_template_leaves_them_to_it(
    store: FakeStore,
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
        store.overlapping = [overlap(3)]
        sources: dict[Source, Groups] = {"aligned": aligned}
        if template is not None:
            sources["template"] = template
        [hit] = hit_of(shared(sources, gate=1.0), store, ids)
        assert (hit is not None) is served


def test_layers_that_tolerate_no_approximation_take_the_rows_of_the_common_prefix(
    store: FakeStore,
) -> None:
    store.overlapping = [overlap(4), overlap(4)]
    edited, other = edit(4, 40, 50), np.append(tokens_of(4)[:30], 5).astype(np.int32)
    plan = shared({"aligned": ((), (), (0, 1), ()), "prefix": ((), (), (), (0, 1))})
    first, second = hit_of(plan, store, edited, other)
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


def test_edits_beyond_the_gate_leave_the_common_prefix(store: FakeStore) -> None:
    layouts: Layouts = {1: CAUSAL, 2: CAUSAL, 3: CAUSAL}
    sources: dict[Source, Groups] = {
        "aligned": ((), (), (0, 1), ()),
        "prefix": ((), (0, 1), (), (0, 1)),
    }
    ids = edit(4, *range(24, 64, 3))
    store.overlapping = [overlap(4)]
    found = [hit_of(shared(sources, gate), store, ids, layouts=layouts)[0] for gate in (0.05, 0.2)]
    assert [(hit.source, set(hit.served)) for hit in found if hit] == [
        ("prefix", {1, 3}),
        ("aligned", {1, 2, 3}),
    ]
    # Fewer rows than are worth it: the other sources serve more.
    few: dict[Source, Groups] = {**sources, "prefix": ((), (), (), (0, 1))}
    assert hit_of(shared(few, 0.05), store, ids, layouts=layouts) == [None]


def test_a_window_that_is_shorter_than_either_text_leaves_the_layer_exact(
    store: FakeStore,
) -> None:
    # A window of 24: the entry of 24 tokens and a text of as many see all, one of 25 does not.
    wide = MapLayout(4, 2, Mask(window=24))
    layouts: Layouts = {2: CAUSAL, 3: wide}
    store.overlapping = [overlap(1), overlap(1), overlap(3)]
    longer = np.append(tokens_of(1), 7).astype(np.int32)
    plan = shared({"aligned": ((), (), (0, 1), (0, 1))})
    hits = hit_of(plan, store, edit(1, 12), longer, edit(3, 5)[:24], layouts=layouts)
    assert [hit.served.keys() if hit else None for hit in hits] == [{2, 3}, {2}, {2}]


def test_a_match_whose_layers_all_have_short_windows_is_no_hit(store: FakeStore) -> None:
    store.overlapping = [overlap(3)]
    store.answers = [near(4)]
    layouts: Layouts = {3: WINDOWED}
    plan = shared({"aligned": EVERY, "neighbour": EVERY})
    [hit] = hit_of(plan, store, edit(3, 12), layouts=layouts)
    assert_maps_of(hit, 4, layouts)


@pytest.mark.parametrize("other", [BIDIRECTIONAL, CAUSAL])
def test_with_a_bidirectional_layer_no_prefix_is_exact_and_the_first_token_is_computed(
    store: FakeStore, other: MapLayout
) -> None:
    layouts: Layouts = {2: BIDIRECTIONAL, 3: other}
    store.overlapping = [overlap(4)]
    ids = edit(4, 40)
    plan = shared({"aligned": ((), (), (0, 1), ()), "prefix": ((), (), (), (0, 1))})
    [hit] = hit_of(plan, store, ids, layouts=layouts)
    assert hit is not None
    assert hit.served.keys() == {2}
    match = matched(4, ids, 2 / GROUPS, 2 / GROUPS, causal=False)
    assert_same_alignment(hit.served[2], match.aligned)
    assert match.aligned is not None
    assert {0, 40, 63}.isdisjoint(match.aligned.rows.tolist())


def test_texts_whose_tokens_are_unknown_are_looked_up_by_feature_only(
    store: FakeStore, lookups: Lookups
) -> None:
    lookups = make_lookups(store, shared({"aligned": EVERY, "neighbour": EVERY}))
    store.answers = [near(3)]
    assert_maps_of(look_up(lookups, [20])[0], 3)
    assert store.asked_overlaps == []


def test_a_plan_without_neighbours_needs_no_features(store: FakeStore) -> None:
    lookups = make_lookups(store, shared({"aligned": EVERY}), {2: CAUSAL})
    assert not lookups.uses_features
    store.overlapping = [overlap(4)]
    future = lookups.start(known(edit(4, 20)), None, float("inf"))
    assert future is not None
    [hit] = future.result(timeout=60)
    lookups._thread.shutdown()
    assert hit is not None and hit.source == "aligned"
    assert store.asked == []


@pytest.mark.parametrize("damage", ["tokens", "maps"])
def test_a_damaged_candidate_leaves_the_sequence_to_the_next(store: FakeStore, damage: str) -> None:
    layouts: Layouts = {2: CAUSAL, 3: CAUSAL}
    plan = shared({"aligned": EVERY_CAUSAL, "neighbour": EVERY_CAUSAL}, gate=1.0)
    lookups = make_lookups(store, plan, layouts)
    store.records.update(make_records(layouts))
    store.overlapping, store.answers = [overlap(4, 3)], [near(3)]
    ids = np.concatenate([tokens_of(3)[:16], tokens_of(4)[:20]])
    assert_maps_of(look_up(lookups, known(ids))[0], 4, layouts, "aligned")
    lookups._thread.shutdown()

    lookups, before = make_lookups(store, plan, layouts), faults("damaged record")
    assert store.records[4] is not None
    store.records[4] = None if damage == "tokens" else other_model(store.records[4], layer=2)
    [hit] = look_up(lookups, known(ids))
    # Without its tokens it is no candidate; that its maps are damaged is known too late for the
    # next one to be aligned.
    assert_maps_of(hit, 3, layouts, "aligned" if damage == "tokens" else "neighbour")
    assert faults("damaged record") == before + (damage == "maps")
    lookups._thread.shutdown()


def test_maps_of_aligned_matches_stay_in_memory_apart_from_those_of_neighbours(
    store: FakeStore,
) -> None:
    plan = shared({"aligned": ((), (), (0,), (0, 1)), "neighbour": ((), (), (0, 1), ())})
    lookups = make_lookups(store, plan, {2: CAUSAL, 3: CAUSAL})
    store.records.update(make_records({2: CAUSAL, 3: CAUSAL}))
    store.overlapping, store.answers = [overlap(4), []], [near(4)]
    for _ in range(2):
        aligned, neighbour = look_up(lookups, known(edit(4, 20), edit(0, 1)))
        assert aligned is not None and neighbour is not None
        assert aligned.served[2].maps.groups == (0,)
        assert neighbour.served[2].maps.groups == (0, 1)
    lookups._thread.shutdown()
    assert store.loaded == [[4], [4]]


# -- tenants -----------------------------------------------------------------------------------

FIRST, SECOND = tenant_of("first"), tenant_of("second")


def test_each_sequence_is_looked_up_among_the_entries_of_its_tenant(store: FakeStore) -> None:
    layouts: Layouts = {2: CAUSAL, 3: CAUSAL}
    plan = shared({"aligned": EVERY_CAUSAL, "neighbour": EVERY_CAUSAL})
    lookups = make_lookups(store, plan, layouts)
    store.records.update(make_records(layouts))
    store.overlapping, store.answers = [[], overlap(4)], [near(3), near(1)]
    asked = of_tenants([*known(edit(3, 1), edit(4, 20)), *unknown([20])], [FIRST, SECOND, ""])
    hits = look_up(lookups, asked)
    lookups._thread.shutdown()
    [by_tokens], [by_feature] = store.asked_overlaps, store.asked
    assert by_tokens["tenants"] == [FIRST, SECOND]
    # The second has what it needs.
    assert by_feature["tenants"] == [FIRST, ""]
    assert [hit.source if hit else None for hit in hits] == ["neighbour", "aligned", "neighbour"]


def test_a_sequence_of_whom_nobody_knows_finds_nothing(store: FakeStore) -> None:
    lookups = make_lookups(store, shared({"aligned": EVERY, "neighbour": EVERY}))
    store.answers = [near(1)]
    asked = of_tenants([*known(edit(3, 1)), *unknown([20, 20])], [None, None, FIRST])
    hits = look_up(lookups, asked)
    assert store.asked_overlaps == []
    [by_feature] = store.asked
    assert by_feature["tenants"] == [FIRST]
    with torch.no_grad():
        own = PROJECTOR(pooled(3)).numpy()[2:]
    np.testing.assert_allclose(by_feature["features"], own, rtol=1e-3)
    assert hits[:2] == [None, None]
    assert_maps_of(hits[2], 1)
    # And asks for nothing.
    assert look_up(lookups, of_tenants(unknown([20]), [None])) == [None]
    lookups._thread.shutdown()
    assert len(store.asked) == 1


class OwnedStore(FakeStore):
    """Has every entry for the tenant that ``owners`` says, and answers with the nearest first."""

    owners: dict[int, str]

    def lookup(self, *args: Any, tenants: Sequence[str], **kwargs: Any) -> list[list[Neighbour]]:
        return [near(*self._of(tenant)) for tenant in tenants]

    def overlaps(self, *args: Any, tenants: Sequence[str], **kwargs: Any) -> list[list[Overlap]]:
        return [overlap(*self._of(tenant)) for tenant in tenants]

    def _of(self, tenant: str) -> list[int]:
        return [entry_id for entry_id, owner in self.owners.items() if owner == tenant]


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_no_sequence_is_ever_served_from_an_entry_of_another_tenant(data: st.DataObject) -> None:
    tenants = st.sampled_from([SHARED_TENANT, FIRST, SECOND])
    store = OwnedStore([])
    store.owners = {entry_id: data.draw(tenants) for entry_id in LENGTHS}
    layouts: Layouts = {2: CAUSAL, 3: CAUSAL}
    store.records.update(make_records(layouts))
    plan = shared({"aligned": EVERY_CAUSAL, "neighbour": EVERY_CAUSAL}, gate=1.0)
    lookups = make_lookups(store, plan, layouts)
    # Several batches, so that the second finds resident what the first has loaded.
    for _ in range(2):
        texts = data.draw(st.lists(st.sampled_from(sorted(LENGTHS)), min_size=1, max_size=6))
        asked = known(*(tokens_of(entry_id) for entry_id in texts))
        asked = of_tenants(asked, [data.draw(st.none() | tenants) for _ in texts])
        for sequence, hit in zip(asked, look_up(lookups, asked), strict=True):
            for served in hit.served.values() if hit else ():
                lse = served.maps.lse
                assert lse is not None
                [entry_id] = set(lse.flatten().tolist())
                assert store.owners[int(entry_id)] == sequence.tenant
    lookups._thread.shutdown()


# -- memory ------------------------------------------------------------------------------------


def test_maps_in_memory_are_not_loaded_again(store: FakeStore, lookups: Lookups) -> None:
    store.answers = [near(1), near(3)]
    first = look_up(lookups, [20, 20])
    store.answers = [near(3), near(4)]
    second = look_up(lookups, [20, 20])
    assert store.loaded == [[1, 3], [4]]
    assert first[1] is not None and second[0] is not None
    assert all(second[0].served[i].maps is first[1].served[i].maps for i in LAYERS)
    held = lookups.resident.stats()
    assert held.entries == 3
    assert held.bytes == sum(
        served.maps.nbytes for hit in (*first, second[1]) if hit for served in hit.served.values()
    )


def test_memory_for_maps_is_bounded_by_the_settings(store: FakeStore) -> None:
    lookups = make_lookups(store, resident=2 * 2**20)
    assert lookups.resident.max_bytes == 2 * 2**20
    lookups._thread.shutdown()


# -- faults ------------------------------------------------------------------------------------


def other_model(record: Record, layer: int | None = None) -> Record:
    """Whose maps, or that of one layer, have another size."""
    maps = {i: m[:-2] if layer in (None, i) else m for i, m in record.maps.items()}
    return replace(record, maps=maps)


def without_layer(record: Record, layer: int) -> Record:
    return replace(record, maps={k: m for k, m in record.maps.items() if k != layer})


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        replace(RECORDS[3], codec="other"),
        other_model(RECORDS[3]),
        without_layer(RECORDS[3], 3),
        ENCODER_RECORDS[3],
    ],
    ids=["gone", "other codec", "other size", "other layers", "other mask"],
)
def test_a_record_that_cannot_be_used_is_a_miss_of_its_sequences_only(
    store: FakeStore, lookups: Lookups, damaged: Record | None
) -> None:
    before = faults("damaged record")
    store.answers = [near(3), near(1), near(3)]
    store.records[3] = damaged
    hits = look_up(lookups, [20, 20, 20])
    assert hits[0] is hits[2] is None
    assert_maps_of(hits[1], 1)
    assert faults("damaged record") == before + 1
    # It is asked for again: what is damaged now may be mended by the next answer.
    store.records[3] = RECORDS[3]
    assert_maps_of(look_up(lookups, [20, 20, 20])[0], 3)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (StoreError("no such folder"), "unavailable"),
        (StoreTimeout("busy"), "late"),
        (RuntimeError("a bug"), "internal"),
    ],
)
@pytest.mark.parametrize("call", ["lookup", "load", "overlaps", "token_ids"])
def test_a_fault_reaches_the_step_is_counted_and_ends_with_its_cause(
    store: FakeStore, call: str, error: Exception, kind: str
) -> None:
    before = faults(kind)
    lookups = make_lookups(store, shared({"aligned": EVERY, "neighbour": EVERY}))
    store.answers, store.overlapping = [near(1)], [[]]
    store.fail[call] = error
    asked = known(tokens_of(0))
    future = begin(lookups, asked)
    assert future.exception(timeout=60) is error
    assert faults(kind) == before + 1
    store.fail.clear()
    assert_maps_of(look_up(lookups, asked)[0], 1)
    lookups._thread.shutdown()


def test_what_is_wrong_with_shards_is_published_after_every_lookup(
    store: FakeStore, lookups: Lookups
) -> None:
    def late() -> float:
        return counted("attncache_shard_faults_total", kind="late")

    before, store.answers = late(), [near(1)]
    store.troubles = StoreHealth({"late": 2}, 1)
    look_up(lookups, [20])
    assert (late() - before, counted("attncache_shards_out")) == (2, 1)
    store.fail["lookup"] = StoreError("none is left")
    store.troubles = StoreHealth({"late": 3}, 2)
    assert begin(lookups, [20]).exception(timeout=60)
    assert (late() - before, counted("attncache_shards_out")) == (3, 2)


def test_answers_that_do_not_fit_the_batch_are_a_fault(store: FakeStore, lookups: Lookups) -> None:
    before = faults("internal")
    store.answers = [near(1)]
    assert isinstance(begin(lookups, [20, 20]).exception(timeout=60), ValueError)
    assert faults("internal") == before + 1


def test_a_slow_store_gets_no_second_lookup_until_it_has_answered(
    store: FakeStore, lookups: Lookups
) -> None:
    store.answers = [near(1)]
    store.may_answer.clear()
    slow = begin(lookups, [20])
    assert lookups.start(unknown([20]), pooled(1), deadline=float("inf")) is None
    assert lookups.start(unknown([20]), pooled(1), deadline=float("inf")) is None
    store.may_answer.set()
    assert_maps_of(slow.result(timeout=60)[0], 1)
    assert_maps_of(look_up(lookups, [20])[0], 1)
    assert len(store.asked) == 2


class CountingStore(FakeStore):
    """Writes down how many threads torch would use for what a lookup computes."""

    def lookup(self, *args: Any, **kwargs: Any) -> list[list[Neighbour]]:
        self.threads = torch.get_num_threads()
        return super().lookup(*args, **kwargs)


@pytest.fixture
def many_threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_a_lookup_computes_with_a_thread_of_its_own_and_leaves_the_others_theirs(
    many_threads: int,
) -> None:
    store = CountingStore([[]])
    lookups = make_lookups(store)
    look_up(lookups, [20])
    assert store.threads == 1
    assert torch.get_num_threads() == many_threads
    with ThreadPoolExecutor(1) as another:
        assert another.submit(torch.get_num_threads).result() == many_threads
    lookups._thread.shutdown()
