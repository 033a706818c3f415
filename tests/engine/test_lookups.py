# SPDX-License-Identifier: Apache-2.0
"""Lookups beside the forward pass, against a store whose every answer is set by the test."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import batch, counted
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.forward_context import ForwardContext, override_forward_context

from attncache_vllm.config import Settings
from attncache_vllm.engine.runtime import NEIGHBOURS, Lookups, Serving
from attncache_vllm.engine.step import Hit, Step
from attncache_vllm.errors import StoreError, StoreTimeout
from attncache_vllm.reuse.apply import RowBlocks, crop
from attncache_vllm.reuse.codec import CODEC, encode_map
from attncache_vllm.reuse.feature import Projector, pool_tokens
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.match import choose
from attncache_vllm.reuse.plan import LayerPlan, Plan
from attncache_vllm.store import MAX_LENGTH, Neighbour, Record, StoreStats

CAUSAL, BIDIRECTIONAL = MapLayout(4, 2, Mask()), MapLayout(4, 2, Mask(causal=False))
WINDOWED = MapLayout(4, 1, Mask(window=16))
GATE = 0.5
# The widest gate of a layer with reuse decides what is loaded; that of an exact layer does not.
PLAN = Plan(
    0,
    (
        LayerPlan("exact", 9.0),
        LayerPlan("exact"),
        LayerPlan("cached", GATE),
        LayerPlan("cached", GATE / 2),
    ),
)
LAYERS = PLAN.reused_layers
Layouts = dict[int, MapLayout]
LAYOUTS: Layouts = dict(zip(LAYERS, (CAUSAL, WINDOWED), strict=True))
PROJECTOR = Projector(hidden_size=6, slots=2, width=8, dim=3)
LENGTHS = {0: 20, 1: 24, 2: 24, 3: 40, 4: 64}


def make_probs(entry_id: int, layer: int, layout: MapLayout) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * entry_id + layer)
    length = LENGTHS[entry_id]
    scores = torch.randn(layout.num_heads, length, length, generator=generator)
    return scores.masked_fill(~layout.mask.visible(length), float("-inf")).softmax(-1).bfloat16()


def make_record(entry_id: int, layouts: Layouts) -> Record:
    return Record(
        token_hash=bytes([entry_id]) * 32,
        length=LENGTHS[entry_id],
        codec=CODEC,
        pooled=np.zeros((2, 6), dtype=np.float32),
        maps={
            layer: encode_map(make_probs(entry_id, layer, layout), layout.mask).numpy()
            for layer, layout in layouts.items()
        },
    )


def make_records(layouts: Layouts) -> dict[int, Record]:
    return {entry_id: make_record(entry_id, layouts) for entry_id in LENGTHS}


RECORDS = make_records(LAYOUTS)


class FakeStore:
    """A ``MapStore`` that answers ``answers`` and ``records``, and writes down how it was asked.

    ``fail_lookup`` and ``fail_load`` are raised; ``lookup`` waits until ``may_answer`` is set.
    """

    def __init__(self, answers: list[list[Neighbour]]) -> None:
        self.answers = answers
        self.records: dict[int, Record | None] = dict(RECORDS)
        self.asked: list[dict[str, Any]] = []
        self.loaded: list[list[int]] = []
        self.fail_lookup: Exception | None = None
        self.fail_load: Exception | None = None
        self.may_answer = threading.Event()
        self.may_answer.set()

    def lookup(
        self,
        features: np.ndarray,
        lengths: Sequence[tuple[int, int]],
        *,
        neighbours: int,
        deadline: float,
    ) -> list[list[Neighbour]]:
        self.asked.append(
            {
                "features": features,
                "lengths": list(lengths),
                "neighbours": neighbours,
                "deadline": deadline,
            }
        )
        assert self.may_answer.wait(60)
        if self.fail_lookup is not None:
            raise self.fail_lookup
        return self.answers

    def load(self, entry_ids: Sequence[int], *, deadline: float) -> list[Record | None]:
        self.loaded.append(list(entry_ids))
        if self.fail_load is not None:
            raise self.fail_load
        return [self.records[entry_id] for entry_id in entry_ids]

    def put(self, record: Record) -> int:
        raise AssertionError("serving does not write")

    def stats(self) -> StoreStats:
        raise AssertionError("not asked for by lookups")

    def close(self) -> None:
        raise AssertionError("not asked for by lookups")


def near(*entries: int, distance: float = 0.1) -> list[Neighbour]:
    return [Neighbour(entry_id, distance, LENGTHS[entry_id]) for entry_id in entries]


def make_lookups(
    store: FakeStore, plan: Plan = PLAN, layouts: Layouts = LAYOUTS, **changes: Any
) -> Lookups:
    given = Settings(store=Path("maps")).model_copy(update=changes)
    return Lookups(store, PROJECTOR, plan, given, layouts, torch.device("cpu"))


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


def begin(lookups: Lookups, lengths: list[int]) -> Future[list[Hit | None]]:
    future = lookups.start(pooled(len(lengths)), lengths, deadline=float("inf"))
    assert future is not None
    return future


def look_up(lookups: Lookups, lengths: list[int]) -> list[Hit | None]:
    return begin(lookups, lengths).result(timeout=60)


def faults(kind: str) -> float:
    return counted("attncache_store_faults_total", kind=kind)


def assert_maps_of(hit: Hit | None, entry_id: int, layouts: Layouts = LAYOUTS) -> None:
    assert hit is not None
    assert hit.match.entry_id == entry_id
    assert hit.maps.keys() == layouts.keys()
    for layer, maps in hit.maps.items():
        assert torch.equal(maps.to_dense(), make_probs(entry_id, layer, layouts[layer]))
        assert maps.layout == layouts[layer]


def test_a_batch_is_one_lookup_and_one_load(store: FakeStore, lookups: Lookups) -> None:
    store.answers = [near(3), near(1), [], near(3)]
    features = pooled(4)
    future = lookups.start(features, [30, 20, 17, 40], deadline=12345.0)
    assert future is not None
    hits = future.result(timeout=60)
    [asked] = store.asked
    # A causal map serves every text that is not longer.
    assert asked["lengths"] == [(length, MAX_LENGTH) for length in (30, 20, 17, 40)]
    assert (asked["neighbours"], asked["deadline"]) == (NEIGHBOURS, 12345.0)
    assert asked["features"].dtype == np.float32
    assert asked["features"].flags.c_contiguous
    with torch.no_grad():
        np.testing.assert_allclose(asked["features"], PROJECTOR(features).numpy(), rtol=1e-6)
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
        chosen = choose(found, length, GATE, longer=True)
        assert (hit.match if hit else None) == chosen
        if chosen is not None:
            assert_maps_of(hit, chosen.entry_id)


# -- lengths that bidirectional maps serve -----------------------------------------------------

ENCODER: Layouts = dict.fromkeys(LAYERS, BIDIRECTIONAL)
ENCODER_RECORDS = make_records(ENCODER)


def cropping(*layers: int) -> Plan:
    return replace(
        PLAN,
        layers=tuple(
            replace(layer, crop=index in layers) for index, layer in enumerate(PLAN.layers)
        ),
    )


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
        chosen = choose(found, length, GATE, longer=False)
        assert (hit.match if hit else None) == chosen
        if chosen is not None:
            assert_maps_of(hit, chosen.entry_id, ENCODER)


@settings(deadline=None, max_examples=30)
@given(queries, st.sampled_from([(2,), (3,), LAYERS]))
def test_longer_bidirectional_maps_serve_the_layers_whose_plan_crops(
    queries: Queries, crops: tuple[int, ...]
) -> None:
    store = encoder_store()
    hits = answered(store, make_lookups(store, cropping(*crops), ENCODER), queries)
    [asked] = store.asked
    assert asked["lengths"] == [(length, MAX_LENGTH) for length, _ in queries]
    for hit, (length, found) in zip(hits, queries, strict=True):
        chosen = choose(found, length, GATE, longer=True)
        assert (hit.match if hit else None) == chosen
        if chosen is None:
            continue
        assert hit is not None
        if chosen.entry_length == length:
            assert_maps_of(hit, chosen.entry_id, ENCODER)
            continue
        assert hit.maps.keys() == set(crops)
        for layer, maps in hit.maps.items():
            assert_cropped(maps, make_probs(chosen.entry_id, layer, BIDIRECTIONAL), length)


def assert_cropped(maps: RowBlocks, probs: torch.Tensor, length: int) -> None:
    assert maps.length == length
    left = probs[:, :length, :length].float()
    expected = left / left.sum(-1, keepdim=True)
    torch.testing.assert_close(maps.to_dense().float(), expected, rtol=2**-8, atol=0)


def test_the_maps_in_memory_stay_whole_when_they_are_cropped() -> None:
    store = encoder_store()
    lookups = make_lookups(store, cropping(*LAYERS), ENCODER)
    store.answers = [near(3), near(3)]
    short, equal = look_up(lookups, [25, 40])
    lookups._thread.shutdown()
    assert_maps_of(equal, 3, ENCODER)
    assert short is not None and equal is not None
    for layer in LAYERS:
        expected = crop(equal.maps[layer], 25).to_dense()
        assert torch.equal(short.maps[layer].to_dense(), expected)


def test_of_a_model_with_both_kinds_of_layers_a_longer_entry_serves_the_causal_ones() -> None:
    layouts: Layouts = {2: BIDIRECTIONAL, 3: CAUSAL}
    store = FakeStore([near(3), near(3)])
    store.records.update(make_records(layouts))
    lookups = make_lookups(store, layouts=layouts)
    short, equal = look_up(lookups, [25, 40])
    lookups._thread.shutdown()
    assert store.asked[0]["lengths"] == [(25, MAX_LENGTH), (40, MAX_LENGTH)]
    assert short is not None
    assert short.maps.keys() == {3}
    assert torch.equal(short.maps[3].to_dense(), make_probs(3, 3, CAUSAL))
    assert_maps_of(equal, 3, layouts)


def test_only_layers_with_reuse_in_this_engine_count() -> None:
    # The plan's layer 2, whose gate is the widest, is bypassed here, and its maps are not decoded.
    layouts: Layouts = {3: WINDOWED}
    store = FakeStore([near(1, distance=0.9 * GATE), near(3, distance=GATE / 2)])
    lookups = make_lookups(store, layouts=layouts)
    far, close = look_up(lookups, [20, 20])
    lookups._thread.shutdown()
    assert far is None
    assert_maps_of(close, 3, layouts)
    assert store.loaded == [[3]]


# -- memory ------------------------------------------------------------------------------------


def test_maps_in_memory_are_not_loaded_again(store: FakeStore, lookups: Lookups) -> None:
    store.answers = [near(1), near(3)]
    first = look_up(lookups, [20, 20])
    store.answers = [near(3), near(4)]
    second = look_up(lookups, [20, 20])
    assert store.loaded == [[1, 3], [4]]
    assert first[1] is not None and second[0] is not None
    assert all(second[0].maps[layer] is first[1].maps[layer] for layer in LAYERS)
    held = lookups.resident.stats()
    assert held.entries == 3
    assert held.bytes == sum(
        maps.nbytes for hit in (*first, second[1]) if hit for maps in hit.maps.values()
    )


def test_memory_for_maps_is_bounded_by_the_settings(store: FakeStore) -> None:
    lookups = make_lookups(store, resident_mib=2)
    assert lookups.resident.max_bytes == 2 * 2**20
    lookups._thread.shutdown()


# -- faults ------------------------------------------------------------------------------------


def other_model(record: Record) -> Record:
    return replace(record, maps={layer: m[:-2] for layer, m in record.maps.items()})


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
@pytest.mark.parametrize("call", ["fail_lookup", "fail_load"])
def test_a_fault_reaches_the_step_is_counted_and_ends_with_its_cause(
    store: FakeStore, lookups: Lookups, call: str, error: Exception, kind: str
) -> None:
    before = faults(kind)
    store.answers = [near(1)]
    setattr(store, call, error)
    future = begin(lookups, [20])
    assert future.exception(timeout=60) is error
    assert faults(kind) == before + 1
    setattr(store, call, None)
    assert_maps_of(look_up(lookups, [20])[0], 1)


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
    assert lookups.start(pooled(1), [20], deadline=float("inf")) is None
    assert lookups.start(pooled(1), [20], deadline=float("inf")) is None
    store.may_answer.set()
    assert_maps_of(slow.result(timeout=60)[0], 1)
    assert_maps_of(look_up(lookups, [20])[0], 1)
    assert len(store.asked) == 2


# -- a step from the feature layer on ----------------------------------------------------------

FEATURE_LAYER = "model.layers.0.self_attn.attn"


def make_serving(lookups: Lookups, **changes: Any) -> Serving:
    # The deadline is not what these tests are about, whatever else the machine does.
    update = {"min_tokens": 4, "lookup_deadline_ms": 60_000.0, **changes}
    given = Settings(store=Path("maps")).model_copy(update=update)
    return Serving(PLAN, lookups, given, PROJECTOR.slots, FEATURE_LAYER)


def observe(serving: Serving, metadata: Any, hidden_states: torch.Tensor) -> Step | None:
    context = ForwardContext(
        no_compile_layers={}, attn_metadata={FEATURE_LAYER: metadata}, slot_mapping={}
    )
    with override_forward_context(context):
        serving.observe(hidden_states)
        return serving.current()


def hidden(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, 6, generator=torch.Generator().manual_seed(tokens)).bfloat16()


def test_whole_sequences_that_are_long_enough_are_looked_up_and_the_others_bypassed(
    store: FakeStore, lookups: Lookups
) -> None:
    store.answers = [near(1), near(4)]
    serving = make_serving(lookups)
    # Whole but short, whole, the end of a longer one, padding, whole, the beginning of another.
    metadata = batch(
        [3, 5, 6, 0, 4, 7], context=[3, 5, 16, 0, 4, 7], prompts=[3, 5, 16, 0, 4, 9], padding=2
    )
    states = hidden(25 + 2)
    step = observe(serving, metadata, states)
    assert step is not None
    assert step.maps_for(2).keys() == {1, 4}
    [asked] = store.asked
    assert asked["lengths"] == [(5, MAX_LENGTH), (4, MAX_LENGTH)]
    expected = torch.stack([pool_tokens(states[3:8], 2), pool_tokens(states[14:18], 2)])
    with torch.no_grad():
        np.testing.assert_allclose(asked["features"], PROJECTOR(expected.half()).numpy(), rtol=1e-6)
    assert serving.outcomes.sequences == {"hit": 2, "bypass": 2}
    assert serving.outcomes.reasons == {
        "bypass: only a part of the prompt in the step": 1,
        "bypass: shorter than min_tokens": 1,
    }


def test_a_step_with_nothing_to_look_up_asks_no_store(store: FakeStore, lookups: Lookups) -> None:
    serving = make_serving(lookups)
    step = observe(serving, batch([3, 2]), hidden(5))
    assert step is not None
    assert step.maps_for(2) == {}
    assert store.asked == []
    assert serving.outcomes.sequences == {"bypass": 2}


def test_a_step_during_a_slow_lookup_misses_at_once(store: FakeStore, lookups: Lookups) -> None:
    store.answers = [near(1)]
    store.may_answer.clear()
    serving = make_serving(lookups)
    slow = observe(serving, batch([5]), hidden(5))
    meanwhile = observe(serving, batch([5, 6]), hidden(11))
    assert slow is not None and meanwhile is not None
    assert meanwhile.maps_for(2) == {}
    assert serving.outcomes.reasons == {"miss: lookup still running": 2}
    store.may_answer.set()
    assert slow.maps_for(2).keys() == {0}
    assert serving.outcomes.sequences == {"hit": 1, "miss": 2}


def test_a_store_that_is_slower_than_the_deadline_is_a_miss(
    store: FakeStore, lookups: Lookups
) -> None:
    store.may_answer.clear()
    serving = make_serving(lookups, lookup_deadline_ms=20.0)
    step = observe(serving, batch([5]), hidden(5))
    assert step is not None
    assert step.maps_for(2) == {}
    assert serving.outcomes.reasons == {"miss: late": 1}


def test_there_is_no_step_while_vllm_profiles(store: FakeStore, lookups: Lookups) -> None:
    serving = make_serving(lookups)
    context = ForwardContext(no_compile_layers={}, attn_metadata=None, slot_mapping={})
    with override_forward_context(context):
        serving.observe(hidden(5))
        assert serving.current() is None
    assert store.asked == []
