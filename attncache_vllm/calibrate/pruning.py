# SPDX-License-Identifier: Apache-2.0
"""How much of a layer's maps may be left out: so much that the error of reuse hardly grows.

Where maps of another text are off by a third, a percent of their own is nothing; where they are
nearly right, it is all there is. So the encoding is chosen per layer and source, before anything
else is measured, and whatever is measured after it has it in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from attncache_vllm.calibrate.choose import Groups

# By layer; see `TiledMap.pruned`.
Shares = dict[int, float]

# What is tried, smallest first, and by how much the mean error of a layer may grow by it.
LADDER = (0.02, 0.05, 0.1, 0.2)
GROWTH = 0.02
# Texts that the errors are measured on.
PRUNED_TEXTS = 8


def choose_shares(errors_at: Callable[[float], Mapping[int, Sequence[float]]]) -> Shares:
    """The largest share of the ladder for each layer up to which its error stays.

    Args:
        errors_at: measures by layer the relative errors of texts whose maps have lost a share.
    """
    before = errors_at(0.0)
    chosen = dict.fromkeys(before, 0.0)
    open_layers = set(before)
    for share in LADDER:
        after = errors_at(share)
        open_layers &= {
            layer for layer in before if fmean(after[layer]) <= (1 + GROWTH) * fmean(before[layer])
        }
        if not open_layers:
            break
        chosen.update(dict.fromkeys(open_layers, share))
    return chosen


def every_share(shares: Shares, groups: Groups, num_layers: int) -> tuple[float, ...]:
    """Shares as a plan has them: none for layers that serve nothing."""
    return tuple(shares.get(layer, 0.0) if layer in groups else 0.0 for layer in range(num_layers))
