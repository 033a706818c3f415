# SPDX-License-Identifier: Apache-2.0
"""A step: whole sequences are told apart, a batch is parted without loss, every outcome counts."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from batches import SLOT_OF_FIRST_TOKEN, batch, counted, source
from hypothesis import given
from hypothesis import strategies as st

from attncache_vllm.engine import compat
from attncache_vllm.engine.metrics import Outcomes
from attncache_vllm.engine.step import Hit, Sequence, Split, Step, sequences_of, split_batch
from attncache_vllm.errors import StoreError, StoreTimeout
from attncache_vllm.reuse.apply import RowBlocks
from attncache_vllm.reuse.match import Match
from attncache_vllm.reuse.plan import LayerPlan, Plan

# -- which sequences a step holds --------------------------------------------------------------


def test_sequences_that_began_earlier_or_go_on_later_are_partial() -> None:
    # A whole one, a later chunk, padding, a first token of a longer context, one whole token.
    whole, partial = sequences_of(source([3, 2, 0, 1, 1], context=[3, 7, 0, 9, 1]))
    assert whole == [Sequence(0, 0, 3), Sequence(4, 6, 1)]
    assert partial == [1, 3]


def test_context_lengths_come_from_the_device_where_the_cpu_has_none() -> None:
    found = source([3, 2], context=[3, 7])
    found = replace(found, common=found.common.replace(seq_lens_cpu_upper_bound=None))
    assert sequences_of(found) == ([Sequence(0, 0, 3)], [1])


rows = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), min_size=1, max_size=8)


@given(rows.filter(lambda rows: any(length for length, _ in rows)))
def test_every_row_with_tokens_is_whole_or_partial(rows: list[tuple[int, int]]) -> None:
    lengths = [length for length, _ in rows]
    whole, partial = sequences_of(source(lengths, [length + before for length, before in rows]))
    assert [seq.row for seq in whole] == [
        r for r, (n, before) in enumerate(rows) if n and not before
    ]
    assert partial == [r for r, (n, before) in enumerate(rows) if n and before]
    starts = list(accumulate(lengths, initial=0))
    assert all((seq.start, seq.length) == (starts[seq.row], lengths[seq.row]) for seq in whole)


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
    split = split_batch(source(lengths), hit_rows)
    starts = list(accumulate(lengths, initial=0))
    hits, misses = tokens_of(split, starts[-1])

    assert sorted(hits + misses) == list(range(starts[-1]))
    # Every hit has a span, spans follow each other, and a span selects the tokens of its row.
    assert [row for row, _, _ in split.hit_spans] == sorted(hit_rows)
    edges = [0, *(stop for _, _, stop in split.hit_spans)]
    assert [(start, stop) for _, start, stop in split.hit_spans] == list(pairwise(edges))
    assert edges[-1] == len(hits)
    for row, start, stop in split.hit_spans:
        assert hits[start:stop] == list(range(starts[row], starts[row + 1]))

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
        assert lens.tolist() == [lengths[row] for row in missed]
    assert (common.num_reqs, common.num_actual_tokens) == (len(missed), len(misses))
    assert common.max_query_len == common.max_seq_len == max(lengths[row] for row in missed)
    assert common.block_table_tensor.tolist() == [[row, row + 100] for row in missed]
    assert common.is_prefilling.tolist() == [lengths[row] > 1 for row in missed]
    assert common.slot_mapping.tolist() == [SLOT_OF_FIRST_TOKEN + token for token in misses]
    assert common.positions.tolist() == [p for row in missed for p in range(lengths[row])]


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
    assert split.hit_spans == ((0, 0, 3), (2, 3, 7))


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
    return RowBlocks(length=9, num_heads=1, num_kv_heads=1, blocks=())


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
