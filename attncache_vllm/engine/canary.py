# SPDX-License-Identifier: Apache-2.0
"""Canaries: hits that are computed exactly and compared with what would have served them.

Their answer is the exact one. What they cost is bounded by their share of the hits: each is a miss
plus the application of its maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from attncache_vllm.engine import compat, metrics
from attncache_vllm.errors import StoreError
from attncache_vllm.reuse.drift import Band, RunningError
from attncache_vllm.reuse.plan import Plan, Source

logger = compat.get_logger(__name__)

# After how many hits the store is asked again whether layers were rearmed.
_LOOK_EVERY = 64


def relative_error(reused: torch.Tensor, exact: torch.Tensor) -> float:
    """Mean over the tokens of ``|reused - exact| / |exact|``, both ``[T, n]``.

    Each row by its own norm: the first token's is often a hundred times that of the others.
    """
    difference = (reused.float() - exact.float()).norm(dim=-1)
    return float((difference / exact.float().norm(dim=-1).clamp_min(1e-6)).mean())


class Canaries:
    """Draws canaries, keeps their running error per source and layer, and trips what left its
    calibrated band: such a layer is computed exactly until it is rearmed."""

    def __init__(self, plan: Plan, share: float, rearmed_at: Callable[[], int], rearm: str) -> None:
        """``share`` of the hits are canaries, 0 to 1; ``rearmed_at`` is that of the store, and
        ``rearm`` the command that changes its answer."""
        self._share = share
        self._rearmed_at = rearmed_at
        self._rearm = rearm
        self._owed = 0.0
        self._bands = {
            (source, layer): Band(*part.errors[layer])
            for source, part in plan.sources.items()
            if part.errors
            for layer in part.layers
        }
        self._errors: dict[tuple[Source, int], RunningError] = {
            (source, layer): RunningError()
            for source, part in plan.sources.items()
            for layer in part.layers
        }
        self._tripped: set[tuple[Source, int]] = set()
        self._rearmed = self._last_rearmed()
        self._since_look = 0
        metrics.TRIPPED.set(0)

    def draw(self) -> bool:
        """Whether the next hit is a canary: evenly spread, so that their share is a bound."""
        self._look_for_rearm()
        self._owed += self._share
        if self._owed < 1:
            return False
        self._owed -= 1
        return True

    def tripped(self, layer: int, source: Source) -> bool:
        return (source, layer) in self._tripped

    def note(self, layer: int, source: Source, reused: torch.Tensor, exact: torch.Tensor) -> None:
        """Take note of one canary in one layer: outputs of its served heads ``[T, n * d]``."""
        key = (source, layer)
        error = relative_error(reused, exact)
        running, band = self._errors[key], self._bands.get(key)
        running.add(error)
        metrics.CANARY_ERROR.labels(str(layer), source).set(running.mean)
        if band is None or key in self._tripped or not running.has_left(band):
            return
        self._tripped.add(key)
        metrics.TRIPPED.set(len(self._tripped))
        logger.warning(
            "attncache: layer %d is computed exactly from now on where %r would serve it: the mean "
            "error of %d canaries is %.3f, calibrated up to %.3f. The traffic differs from the "
            "texts of the calibration: calibrate with texts like these, or run `%s` if this "
            "was passing",
            layer,
            source,
            len(running),
            running.mean if math.isfinite(error) else error,
            band.upper,
            self._rearm,
        )

    def _look_for_rearm(self) -> None:
        self._since_look += 1
        if self._since_look < _LOOK_EVERY:
            return
        self._since_look = 0
        rearmed = self._last_rearmed()
        # A store that is gone rearms nobody.
        if rearmed in (0, self._rearmed):
            return
        self._rearmed = rearmed
        if self._tripped:
            logger.warning("attncache: %d layers rearmed", len(self._tripped))
        for key in self._tripped:
            self._errors[key].clear()
        self._tripped.clear()
        metrics.TRIPPED.set(0)

    def _last_rearmed(self) -> int:
        try:
            return self._rearmed_at()
        except StoreError:  # a request never fails because of the cache
            return 0
