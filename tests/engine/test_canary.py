# SPDX-License-Identifier: Apache-2.0
"""Canaries: how many are drawn, when a layer trips, and how it comes back."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from attncache_vllm.engine.canary import Canaries, relative_error
from attncache_vllm.errors import StoreError
from attncache_vllm.reuse.drift import MIN_CANARIES
from attncache_vllm.reuse.plan import Plan, Source, SourcePlan
from attncache_vllm.store.rearm import rearm, rearmed_at

# Calibrated at an error of 0.1; up to 0.2 is within the band.
ERRORS = ((0.1, 0.05),) * 3


def make_canaries(store: Path, share: float = 0.5, calibrated: bool = True) -> Canaries:
    part = SourcePlan(((), (0, 1), (1,)), errors=ERRORS if calibrated else ())
    plan = Plan(0, 3, {"template": part, "neighbour": part})
    return Canaries(plan, share, partial(rearmed_at, store), f"attncache rearm {store}")


def note(
    canaries: Canaries, error: float, layer: int = 1, source: Source = "template", times: int = 1
) -> None:
    """Note canaries of a relative error."""
    exact = torch.ones(3, 4)
    for _ in range(times):
        canaries.note(layer, source, exact * (1 + error), exact)


def tripped_layers() -> float | None:
    return REGISTRY.get_sample_value("attncache_tripped_layers")


def draws(canaries: Canaries, times: int) -> list[bool]:
    return [canaries.draw() for _ in range(times)]


# -- drawing -----------------------------------------------------------------------------------


@given(st.floats(0, 1))
def test_the_share_of_canaries_is_a_bound_and_they_are_evenly_spread(share: float) -> None:
    drawn = draws(make_canaries(Path("no store"), share), 300)
    seen = 0
    for hits, canary in enumerate(drawn, start=1):
        seen += canary
        # At any time, not only in the end; sums of floats may be off by a little.
        assert share * hits - 1 - 1e-9 <= seen <= share * hits + 1e-9
    places = [at for at, canary in enumerate(drawn) if canary]
    gaps = {after - before for before, after in pairwise(places)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_no_share_is_no_canary_and_all_is_every_hit() -> None:
    assert not any(draws(make_canaries(Path("no store"), 0.0), 50))
    assert all(draws(make_canaries(Path("no store"), 1.0), 50))


# -- errors ------------------------------------------------------------------------------------


def test_each_token_counts_alike_whatever_its_size() -> None:
    exact = torch.tensor([[3.0, 4.0], [300.0, 400.0]])
    reused = exact + torch.tensor([[0.0, 1.0], [0.0, 100.0]])
    assert relative_error(reused, exact) == pytest.approx(0.2)
    assert relative_error(exact, exact) == 0
    # One huge row decides nothing: by the norms of all rows together it would be 0.0002.
    large = torch.tensor([[1.0, 0.0], [10_000.0, 0.0]])
    assert relative_error(large + torch.tensor([[2.0, 0.0], [0.0, 0.0]]), large) == 1


def test_a_row_of_zeros_is_no_division_by_zero() -> None:
    assert math.isfinite(relative_error(torch.ones(2, 3), torch.zeros(2, 3)))


def test_the_mean_error_of_each_layer_and_source_is_shown() -> None:
    canaries = make_canaries(Path("no store"))
    for error in (0.25, 0.5):
        note(canaries, error, layer=2, source="neighbour")
    labels = {"layer": "2", "source": "neighbour"}
    assert REGISTRY.get_sample_value("attncache_canary_error", labels) == pytest.approx(0.375)


# -- tripping ----------------------------------------------------------------------------------


def test_a_layer_trips_for_one_source_when_its_error_has_left_the_band(
    caplog: pytest.LogCaptureFixture,
) -> None:
    canaries = make_canaries(Path("no store"))
    assert tripped_layers() == 0
    note(canaries, 0.19, times=3 * MIN_CANARIES)
    note(canaries, 0.5, layer=2, times=MIN_CANARIES - 1)
    assert tripped_layers() == 0
    with caplog.at_level(logging.WARNING, logger="vllm.attncache_vllm"):
        note(canaries, 0.5, layer=2)
    assert canaries.tripped(2, "template")
    assert not canaries.tripped(2, "neighbour")
    assert not canaries.tripped(1, "template")
    assert tripped_layers() == 1
    [message] = [record.getMessage() for record in caplog.records]
    assert "layer 2 is computed exactly from now on where 'template' would serve it" in message
    assert f"{MIN_CANARIES} canaries is 0.500, calibrated up to 0.200" in message
    assert "attncache rearm no store" in message
    note(canaries, 0.5, layer=2, source="neighbour", times=MIN_CANARIES)
    assert tripped_layers() == 2


def test_a_layer_without_a_calibrated_error_does_not_trip() -> None:
    canaries = make_canaries(Path("no store"), calibrated=False)
    note(canaries, 100.0, times=50)
    assert not canaries.tripped(1, "template")


def test_an_answer_that_is_not_a_number_trips_at_once(caplog: pytest.LogCaptureFixture) -> None:
    canaries = make_canaries(Path("no store"))
    note(canaries, 0.1, times=20)
    with caplog.at_level(logging.WARNING, logger="vllm.attncache_vllm"):
        note(canaries, math.nan)
    assert canaries.tripped(1, "template")
    assert "is nan, calibrated" in caplog.text


# -- coming back -------------------------------------------------------------------------------


def test_tripped_layers_come_back_after_they_were_rearmed_and_can_trip_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rearm(tmp_path)  # of an earlier server's time: says nothing about this one
    canaries = make_canaries(tmp_path)
    note(canaries, 0.5, times=MIN_CANARIES)
    note(canaries, 0.15, source="neighbour", times=MIN_CANARIES)
    draws(canaries, 200)
    assert canaries.tripped(1, "template")
    rearm(tmp_path)
    with caplog.at_level(logging.WARNING, logger="vllm.attncache_vllm"):
        draws(canaries, 200)
    assert not canaries.tripped(1, "template")
    assert tripped_layers() == 0
    assert "1 layers rearmed" in caplog.text
    # What it had seen is forgotten: it takes as many canaries as at first.
    note(canaries, 0.5, times=MIN_CANARIES - 1)
    assert not canaries.tripped(1, "template")
    note(canaries, 0.5)
    draws(canaries, 200)
    assert canaries.tripped(1, "template")
    rearm(tmp_path)
    draws(canaries, 200)
    assert not canaries.tripped(1, "template")


def test_what_was_rearmed_before_a_layer_tripped_does_not_bring_it_back(tmp_path: Path) -> None:
    canaries = make_canaries(tmp_path)
    rearm(tmp_path)
    draws(canaries, 200)
    note(canaries, 0.5, times=MIN_CANARIES)
    draws(canaries, 200)
    assert canaries.tripped(1, "template")


def test_a_store_that_cannot_be_written_to_cannot_be_rearmed(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        rearm(tmp_path / "none")


@pytest.mark.parametrize("gone", [lambda: 0, lambda: fail(StoreError("unreachable"))])
def test_a_server_whose_store_is_gone_stays_as_it_is(gone: Callable[[], int]) -> None:
    answer: list[Callable[[], int]] = [lambda: 7]
    part = SourcePlan(((), (0, 1), (1,)), errors=ERRORS)
    canaries = Canaries(Plan(0, 3, {"template": part}), 0.5, lambda: answer[0](), "rearm")
    note(canaries, 0.5, times=MIN_CANARIES)
    answer[0] = gone
    draws(canaries, 200)
    assert canaries.tripped(1, "template")
    # It is back, and nobody has rearmed anything meanwhile; then somebody does.
    answer[0] = lambda: 7
    draws(canaries, 200)
    assert canaries.tripped(1, "template")
    answer[0] = lambda: 8
    draws(canaries, 200)
    assert not canaries.tripped(1, "template")


def fail(error: Exception) -> int:
    raise error
