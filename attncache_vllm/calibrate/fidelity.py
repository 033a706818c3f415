# SPDX-License-Identifier: Apache-2.0
"""How much of the model's answers survives: figures that plain cosine would hide.

Sentence embeddings of one model share a large common part, so the cosine of an exact and a
damaged embedding stays high long after a text has stopped finding itself. Everything here is
taken after subtracting the mean of the exact embeddings, or depends on ranks only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Fidelity:
    """Exact against reused embeddings of the same texts.

    Attributes:
        centred_cosine: mean cosine of the two embeddings of a text, both less the mean of the
            exact ones.
        pairwise_spearman: Spearman's correlation of the similarities of all pairs of texts.
        self_retrieval: share of texts whose reused embedding is nearest, among all exact ones, to
            its own.
        task_change: change of a task's own metric, reused less exact; None without a task.
    """

    centred_cosine: float
    pairwise_spearman: float
    self_retrieval: float
    task_change: float | None = None


def compare(exact: Tensor, reused: Tensor) -> Fidelity:
    """Compare embeddings ``[N, D]``, any float dtype, of the same N >= 3 texts.

    Raises:
        ValueError: the shapes differ or there are fewer than three texts.
    """
    if exact.shape != reused.shape or exact.ndim != 2 or len(exact) < 3:
        raise ValueError(
            "fidelity needs two tensors [N, D] with N >= 3, "
            f"got {tuple(exact.shape)!r} and {tuple(reused.shape)!r}"
        )
    a, b = centred(exact, reused)
    first, second = torch.triu_indices(len(a), len(a), offset=1)
    return Fidelity(
        centred_cosine=(a * b).sum(1).mean().item(),
        pairwise_spearman=spearman((a @ a.T)[first, second], (b @ b.T)[first, second]),
        self_retrieval=finds_itself(a, b).double().mean().item(),
    )


def centred(exact: Tensor, reused: Tensor) -> tuple[Tensor, Tensor]:
    """Both embeddings ``[N, D]`` less the mean of the exact ones, as unit rows in float64."""
    mean = exact.double().mean(0)
    return F.normalize(exact.double() - mean, dim=-1), F.normalize(reused.double() - mean, dim=-1)


def finds_itself(exact: Tensor, reused: Tensor) -> Tensor:
    """bool [N]: whether each row of ``reused`` is nearest, of all rows of ``exact``, to its own.

    Both are unit rows ``[N, D]`` as of :func:`centred`.
    """
    return (reused @ exact.T).argmax(1) == torch.arange(len(exact))


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors; 0 when one of them is constant."""
    return torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1].nan_to_num(0.0).item()


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, count = torch.unique(values, return_inverse=True, return_counts=True)
    ranks: Tensor = count.cumsum(0) - (count - 1) / 2
    return ranks[place]
