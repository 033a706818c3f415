# SPDX-License-Identifier: Apache-2.0
"""A step from the feature layer on: what is looked up, which source serves whom, what is counted.

The lookup's answers are set by the test; templates, canaries and the step are the real ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from batches import batch, counted
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.forward_context import ForwardContext, override_forward_context

from attncache_vllm.config import Settings
from attncache_vllm.engine import compat, step
from attncache_vllm.engine.canary import Canaries
from attncache_vllm.engine.costs import Cost, Costs
from attncache_vllm.engine.runtime import Serving
from attncache_vllm.engine.step import Hit, Recording, Served, Step
from attncache_vllm.errors import StoreError, StoreTimeout
from attncache_vllm.reuse.align import Alignment
from attncache_vllm.reuse.feature import pool_tokens
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.maps import RowBlocks
from attncache_vllm.reuse.plan import Plan, Source, SourcePlan
from attncache_vllm.reuse.template import Templates
from attncache_vllm.tenants import SHARED_TENANT, tenant_of

FEATURE_LAYER = "model.layers.0.self_attn.attn"
SLOTS = 2
NUM_LAYERS, KV_HEADS = 5, 2
GROUPS = NUM_LAYERS * KV_HEADS
LAYOUT = MapLayout(4, KV_HEADS, Mask())
# Layers 1 and 3 have templates, of up to 12 tokens.
TEMPLATE_GROUPS = {1: (0,), 3: (0, 1)}
LONGEST = 12


def make_maps(length: int, groups: tuple[int, ...] = (0, 1)) -> RowBlocks:
    return RowBlocks(LAYOUT, length, groups, ())


TEMPLATES = Templates({i: {LONGEST: make_maps(LONGEST, g)} for i, g in TEMPLATE_GROUPS.items()})
NO_TEMPLATES = Templates({})


def served_by(source: Source, groups: Mapping[int, tuple[int, ...]]) -> Hit:
    return Hit(source, {i: Served(source, make_maps(64, own)) for i, own in groups.items()})


def neighbour() -> Hit:
    return served_by("neighbour", {2: (0, 1), 4: (1,)})


class FakeLookups:
    """Answers ``answer``, a list of hits, an exception, None while busy, or a future."""

    def __init__(self, answer: Any = None, uses_features: bool = True) -> None:
        self.answer = answer
        self.uses_features = uses_features
        self.asked: list[SimpleNamespace] = []

    def start(
        self, sequences: list[step.Sequence], pooled: torch.Tensor | None, deadline: float
    ) -> Future[list[Hit | None]] | None:
        self.asked.append(SimpleNamespace(sequences=sequences, pooled=pooled, deadline=deadline))
        if self.answer is None or isinstance(self.answer, Future):
            return self.answer
        future: Future[list[Hit | None]] = Future()
        if isinstance(self.answer, Exception):
            future.set_exception(self.answer)
        else:
            future.set_result(self.answer)
        return future


class FakeAdmissions:
    """Records what has token ids, if it is ``willing``."""

    def __init__(self, willing: bool = True) -> None:
        self.willing = willing
        self.begun: list[Recording] = []

    def ready(self) -> bool:
        return self.willing

    def begin(self, sequence: step.Sequence, pooled: torch.Tensor) -> Recording | None:
        if sequence.token_ids is None:
            return None
        self.begun.append(Recording(sequence, pooled))
        return self.begun[-1]


def make_canaries(share: float = 0.0) -> Canaries:
    every = tuple((0, 1) for _ in range(NUM_LAYERS))
    sources: tuple[Source, ...] = ("aligned", "neighbour", "template")
    plan = Plan(0, NUM_LAYERS, {source: SourcePlan(every) for source in sources})
    return Canaries(plan, share, lambda: 0, "attncache rearm")


def make_serving(
    lookups: FakeLookups | None,
    templates: Templates = NO_TEMPLATES,
    canaries: Canaries | None = None,
    admissions: FakeAdmissions | None = None,
    **changes: Any,
) -> Serving:
    # The deadline is not what these tests are about, whatever else the machine does.
    update = {"min_tokens": 4, "lookup_deadline_ms": 60_000.0, **changes}
    given = Settings(store=Path("maps")).model_copy(update=update)
    any_lookups: Any = lookups
    any_admissions: Any = admissions
    sources: tuple[Source, ...] = ("aligned", "neighbour", "template")
    return Serving(
        any_lookups,
        templates,
        canaries or make_canaries(),
        given,
        SLOTS,
        FEATURE_LAYER,
        GROUPS,
        sources,
        any_admissions,
    )


def observe(serving: Serving, metadata: Any, hidden_states: torch.Tensor) -> Step:
    context = ForwardContext(
        no_compile_layers={}, attn_metadata={FEATURE_LAYER: metadata}, slot_mapping={}
    )
    with override_forward_context(context):
        serving.observe(hidden_states)
        current = serving.current()
        assert current is not None
        return current


def hidden(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, 6, generator=torch.Generator().manual_seed(tokens)).bfloat16()


def begin(serving: Serving, lengths: Sequence[int]) -> Step:
    return observe(serving, batch(lengths), hidden(sum(lengths)))


def sources_of(found: Step) -> list[dict[int, Source]]:
    """For each layer who is served from where, by row."""
    return [
        {row: item.source for row, item in found.served(layer).items()}
        for layer in range(NUM_LAYERS)
    ]


class Rows:
    """What the counters of map rows grow by."""

    def __init__(self) -> None:
        self._before = self._now()

    @property
    def since(self) -> tuple[float, float]:
        """Reused and computed."""
        reused, computed = (b - a for a, b in zip(self._before, self._now(), strict=True))
        return reused, computed

    def _now(self) -> list[float]:
        return [counted("attncache_map_rows_total", kind=kind) for kind in ("reused", "computed")]


# -- what is looked up -------------------------------------------------------------------------


def test_whole_sequences_that_are_long_enough_are_looked_up_and_the_others_bypassed() -> None:
    lookups = FakeLookups([neighbour(), neighbour()])
    serving, rows = make_serving(lookups), Rows()
    ids = np.arange(4, dtype=np.int32)
    # Whole but short, whole, the end of a longer one, padding, whole, the beginning of another.
    metadata = batch(
        [3, 5, 6, 0, 4, 7],
        context=[3, 5, 16, 0, 4, 7],
        prompts=[3, 5, 16, 0, compat.Prompt(4, ids), 9],
        padding=2,
    )
    states = hidden(25 + 2)
    found = observe(serving, metadata, states)
    assert found.served(2).keys() == {1, 4}
    [asked] = lookups.asked
    assert [(s.row, s.start, s.length) for s in asked.sequences] == [(1, 3, 5), (4, 14, 4)]
    assert [s.token_ids for s in asked.sequences] == [None, ids]
    expected = torch.stack([pool_tokens(states[3:8], SLOTS), pool_tokens(states[14:18], SLOTS)])
    # As a store keeps them.
    assert torch.equal(asked.pooled, expected.half().float())
    assert serving.outcomes.sequences == {"hit": 2, "bypass": 2}
    assert serving.outcomes.reasons == {
        "hit: neighbour": 2,
        "bypass: only a part of the prompt in the step": 1,
        "bypass: shorter than min_tokens": 1,
    }
    # Three groups of both hits; parts of prompts are in neither.
    assert rows.since == (3 * 9, GROUPS * (3 + 9) - 3 * 9)


def test_whose_a_sequence_is_goes_with_it_and_without_a_salt_it_may_be_refused() -> None:
    salted = tenant_of("secret")
    tenants = [SHARED_TENANT, salted, None, SHARED_TENANT]
    prompts = [
        compat.Prompt(length, None, t) for length, t in zip((5, 6, 7, 3), tenants, strict=True)
    ]
    metadata, states = batch([5, 6, 7, 3], prompts=prompts), hidden(21)

    lookups = FakeLookups([None] * 3)
    serving = make_serving(lookups)
    observe(serving, metadata, states).served(2)
    [asked] = lookups.asked
    assert [(s.row, s.tenant) for s in asked.sequences] == list(enumerate(tenants[:3]))
    assert serving.outcomes.reasons == {
        "miss: nothing close enough": 3,
        "bypass: shorter than min_tokens": 1,
    }

    # Templates are for everybody who may be served at all.
    lookups, rows = FakeLookups([None] * 2), Rows()
    serving = make_serving(lookups, TEMPLATES, unsalted="off")
    assert sources_of(observe(serving, metadata, states))[1] == {1: "template", 2: "template"}
    [asked] = lookups.asked
    assert [(s.row, s.tenant) for s in asked.sequences] == [(1, salted), (2, None)]
    assert serving.outcomes.reasons == {"hit: template": 2, "bypass: no cache_salt": 2}
    reused, computed = rows.since
    assert reused + computed == GROUPS * 21


def test_nothing_is_pooled_if_no_feature_is_looked_at() -> None:
    lookups = FakeLookups([None], uses_features=False)
    begin(make_serving(lookups), [5])
    assert lookups.asked[0].pooled is None


def test_a_step_with_nothing_to_look_up_asks_no_store() -> None:
    lookups = FakeLookups([])
    serving = make_serving(lookups, TEMPLATES)
    assert sources_of(begin(serving, [3, 2])) == [{}] * NUM_LAYERS
    assert lookups.asked == []
    assert serving.outcomes.sequences == {"bypass": 2}


def test_there_is_no_step_while_vllm_profiles() -> None:
    lookups = FakeLookups([])
    serving = make_serving(lookups)
    context = ForwardContext(no_compile_layers={}, attn_metadata=None, slot_mapping={})
    with override_forward_context(context):
        serving.observe(hidden(5))
        assert serving.current() is None
    assert lookups.asked == []


# -- which source serves whom ------------------------------------------------------------------


def test_what_was_found_comes_before_the_template_which_serves_the_rest() -> None:
    serving = make_serving(FakeLookups([neighbour(), None, None]), TEMPLATES)
    found = begin(serving, [5, 6, LONGEST + 1])
    # Layers that the neighbour does not serve are exact: one source for a sequence.
    assert sources_of(found) == [
        {},
        {1: "template"},
        {0: "neighbour"},
        {1: "template"},
        {0: "neighbour"},
    ]
    assert found.served(1)[1].maps is TEMPLATES.get(1, 6)
    assert serving.outcomes.reasons == {
        "hit: neighbour": 1,
        "hit: template": 1,
        "miss: nothing close enough": 1,
    }


def test_layers_may_take_rows_of_one_entry_under_different_rules() -> None:
    hit = Hit("aligned", {2: Served("aligned", make_maps(64)), 4: Served("prefix", make_maps(64))})
    serving = make_serving(FakeLookups([hit]), TEMPLATES)
    assert sources_of(begin(serving, [5])) == [{}, {}, {0: "aligned"}, {}, {0: "prefix"}]
    assert serving.outcomes.reasons == {"hit: aligned": 1}


@pytest.mark.parametrize(
    ("answer", "reason", "deadline_ms"),
    [
        (None, "lookup still running", 60_000.0),
        (Future(), "late", 5.0),
        (StoreTimeout("busy"), "late", 60_000.0),
        (StoreError("gone"), "store fault", 60_000.0),
        (RuntimeError("a bug"), "store fault", 60_000.0),
    ],
    ids=["busy", "slow", "late", "gone", "bug"],
)
def test_templates_serve_when_the_lookup_does_not(
    answer: Any, reason: str, deadline_ms: float
) -> None:
    before = counted("attncache_misses_total", reason=reason)
    for templates, outcomes in (
        (NO_TEMPLATES, {f"miss: {reason}": 2}),
        (TEMPLATES, {"hit: template": 1, f"miss: {reason}": 1}),
    ):
        serving = make_serving(FakeLookups(answer), templates, lookup_deadline_ms=deadline_ms)
        found = begin(serving, [5, LONGEST + 1])
        assert found.served(3).keys() == ({0} if templates is TEMPLATES else set())
        assert serving.outcomes.reasons == outcomes
    assert counted("attncache_misses_total", reason=reason) == before + 3


def test_a_plan_of_templates_only_looks_nothing_up() -> None:
    serving = make_serving(None, TEMPLATES)
    found = begin(serving, [5, 3, LONGEST, LONGEST + 1])
    assert sources_of(found) == [{}, both := {0: "template", 2: "template"}, {}, both, {}]
    assert serving.outcomes.reasons == {
        "hit: template": 2,
        "bypass: shorter than min_tokens": 1,
        "miss: nothing close enough": 1,
    }


# -- recording ---------------------------------------------------------------------------------


def known(lengths: Sequence[int]) -> Any:
    """A step of prompts whose token ids are known."""
    prompts = [compat.Prompt(n, np.arange(n, dtype=np.int32), SHARED_TENANT) for n in lengths]
    return batch(lengths, prompts=prompts)


@pytest.mark.parametrize("uses_features", [True, False])
def test_the_first_text_that_no_entry_serves_is_recorded_and_nothing_serves_it(
    uses_features: bool,
) -> None:
    lookups, admissions = FakeLookups([neighbour(), None, None], uses_features), FakeAdmissions()
    serving, rows = make_serving(lookups, TEMPLATES, admissions=admissions), Rows()
    states = hidden(18)
    found = observe(serving, known([5, 6, 7]), states)
    assert found.recording is None  # no layer has asked yet
    assert sources_of(found)[1:3] == [{2: "template"}, {0: "neighbour"}]
    [recording] = admissions.begun
    assert found.recording is recording
    assert recording.sequence.row == 1
    assert torch.equal(recording.pooled, pool_tokens(states[5:11], SLOTS).half().float())
    assert (lookups.asked[0].pooled is None) == (not uses_features)
    assert serving.outcomes.reasons == {
        "miss: recorded": 1,
        "hit: neighbour": 1,
        "hit: template": 1,
    }
    assert rows.since == (3 * 5 + 3 * 7, GROUPS * 18 - 3 * 5 - 3 * 7)


@pytest.mark.parametrize("answer", [None, StoreTimeout("busy"), StoreError("gone")])
def test_a_text_is_not_recorded_while_nobody_knows_whether_it_is_stored(answer: Any) -> None:
    admissions = FakeAdmissions()
    serving = make_serving(FakeLookups(answer), TEMPLATES, admissions=admissions)
    assert sources_of(observe(serving, known([5]), hidden(5)))[1] == {0: "template"}
    assert admissions.begun == []


def test_a_text_is_not_recorded_where_maps_of_entries_would_not_pay_at_its_length() -> None:
    admissions = FakeAdmissions()
    serving = make_serving(FakeLookups([None, None]), TEMPLATES, admissions=admissions)
    dear = [Cost(5, 1.0, 9.0, 0.0), Cost(10, 9.0, 1.0, 0.0)]
    cheap = [Cost(5, 9.0, 1.0, 0.0), Cost(10, 9.0, 1.0, 0.0)]
    measured: Any = {(1, manner): dear for manner in ("aligned", "neighbour", "own")}
    serving.costs = Costs({**measured, (1, "template"): cheap})
    found = observe(serving, known([5, 10]), hidden(15))
    assert sources_of(found)[1] == {0: "template"}
    assert [r.sequence.length for r in admissions.begun] == [10]


def test_nothing_is_pooled_for_a_recording_that_is_not_due() -> None:
    lookups = FakeLookups([None], uses_features=False)
    serving = make_serving(lookups, admissions=FakeAdmissions(willing=False))
    found = observe(serving, known([5]), hidden(5))
    assert sources_of(found) == [{}] * NUM_LAYERS
    assert found.recording is None
    assert serving.outcomes.reasons == {"miss: nothing close enough": 1}


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


@st.composite
def hits(draw: st.DrawFn, length: int) -> tuple[Hit | None, int]:
    """What was found for a text, and how many rows of maps it spares."""
    layers = draw(st.sets(st.integers(0, NUM_LAYERS - 1)))
    served, spared = {}, 0
    source = draw(st.sampled_from(["aligned", "neighbour"]))
    for layer in layers:
        groups = draw(st.sampled_from([(0,), (1,), (0, 1)]))
        alignment, rows = None, length
        if source == "aligned":
            kept = np.array(sorted(draw(st.sets(st.integers(0, length - 1)))), dtype=np.int64)
            alignment, rows = Alignment(length, length, kept, kept), len(kept)
        served[layer] = Served(source, make_maps(length, groups), alignment)
        spared += rows * len(groups)
    return (Hit(source, served), spared) if served else (None, 0)


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
