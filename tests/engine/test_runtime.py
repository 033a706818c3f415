# SPDX-License-Identifier: Apache-2.0
"""What is looked up, which source serves whom, and what is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch
from batches import batch, counted
from runtime_samples import (
    GROUPS,
    LONGEST,
    NO_TEMPLATES,
    NUM_LAYERS,
    SLOTS,
    TEMPLATES,
    FakeAdmissions,
    FakeLookups,
    Rows,
    begin,
    hidden,
    make_maps,
    make_serving,
    neighbour,
    observe,
    sources_of,
)
from vllm.forward_context import ForwardContext, override_forward_context

from attncache_vllm.engine import compat
from attncache_vllm.engine.costs import Cost, Costs
from attncache_vllm.engine.step import Hit, Served
from attncache_vllm.errors import StoreError, StoreTimeout
from attncache_vllm.reuse.feature import pool_tokens
from attncache_vllm.tenants import SHARED_TENANT, tenant_of

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
