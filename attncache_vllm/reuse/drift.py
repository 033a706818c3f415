# SPDX-License-Identifier: Apache-2.0
"""Whether the error of reuse is still the one that was calibrated."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

# Canaries that a verdict needs, and how many of the latest it looks at.
MIN_CANARIES = 8
WINDOW = 64
# Standard errors of a two-sided 95 % interval.
_INTERVAL = 1.96
# Half-width of the calibrated band in standard deviations of a text's error: the mean of a window
# varies far less than a text, so a traffic whose mean is out there is of another kind.
_BAND = 2.0


@dataclass(frozen=True)
class Band:
    """What calibration saw of a layer: mean and standard deviation of a text's relative error."""

    mean: float
    deviation: float

    @property
    def upper(self) -> float:
        """Largest mean error that still counts as calibrated."""
        return self.mean + _BAND * self.deviation


class RunningError:
    """The relative errors of the latest canaries of one layer."""

    def __init__(self) -> None:
        self._errors: deque[float] = deque(maxlen=WINDOW)

    def add(self, error: float) -> None:
        self._errors.append(error)

    def clear(self) -> None:
        self._errors.clear()

    def __len__(self) -> int:
        return len(self._errors)

    @property
    def mean(self) -> float:
        """NaN if there are none."""
        return sum(self._errors) / len(self) if self._errors else math.nan

    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean by the normal approximation; infinitely wide below two."""
        if len(self) < 2:
            return -math.inf, math.inf
        mean = self.mean
        variance = sum((error - mean) ** 2 for error in self._errors) / (len(self) - 1)
        half = _INTERVAL * math.sqrt(variance / len(self))
        return mean - half, mean + half

    def has_left(self, band: Band) -> bool:
        """Whether the mean is above the band with confidence; errors that are not finite always
        are, and nothing is decided on a handful of canaries."""
        if any(not math.isfinite(error) for error in self._errors):
            return True
        return len(self) >= MIN_CANARIES and self.interval()[0] > band.upper
