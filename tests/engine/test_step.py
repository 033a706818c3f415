# SPDX-License-Identifier: Apache-2.0
"""A step: what serves a layer, and what is decided when."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError, Future

import numpy as np
import pytest
from step_samples import (
    Deciding,
    found,
    make_step,
)

from attncache_vllm.engine.step import (
    Hit,
    Served,
)
from attncache_vllm.errors import StoreError, StoreTimeout
from attncache_vllm.reuse.align import align
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.maps import RowBlocks

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
