# SPDX-License-Identifier: Apache-2.0
"""Which prompts a step holds, and how its batch is parted."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
import torch
from batches import batch, slot, source, spans
from hypothesis import given
from hypothesis import strategies as st
from step_samples import (
    make_step,
)

from attncache_vllm.engine import compat
from attncache_vllm.engine.step import (
    Prompts,
    Split,
    prompts_of,
    split_batch,
)

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
