# SPDX-License-Identifier: Apache-2.0
"""A step: prompts are told apart, a batch is parted without loss, every outcome counts."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from batches import batch, counted, slot, source, spans
from hypothesis import given
from hypothesis import strategies as st

from attncache_vllm.engine import compat
from attncache_vllm.engine.metrics import Outcomes
from attncache_vllm.engine.step import (
    Hit,
    Prompts,
    Sequence,
    Split,
    Step,
    prompts_of,
    split_batch,
)
from attncache_vllm.errors import StoreError, StoreTimeout
from attncache_vllm.reuse.apply import RowBlocks
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.match import Match
from attncache_vllm.reuse.plan import LayerPlan, Plan

# -- which prompts a step holds ----------------------------------------------------------------


def test_a_step_tells_whole_prompts_from_those_that_end_and_those_that_go_on() -> None:
    # Whole, a first chunk, a middle one, a last one, padding, one that generates, a whole token.
    lengths, context = [3, 2, 2, 4, 0, 1, 1], [3, 2, 7, 9, 0, 6, 1]
    found = prompts_of(source(lengths, context, prompts=[3, 8, 8, 9, 0, 5, 1]))
    assert found == Prompts(whole=[Sequence(0, 0, 3), Sequence(6, 12, 1)], ending=1)


def test_without_prompt_lengths_every_row_from_the_first_token_on_is_whole() -> None:
    # Nobody parts prompts then; padding and rows with context are no prompts.
    found = prompts_of(source([3, 2, 0, 1], context=[3, 7, 0, 1]))
    assert found == Prompts(whole=[Sequence(0, 0, 3), Sequence(3, 5, 1)], ending=0)


@pytest.mark.parametrize("prompts", [None, [3, 7]])
def test_context_lengths_come_from_the_device_where_the_cpu_has_none(
    prompts: list[int] | None,
) -> None:
    found = source([3, 2], context=[3, 7], prompts=prompts)
    found = replace(found, common=found.common.replace(seq_lens_cpu_upper_bound=None))
    assert prompts_of(found) == Prompts([Sequence(0, 0, 3)], 0 if prompts is None else 1)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[list[int], list[int], list[list[tuple[int, int]]]]:
    """Prompt lengths, how much of each was cached, and steps of (prompt, tokens) until all ended.

    As vLLM's scheduler does it: a step takes any number of the prompts' next tokens, at least the
    last one is computed, and after its prompt a sequence may generate.
    """
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    cached = [draw(st.sampled_from([0, 0, length // 2, length - 1])) for length in lengths]
    computed, steps = list(cached), []
    while any(done < length for done, length in zip(computed, lengths, strict=True)):
        step = []
        for prompt in draw(st.permutations(range(len(lengths)))):
            left = lengths[prompt] - computed[prompt]
            tokens = draw(st.integers(0, left)) if left > 0 else draw(st.integers(0, 1))
            step.append((prompt, tokens))
            computed[prompt] += tokens
        steps.append(step)
        if len(steps) == 6:  # let it end
            rest = [length - done for done, length in zip(computed, lengths, strict=True)]
            steps.append([(prompt, max(0, left)) for prompt, left in enumerate(rest)])
            break
    return lengths, cached, [step for step in steps if any(tokens for _, tokens in step)]


@given(schedules())
def test_every_prompt_counts_once_however_it_is_cut_and_batched(
    schedule: tuple[list[int], list[int], list[list[tuple[int, int]]]],
) -> None:
    lengths, computed, steps = schedule
    counts = 0
    for step in steps:
        rows = [tokens for _, tokens in step]
        context = [computed[prompt] + tokens for prompt, tokens in step]
        found = prompts_of(source(rows, context, [lengths[prompt] for prompt, _ in step]))
        # Whole is what is computed in one step from its first token to its last.
        assert found.whole == [
            Sequence(row, edge.start, len(edge))
            for row, ((prompt, tokens), edge) in enumerate(zip(step, spans(rows), strict=True))
            if computed[prompt] == 0 and tokens == lengths[prompt]
        ]
        ended = [
            prompt
            for prompt, tokens in step
            if computed[prompt] < lengths[prompt] == computed[prompt] + tokens
        ]
        assert len(found.whole) + found.ending == len(ended)
        counts += len(ended)
        for prompt, tokens in step:
            computed[prompt] += tokens
    assert counts == len(lengths)


# -- parting a batch ---------------------------------------------------------------------------


def tokens_of(split: Split, total: int) -> tuple[list[int], list[int]]:
    """Positions in the batch of the hits' and of the misses' tokens."""
    misses = [] if split.misses is None else split.misses.tokens.tolist()
    return torch.arange(total)[split.hit_tokens].tolist(), misses


@given(st.data())
def test_hits_and_misses_partition_the_batch(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(any))
    filled = [row for row, length in enumerate(lengths) if length]
    hit_rows = data.draw(st.sets(st.sampled_from(filled), min_size=1))
    # Hits are whole; any other row may have context.
    before = [0 if row in hit_rows else data.draw(st.integers(0, 9)) for row in range(len(lengths))]
    context = [length + earlier for length, earlier in zip(lengths, before, strict=True)]
    split = split_batch(source(lengths, context), hit_rows)
    tokens = list(spans(lengths))
    hits, misses = tokens_of(split, sum(lengths))

    assert hits == [token for row in sorted(hit_rows) for token in tokens[row]]
    assert sorted(hits + misses) == list(range(sum(lengths)))
    assert split.hit_spans == tuple(
        (row, tokens[row].start, tokens[row].stop) for row in sorted(hit_rows)
    )

    missed = [row for row in filled if row not in hit_rows]
    if not missed:
        assert split.misses is None
        return
    assert split.misses is not None
    common = split.misses.attn_metadata.common
    assert common.query_start_loc_cpu.tolist() == list(
        accumulate((lengths[row] for row in missed), initial=0)
    )
    assert torch.equal(common.query_start_loc, common.query_start_loc_cpu)
    for lens in (common.seq_lens, common.seq_lens_cpu_upper_bound):
        assert lens.tolist() == [context[row] for row in missed]
    assert (common.num_reqs, common.num_actual_tokens) == (len(missed), len(misses))
    assert common.max_query_len == max(lengths[row] for row in missed)
    assert common.max_seq_len == max(context[row] for row in missed)
    assert common.block_table_tensor.tolist() == [[row + 1, row + 100] for row in missed]
    assert common.is_prefilling.tolist() == [lengths[row] > 1 for row in missed]
    positions = [(row, p) for row in missed for p in range(before[row], context[row])]
    assert common.positions.tolist() == [position for _, position in positions]
    assert common.slot_mapping.tolist() == [slot(row, position) for row, position in positions]


def test_what_a_batch_may_lack_or_hold_by_row_is_taken_into_the_sub_batch() -> None:
    whole = source([3, 2, 4])
    common = whole.common.replace(
        positions=None,
        is_prefilling=None,
        seq_lens_cpu_upper_bound=None,
        causal=torch.tensor([True, False, True]),
    )
    split = split_batch(replace(whole, common=common), {0})
    assert split.misses is not None
    sub = split.misses.attn_metadata.common
    assert sub.positions is sub.is_prefilling is sub.seq_lens_cpu_upper_bound is None
    assert sub.causal.tolist() == [False, True]
    assert (sub.max_seq_len, sub.seq_lens.tolist()) == (4, [2, 4])


@pytest.mark.parametrize(
    ("lengths", "hit_rows", "expected"),
    [
        ([3, 2, 4], {1}, slice(3, 5)),
        ([3, 2, 4], {0, 1}, slice(0, 5)),
        ([3, 2, 4], {0, 1, 2}, slice(0, 9)),
        ([3, 0, 4], {0, 2}, slice(0, 7)),
        ([1], {0}, slice(0, 1)),
    ],
)
def test_neighbouring_hits_are_selected_without_a_copy(
    lengths: list[int], hit_rows: set[int], expected: slice
) -> None:
    assert split_batch(source(lengths), hit_rows).hit_tokens == expected


def test_hits_with_misses_between_them_are_selected_by_index() -> None:
    split = split_batch(source([3, 2, 4]), {0, 2})
    assert isinstance(split.hit_tokens, torch.Tensor)
    assert split.hit_tokens.tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert split.hit_spans == ((0, 0, 3), (2, 5, 9))


def test_sub_metadata_remembers_its_own_source_and_leaves_the_batch_as_it_was() -> None:
    whole = source([3, 2, 4])
    split = split_batch(whole, {1})
    assert split.misses is not None
    own = compat.metadata_source(split.misses.attn_metadata)
    assert own is not None
    assert own.builder is whole.builder
    assert own.common is split.misses.attn_metadata.common
    assert whole.common.query_start_loc_cpu.tolist() == [0, 3, 5, 9]


def test_layers_that_share_metadata_and_hits_share_the_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared, other = batch([2, 3]), batch([2, 3])
    metadata = {"layer.0": shared, "layer.1": shared, "layer.2": other}
    monkeypatch.setattr(compat, "layer_metadata", metadata.__getitem__)
    step = make_step(Future(), rows=(0, 1))
    assert step.split("layer.0", (0,)) is step.split("layer.1", (0,))
    assert step.split("layer.0", (0,)) is not step.split("layer.0", (1,))
    assert step.split("layer.0", (0,)) is not step.split("layer.2", (0,))


# -- what a layer may reuse --------------------------------------------------------------------

PLAN = Plan(0, (LayerPlan("exact"), LayerPlan("cached", 0.25), LayerPlan("cached", 0.5)))


def make_maps() -> RowBlocks:
    return RowBlocks(MapLayout(1, 1, Mask()), length=9, blocks=())


def make_hit(distance: float, *layers: int) -> Hit:
    match = Match(entry_id=1, distance=distance, length=4, entry_length=9)
    return Hit(match, {layer: make_maps() for layer in layers or (1, 2)})


def make_step(
    lookup: Future[list[Hit | None]] | None,
    rows: tuple[int, ...],
    *,
    seconds: float = 60,
    outcomes: Outcomes | None = None,
) -> Step:
    sequences = [Sequence(row, 4 * row, 4) for row in rows]
    deadline = time.monotonic() + seconds
    return Step(PLAN, sequences, lookup, deadline, outcomes or Outcomes(math.inf))


def found(*hits: Hit | None) -> Future[list[Hit | None]]:
    future: Future[list[Hit | None]] = Future()
    future.set_result(list(hits))
    return future


def failed(error: BaseException) -> Future[list[Hit | None]]:
    future: Future[list[Hit | None]] = Future()
    future.set_exception(error)
    return future


def test_maps_are_found_by_row_of_the_batch() -> None:
    first, second = make_hit(0.1), make_hit(0.2)
    step = make_step(found(first, None, second), rows=(1, 2, 4))
    assert step.maps_for(1) == {1: first.maps[1], 4: second.maps[1]}
    assert step.maps_for(2)[4] is second.maps[2]


def test_each_layer_has_its_own_gate() -> None:
    near, between, far = make_hit(0.25), make_hit(0.26), make_hit(0.51)
    step = make_step(found(near, between, far), rows=(0, 1, 2))
    assert step.maps_for(1).keys() == {0}
    assert step.maps_for(2).keys() == {0, 1}


def test_a_layer_the_entry_has_no_map_of_is_computed() -> None:
    step = make_step(found(make_hit(0.1, 1), make_hit(0.1, 1, 2)), rows=(0, 1))
    assert step.maps_for(2).keys() == {1}


def test_a_step_without_a_lookup_reuses_and_counts_nothing() -> None:
    outcomes = Outcomes(math.inf)
    assert make_step(None, rows=(), outcomes=outcomes).maps_for(1) == {}
    assert not outcomes.sequences


def test_a_lookup_that_ends_before_the_deadline_is_waited_for() -> None:
    future: Future[list[Hit | None]] = Future()
    timer = threading.Timer(0.1, future.set_result, ([make_hit(0.1)],))
    timer.start()
    outcomes = Outcomes(math.inf)
    assert make_step(future, rows=(3,), outcomes=outcomes).maps_for(1).keys() == {3}
    assert outcomes.sequences == {"hit": 1}


def test_a_lookup_that_is_late_is_a_miss_and_not_waited_for_any_longer() -> None:
    outcomes = Outcomes(math.inf)
    future: Future[list[Hit | None]] = Future()
    started = time.monotonic()  # before the deadline is set, 0.05 s from then
    step = make_step(future, rows=(0, 1), seconds=0.05, outcomes=outcomes)
    assert step.maps_for(1) == {}
    assert 0.05 <= time.monotonic() - started < 5
    # Also when the answer comes in the end: a later layer must not take what an earlier one missed.
    future.set_result([make_hit(0.1), make_hit(0.1)])
    assert step.maps_for(2) == {}
    assert outcomes.reasons == {"miss: late": 2}


def test_a_lookup_past_its_deadline_is_used_if_it_has_ended() -> None:
    assert make_step(found(make_hit(0.1)), rows=(0,), seconds=-1).maps_for(1).keys() == {0}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (StoreTimeout("busy"), "late"),
        (StoreError("gone"), "store fault"),
        (RuntimeError("a bug"), "store fault"),
        (MemoryError(), "store fault"),
        (CancelledError(), "store fault"),
    ],
)
def test_a_lookup_that_fails_is_a_miss_and_never_an_error(error: Exception, reason: str) -> None:
    outcomes = Outcomes(math.inf)
    before = counted("attncache_misses_total", reason=reason)
    step = make_step(failed(error), rows=(0, 2), outcomes=outcomes)
    assert step.maps_for(1) == step.maps_for(2) == {}
    assert outcomes.sequences == {"miss": 2}
    assert outcomes.reasons == {f"miss: {reason}": 2}
    assert counted("attncache_misses_total", reason=reason) == before + 2


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.sampled_from(["found", "late", "fault"]))
def test_every_sequence_has_one_outcome_however_many_layers_ask(
    hits: list[bool], ending: str
) -> None:
    lookup = {
        "found": found(*(make_hit(0.1) if hit else None for hit in hits)),
        "late": failed(StoreTimeout("busy")),
        "fault": failed(StoreError("gone")),
    }[ending]
    outcomes = Outcomes(math.inf)
    names = ("hit", "miss")
    before = {name: counted("attncache_sequences_total", outcome=name) for name in names}
    step = make_step(lookup, rows=tuple(range(len(hits))), outcomes=outcomes)
    reused = [step.maps_for(layer).keys() for layer in (1, 2, 1)]
    expected = {row for row, hit in enumerate(hits) if hit and ending == "found"}
    assert reused == [expected] * 3
    assert outcomes.sequences["hit"] == len(expected)
    assert outcomes.sequences.total() == len(hits)
    assert outcomes.reasons.total() == outcomes.sequences["miss"]
    for name in names:
        since = counted("attncache_sequences_total", outcome=name) - before[name]
        assert since == outcomes.sequences[name]
