# SPDX-License-Identifier: Apache-2.0
"""Bootstrap 95 % intervals: how far a figure may lie from what more texts would have given.

A resample is a vector of counts: how often each item was drawn. Figures of one comparison share
their resamples, so that the interval of a difference is that of paired items.
"""

from __future__ import annotations

import torch
from torch import Tensor

RESAMPLES = 1000


def resamples(items: int, seed: int = 0, number: int = RESAMPLES) -> Tensor:
    """Counts ``[number, items]`` float64: ``items`` draws with replacement, ``number`` times."""
    drawn = torch.randint(
        items, (number, items), generator=torch.Generator().manual_seed(seed), dtype=torch.int64
    )
    counts = torch.zeros(number, items, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts))


def interval(samples: Tensor) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles of a figure's values ``[number]`` over the resamples."""
    low, high = torch.quantile(samples.double(), samples.new_tensor([0.025, 0.975]).double())
    return low.item(), high.item()


def mean_samples(values: Tensor, counts: Tensor) -> Tensor:
    """The mean of ``values [items]`` in each of ``counts [number, items]``; float64 [number]."""
    return counts @ values.double() / counts.sum(1)


def spearman_samples(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    """Spearman's correlation of ``a`` and ``b`` ``[items]`` in each of ``counts [number, items]``.

    An item drawn twice is two items with equal values. The items are sorted once.

    Returns:
        float64 [number]; 0 where one of the two is constant.
    """
    first, second = _Ranking(a), _Ranking(b)
    return torch.stack([_correlation(first(row), second(row), row) for row in counts])


def pairwise_spearman_samples(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    """Spearman's correlation of all pairs' similarities in each resample of the texts.

    Args:
        a, b: similarities ``[texts, texts]``, symmetric.
        counts: ``[number, texts]``. A pair of texts is drawn as often as its texts are together; a
            text drawn twice makes no pair with itself, whose similarity nothing can change.

    Returns:
        float64 [number].
    """
    i, j = torch.triu_indices(len(a), len(a), offset=1)
    first, second = _Ranking(a[i, j]), _Ranking(b[i, j])
    samples = []
    for row in counts:
        pairs = row[i] * row[j]
        samples.append(_correlation(first(pairs), second(pairs), pairs))
    return torch.stack(samples)


class _Ranking:
    """Ranks of values of which each may count several times, or not at all."""

    def __init__(self, values: Tensor) -> None:
        distinct, self._place = torch.unique(values, return_inverse=True)
        self._distinct = len(distinct)

    def __call__(self, counts: Tensor) -> Tensor:
        """Ranks ``[items]`` from 1; the copies of an item and equal values share their mean."""
        count = torch.bincount(self._place, counts, self._distinct)
        return (count.cumsum(0) - (count - 1) / 2)[self._place]


def _correlation(x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """Pearson's correlation of ranks ``x`` and ``y`` ``[items]``, each counted ``counts`` times."""
    share = counts / counts.sum()
    # Ranks are halves of integers: what a constant leaves after its mean is rounding.
    x, y = (ranks - share @ ranks for ranks in (x, y))
    x, y = (torch.where(ranks.abs() < 1e-6, 0.0, ranks) for ranks in (x, y))
    spread = (share @ x.square() * (share @ y.square())).sqrt()
    return (share @ (x * y) / spread).nan_to_num(0.0)
