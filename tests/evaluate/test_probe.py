# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from attncache_vllm.evaluate.probe import Probe, logistic, numbered


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 0.1, 1.0]))
def test_logistic_weights_are_where_the_objective_is_flat(seed: int, penalty: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(60, 5, generator=draw)
    targets = torch.rand(60, generator=draw)
    weight = logistic(features, targets, penalty).requires_grad_()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        features.double() @ weight, targets.double()
    )
    (loss + penalty / 2 * weight.square().sum()).backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() < 1e-8


def test_a_probe_tells_classes_that_lie_apart_wherever_they_lie() -> None:
    draw = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    labels = torch.arange(90) % 3
    points = centres[labels] + torch.randn(90, 2, generator=draw)
    # A far origin and unequal scales: what standardisation and the bias are for.
    embeddings = points * torch.tensor([1e-3, 1e3]) + torch.tensor([5.0, -7e5])
    probe = Probe.fit(embeddings[:60], labels[:60], 3)
    assert (probe(embeddings[60:]) == labels[60:]).all()


def test_a_probe_stays_sound_where_a_dimension_never_changes() -> None:
    labels = torch.arange(20) % 2
    embeddings = torch.stack([labels.double(), torch.ones(20)], 1)
    assert torch.equal(Probe.fit(embeddings, labels, 2)(embeddings), labels)


def test_labels_are_numbered_by_name() -> None:
    numbers, names = numbered(["b", 1, "a", "b"])
    assert names == ["1", "a", "b"]
    assert numbers.tolist() == [2, 0, 1, 2]
