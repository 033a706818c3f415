# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attncache_vllm.calibrate.bootstrap import (
    interval,
    mean_samples,
    pairwise_spearman_samples,
    resamples,
    spearman_samples,
)
from attncache_vllm.calibrate.fidelity import spearman

seeds = st.integers(0, 2**32 - 1)


def drawn_items(counts: torch.Tensor) -> torch.Tensor:
    """The items of a resample, each as often as it was drawn."""
    return torch.arange(len(counts)).repeat_interleave(counts.long())


@given(st.integers(1, 20), seeds)
def test_a_resample_draws_as_many_items_as_there_are(items: int, seed: int) -> None:
    counts = resamples(items, seed, 7)
    assert counts.shape == (7, items)
    assert (counts.sum(1) == items).all()
    assert torch.equal(counts, resamples(items, seed, 7))


def test_other_seeds_and_other_resamples_draw_otherwise() -> None:
    counts = resamples(50, 0, 2)
    assert not torch.equal(counts[0], counts[1])
    assert not torch.equal(counts, resamples(50, 1, 2))


# Few distinct values, so that ties are common.
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=15), seeds)
def test_samples_of_spearman_are_those_of_the_drawn_items(
    points: list[tuple[int, int]], seed: int
) -> None:
    a, b = torch.tensor(points).double().T
    counts = resamples(len(a), seed, 4)
    expected = []
    for row in counts:
        items = drawn_items(row)
        expected.append(spearman(a[items], b[items]))
    assert spearman_samples(a, b, counts).tolist() == pytest.approx(expected, abs=1e-6)


@given(st.integers(3, 8), seeds)
def test_samples_over_pairs_leave_out_a_text_beside_itself(texts: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(texts, texts, generator=draw).double() for _ in range(2))
    a, b = a + a.T, b + b.T
    counts = resamples(texts, seed, 3)
    expected = []
    for row in counts:
        items = drawn_items(row).tolist()
        pairs = [(i, j) for n, i in enumerate(items) for j in items[n + 1 :] if i != j]
        first, second = (torch.tensor([side[i, j] for i, j in pairs]) for side in (a, b))
        expected.append(spearman(first, second) if len(pairs) > 1 else 0.0)
    found = pairwise_spearman_samples(a, b, counts)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


@given(seeds)
def test_samples_of_a_mean_are_means_of_the_drawn_items(seed: int) -> None:
    values = torch.randn(12, generator=torch.Generator().manual_seed(seed))
    counts = resamples(12, seed, 5)
    expected = [values[drawn_items(row)].double().mean().item() for row in counts]
    assert mean_samples(values, counts).tolist() == pytest.approx(expected)


def test_the_interval_holds_95_percent_of_the_samples() -> None:
    low, high = interval(torch.arange(1001.0).flip(0))
    assert (low, high) == pytest.approx((25, 975))


def test_the_interval_of_a_mean_is_as_wide_as_its_standard_error_says() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    low, high = interval(mean_samples(values, resamples(400)))
    assert high - low == pytest.approx(2 * 1.96 * values.std().item() / 20, rel=0.1)
    assert low < values.mean() < high
