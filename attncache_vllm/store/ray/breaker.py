# SPDX-License-Identifier: Apache-2.0
"""A circuit breaker: what fails again and again is left alone, and probed from time to time."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock
from typing import Literal

State = Literal["closed", "open", "half-open"]


class Breaker:
    """Closed: asked. Open: not asked. Half-open: one probe is under way. Safe between threads.

    Whoever asks calls ``failed`` or ``succeeded``; whoever probes waits for ``probe_due``. Only a
    success closes it, so that no caller on the hot path is ever the one to find out.

    Args:
        failures: how many in a row open it.
        cooldown: seconds until the first probe; each that fails doubles them.
        longest: bound of the doubled cooldown, in seconds.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        failures: int = 3,
        cooldown: float = 1.0,
        longest: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if failures < 1 or not 0 < cooldown <= longest:
            raise ValueError(
                "a breaker needs failures >= 1 and 0 < cooldown <= longest, "
                f"got {failures!r}, {cooldown!r} and {longest!r}"
            )
        self._failures = failures
        self._first = self._cooldown = cooldown
        self._longest = longest
        self._clock = clock
        self._lock = Lock()
        self._state: State = "closed"
        self._in_a_row = 0
        self._probe_at = 0.0

    @property
    def state(self) -> State:
        return self._state

    @property
    def closed(self) -> bool:
        """Whether it may be asked."""
        return self._state == "closed"

    def failed(self) -> bool:
        """Note a failure; True if it is the one that opens the breaker."""
        with self._lock:
            self._in_a_row += 1
            if self._state == "half-open":
                self._cooldown = min(self._longest, 2 * self._cooldown)
                self._open()
            elif self._state == "closed" and self._in_a_row >= self._failures:
                self._open()
                return True
            return False

    def succeeded(self) -> bool:
        """Note a success; True if it is the one that closes the breaker.

        The late answer of a call from before it opened says nothing about now: only that of a probe
        closes it.
        """
        with self._lock:
            if self._state == "open":
                return False
            recovered = self._state == "half-open"
            self._state = "closed"
            self._in_a_row = 0
            self._cooldown = self._first
            return recovered

    def probe_due(self) -> bool:
        """True, once, when an open breaker has cooled down: the caller must probe now."""
        with self._lock:
            if self._state != "open" or self._clock() < self._probe_at:
                return False
            self._state = "half-open"
            return True

    def _open(self) -> None:
        self._state = "open"
        self._probe_at = self._clock() + self._cooldown
