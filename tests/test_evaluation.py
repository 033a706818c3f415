# SPDX-License-Identifier: Apache-2.0
"""The figures of the encoder evaluation, and the heads fitted for it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.classifiers import _logistic
from benchmarks.corpus import Pair
from benchmarks.eval_encoders import difference_interval, similarities, unique


def test_similarities_find_each_sentence_where_it_was_embedded() -> None:
    pairs = [Pair("a", "b", 1.0), Pair("b", "c", 2.0), Pair("c", "c", 5.0)]
    assert unique(pairs) == ["a", "b", "c"]
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, -3.0]])
    assert similarities(embeddings, pairs).tolist() == pytest.approx([0.5**0.5, -(0.5**0.5), 1.0])


def test_the_interval_is_nothing_where_reuse_changes_no_order() -> None:
    draw = torch.Generator().manual_seed(0)
    gold, exact = torch.rand(200, generator=draw), torch.rand(200, generator=draw)
    assert difference_interval(exact, exact.exp(), gold) == (0.0, 0.0)


def test_the_interval_excludes_no_change_where_the_damage_is_plain() -> None:
    draw = torch.Generator().manual_seed(0)
    gold = torch.rand(400, generator=draw)
    exact = gold + 0.1 * torch.rand(400, generator=draw)
    damaged = exact + torch.rand(400, generator=draw)
    low, high = difference_interval(exact, damaged, gold)
    assert low < high < -0.1
    # The other way round it is a gain of the same size.
    assert difference_interval(damaged, exact, gold) == pytest.approx((-high, -low))


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 0.1, 1.0]))
def test_logistic_weights_are_where_the_objective_is_flat(seed: int, penalty: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(60, 5, generator=draw)
    targets = torch.rand(60, generator=draw)
    weight = _logistic(features, targets, penalty).double().requires_grad_()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        features.double() @ weight, targets.double()
    )
    (loss + penalty / 2 * weight.square().sum()).backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() < 1e-5
