# SPDX-License-Identifier: Apache-2.0
"""A step: prompts are told apart, a batch is parted without loss, every outcome counts."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from batches import batch, slot, source, spans
from hypothesis import given
from hypothesis import strategies as st

from attncache_vllm.engine import compat
from attncache_vllm.engine.step import (
    Decision,
    Hit,
    Prompts,
    Sequence,
    Served,
    Split,
    Step,
    prompts_of,
    split_batch,
)
from attncache_vllm.errors import StoreError, StoreTimeout
from attncache_vllm.reuse.align import align
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.maps import RowBlocks
from attncache_vllm.reuse.plan import Source

# -- which prompts a step holds ----------------------------------------------------------------


def found_in(prompts: Prompts) -> tuple[list[tuple[int, int, int]], int]:
    """Row, start and length of the whole prompts, and how many others end."""
    return [(seq.row, seq.start, seq.length) for seq in prompts.whole], prompts.ending


def test_a_step_tells_whole_prompts_from_those_that_end_and_those_that_go_on() -> None:
    # Whole, a first chunk, a middle one, a last one, padding, one that generates, a whole token.
    lengths, context = [3, 2, 2, 4, 0, 1, 1], [3, 2, 7, 9, 0, 6, 1]
    found = prompts_of(source(lengths, context, prompts=[3, 8, 8, 9, 0, 5, 1]))
    assert found_in(found) == ([(0, 0, 3), (6, 12, 1)], 1)


def test_whole_prompts_come_with_their_token_ids_if_they_are_known() -> None:
    ids = np.array([5, 6, 7], np.int32)
    prompts = [compat.Prompt(2), compat.Prompt(3, ids)]
    first, second = prompts_of(source([2, 3], prompts=prompts)).whole
    assert first.token_ids is None
    assert second.token_ids is ids


def test_without_prompts_every_row_from_the_first_token_on_is_whole() -> None:
    # Nobody parts prompts then; padding and rows with context are no prompts.
    found = prompts_of(source([3, 2, 0, 1], context=[3, 7, 0, 1]))
    assert found_in(found) == ([(0, 0, 3), (3, 5, 1)], 0)
    assert {sequence.token_ids for sequence in found.whole} == {None}


@pytest.mark.parametrize("prompts", [None, [3, 7]])
def test_context_lengths_come_from_the_device_where_the_cpu_has_none(
    prompts: list[int] | None,
) -> None:
    found = source([3, 2], context=[3, 7], prompts=prompts)
    found = replace(found, common=found.common.replace(seq_lens_cpu_upper_bound=None))
    assert found_in(prompts_of(found)) == ([(0, 0, 3)], 0 if prompts is None else 1)


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
        whole, ending = found_in(found)
        assert whole == [
            (row, edge.start, len(edge))
            for row, ((prompt, tokens), edge) in enumerate(zip(step, spans(rows), strict=True))
            if computed[prompt] == 0 and tokens == lengths[prompt]
        ]
        ended = [
            prompt
            for prompt, tokens in step
            if computed[prompt] < lengths[prompt] == computed[prompt] + tokens
        ]
        assert len(whole) + ending == len(ended)
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
    assert [own.row_in_batch(row) for row in range(2)] == [0, 2]
    assert [whole.row_in_batch(row) for row in range(3)] == [0, 1, 2]
    assert whole.common.query_start_loc_cpu.tolist() == [0, 3, 5, 9]


@given(st.data())
def test_rows_of_a_part_of_a_part_are_still_those_of_the_batch(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=3, max_size=8))
    rows, found = list(range(len(lengths))), source(lengths)
    while len(rows) > 1:
        hits = data.draw(
            st.sets(st.sampled_from(range(len(rows))), min_size=1).filter(
                lambda hits, rows=rows: len(hits) < len(rows)
            )
        )
        split = split_batch(found, hits)
        assert split.misses is not None
        part = compat.metadata_source(split.misses.attn_metadata)
        assert part is not None
        rows, found = [row for at, row in enumerate(rows) if at not in hits], part
        assert [found.row_in_batch(row) for row in range(found.common.num_reqs)] == rows
        # What is computed of them is theirs.
        positions = [slot(row, p) for row in rows for p in range(lengths[row])]
        assert found.common.slot_mapping.tolist() == positions


def test_layers_that_share_metadata_and_hits_share_the_split() -> None:
    shared, other = batch([2, 3]), batch([2, 3])
    step = make_step(Future(), rows=(0, 1))
    assert step.split(shared, (0,)) is step.split(shared, (0,))
    assert step.split(shared, (0,)) is not step.split(shared, (1,))
    assert step.split(shared, (0,)) is not step.split(other, (0,))


# -- what serves a layer -----------------------------------------------------------------------


def make_maps(*groups: int) -> RowBlocks:
    return RowBlocks(MapLayout(6, 3, Mask()), length=9, groups=groups or (0, 1, 2), blocks=())


def test_rows_count_once_for_each_kv_group_that_takes_them_from_a_map() -> None:
    tokens, stored = np.array([1, 2, 3, 9, 4, 5, 6]), np.array([1, 2, 3, 4, 5, 6])
    alignment = align(tokens.astype(np.int32), stored.astype(np.int32))
    assert Served("template", make_maps(0, 2)).rows_reused(7) == 2 * 7
    assert Served("aligned", make_maps(0, 2), alignment).rows_reused(7) == 2 * 6


def test_what_serves_a_layer_knows_its_heads() -> None:
    whole, part = Served("template", make_maps()), Served("template", make_maps(0, 2))
    assert (whole.all_heads, part.all_heads) == (True, False)
    assert (whole.heads, part.heads) == ([0, 1, 2, 3, 4, 5], [0, 1, 4, 5])


# -- a step and its decision -------------------------------------------------------------------


def make_hit(*layers: int) -> Hit:
    return Hit("neighbour", {layer: Served("neighbour", make_maps()) for layer in layers or (1, 2)})


class Deciding:
    """Serves what was found, of odd rows as canaries; writes down what it was asked."""

    def __init__(self, *tripped: tuple[int, Source]) -> None:
        self.asked: list[SimpleNamespace] = []
        self.trips = set(tripped)

    def decide(
        self, sequences: list[Sequence], found: list[Hit | None], reason: str | None
    ) -> Decision:
        self.asked.append(SimpleNamespace(sequences=sequences, found=found, reason=reason))
        hits = {s.row: hit for s, hit in zip(sequences, found, strict=True) if hit is not None}
        return Decision(
            {row: hit for row, hit in hits.items() if row % 2 == 0},
            {row: hit for row, hit in hits.items() if row % 2},
        )

    def choose(self, layer: int, served: dict[int, Served]) -> dict[int, Served]:
        return {row: item for row, item in served.items() if (layer, item.source) not in self.trips}


def make_step(
    lookup: Future[list[Hit | None]] | None,
    rows: tuple[int, ...],
    *,
    seconds: float = 60,
    deciding: Deciding | None = None,
    reason: str | None = None,
) -> Step:
    sequences = [Sequence(row, 4 * row, 4) for row in rows]
    deadline, deciding = time.monotonic() + seconds, deciding or Deciding()
    return Step(sequences, lookup, deadline, deciding.decide, deciding.choose, reason)


def found(*hits: Hit | None) -> Future[list[Hit | None]]:
    future: Future[list[Hit | None]] = Future()
    future.set_result(list(hits))
    return future


def failed(error: BaseException) -> Future[list[Hit | None]]:
    future: Future[list[Hit | None]] = Future()
    future.set_exception(error)
    return future


def test_hits_and_canaries_are_found_by_row_of_the_batch() -> None:
    first, second, third = make_hit(), make_hit(), make_hit()
    step = make_step(found(first, None, second, third), rows=(1, 2, 4, 6))
    assert step.served(1) == {4: second.served[1], 6: third.served[1]}
    assert step.canaries(1) == {1: first.served[1]}
    assert step.served(2)[6] is third.served[2]
    assert step.canaries(2)[1] is first.served[2]


def test_a_layer_that_nothing_serves_is_computed() -> None:
    step = make_step(found(make_hit(1), make_hit(1, 2), make_hit(1)), rows=(0, 2, 3))
    assert step.served(2).keys() == {2}
    assert step.canaries(2).keys() == set()


def test_a_layer_that_tripped_is_computed_where_that_source_would_serve_it() -> None:
    prefix, aligned = (Served(source, make_maps()) for source in ("prefix", "aligned"))
    hits = found(Hit("aligned", {1: prefix, 2: aligned}), make_hit(), make_hit())
    deciding = Deciding((2, "aligned"), (1, "neighbour"))
    step = make_step(hits, rows=(0, 2, 3), deciding=deciding)
    assert step.served(1) == {0: prefix}
    assert step.served(2).keys() == {2}
    assert (step.canaries(1).keys(), step.canaries(2).keys()) == (set(), {3})
    # At once, also in the middle of a step, and back as soon.
    deciding.trips = {(2, "neighbour")}
    assert (step.served(2).keys(), step.canaries(2).keys()) == ({0}, set())


def test_the_decision_is_made_once_however_many_layers_ask() -> None:
    deciding, hit = Deciding(), make_hit()
    step = make_step(found(hit, None), rows=(3, 4), deciding=deciding)
    for _ in range(2):
        step.canaries(1), step.served(1), step.served(2)
    [asked] = deciding.asked
    assert ([s.row for s in asked.sequences], asked.found) == ([3, 4], [hit, None])
    assert asked.reason is None


@pytest.mark.parametrize("reason", [None, "lookup still running"])
def test_without_a_lookup_nothing_was_found_for_the_reason_given(reason: str | None) -> None:
    deciding = Deciding()
    assert make_step(None, rows=(2, 4), deciding=deciding, reason=reason).served(1) == {}
    [asked] = deciding.asked
    assert (asked.found, asked.reason) == ([None, None], reason)


def test_a_lookup_that_ends_before_the_deadline_is_waited_for() -> None:
    future: Future[list[Hit | None]] = Future()
    timer = threading.Timer(0.1, future.set_result, ([make_hit()],))
    timer.start()
    deciding = Deciding()
    assert make_step(future, rows=(2,), deciding=deciding).served(1).keys() == {2}
    assert deciding.asked[0].reason is None


def test_a_lookup_that_is_late_found_nothing_and_is_not_waited_for_any_longer() -> None:
    deciding = Deciding()
    future: Future[list[Hit | None]] = Future()
    started = time.monotonic()  # before the deadline is set, 0.05 s from then
    step = make_step(future, rows=(0, 2), seconds=0.05, deciding=deciding)
    assert step.served(1) == {}
    assert 0.05 <= time.monotonic() - started < 5
    # Also when the answer comes in the end: a later layer must not take what an earlier one missed.
    future.set_result([make_hit(), make_hit()])
    assert step.served(2) == {}
    [asked] = deciding.asked
    assert (asked.found, asked.reason) == ([None, None], "late")


def test_a_lookup_past_its_deadline_is_used_if_it_has_ended() -> None:
    assert make_step(found(make_hit()), rows=(0,), seconds=-1).served(1).keys() == {0}


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
def test_a_lookup_that_fails_found_nothing_and_is_never_an_error(
    error: Exception, reason: str
) -> None:
    deciding = Deciding()
    step = make_step(failed(error), rows=(0, 2), deciding=deciding)
    assert step.served(1) == step.served(2) == step.canaries(1) == {}
    [asked] = deciding.asked
    assert (asked.found, asked.reason) == ([None, None], reason)
