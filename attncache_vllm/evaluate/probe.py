# SPDX-License-Identifier: Apache-2.0
"""A linear probe on the embeddings of a frozen model: what an application would fit to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTY = 0.1  # on standardised embeddings, see `logistic`
NEWTON_STEPS = 10  # it has converged after eight


@dataclass(frozen=True)
class Probe:
    """One logistic regression for each class, on embeddings standardised as at the fit."""

    mean: Tensor  # [D]
    scale: Tensor  # [D]
    weights: Tensor  # [classes, D + 1], the last column the bias

    @classmethod
    def fit(cls, embeddings: Tensor, labels: Tensor, classes: int) -> Probe:
        """Fit to ``embeddings [N, D]`` with ``labels [N]`` in ``range(classes)``."""
        x = embeddings.double()
        mean, scale = x.mean(0), x.std(0).clamp_min(1e-12)
        inputs = F.pad((x - mean) / scale, (0, 1), value=1.0)
        weights = [logistic(inputs, labels == number, PENALTY) for number in range(classes)]
        return cls(mean, scale, torch.stack(weights))

    def __call__(self, embeddings: Tensor) -> Tensor:
        """int64 [N]: the likeliest class of each of ``embeddings [N, D]``."""
        x = (embeddings.double() - self.mean) / self.scale
        return (F.pad(x, (0, 1), value=1.0) @ self.weights.T).argmax(1)


def logistic(features: Tensor, targets: Tensor, penalty: float) -> Tensor:
    """Weights of a logistic regression, by Newton's method: no chance, no learning rate.

    Minimises the mean cross-entropy plus ``penalty / 2`` times the squared norm of the weights.

    Args:
        features: ``[N, F]``.
        targets: ``[N]`` in 0..1.
        penalty: above 0.

    Returns:
        float64 ``[F]``.
    """
    x, y = features.double(), targets.double()
    ridge = penalty * torch.eye(x.shape[1], dtype=x.dtype)
    weight = x.new_zeros(x.shape[1])
    for _ in range(NEWTON_STEPS):
        p = torch.sigmoid(x @ weight)
        gradient = x.T @ (p - y) / len(x) + penalty * weight
        curvature = (x.T * (p * (1 - p))) @ x / len(x) + ridge
        weight = weight - torch.linalg.solve(curvature, gradient)
    return weight


def numbered(labels: Sequence[str | int]) -> tuple[Tensor, list[str]]:
    """int64 [N] numbers of the labels, and the classes' names in the order of their numbers."""
    names = sorted({str(label) for label in labels})
    return torch.tensor([names.index(str(label)) for label in labels]), names
