# SPDX-License-Identifier: Apache-2.0
"""Decoded maps kept in memory, so that a popular entry is decoded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(frozen=True)
class ResidentStats:
    """Hits and misses since the start; bytes and entries held now."""

    hits: int
    misses: int
    bytes: int
    entries: int


class ResidentSet(Generic[K, V]):
    """A least-recently-used cache bounded in bytes; safe to share between threads.

    Args:
        max_bytes: bound on the sum of the `nbytes` given to `put`; 0 keeps nothing.

    Raises:
        ValueError: `max_bytes` is negative.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be >= 0, got {max_bytes!r}; 0 keeps nothing")
        self.max_bytes = max_bytes
        self._items: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._lock = Lock()
        self._bytes = self._hits = self._misses = 0

    def get(self, key: K) -> V | None:
        """The value of `key`, which becomes the most recently used; None if it is not held."""
        with self._lock:
            item = self._items.get(key)
            if item is None:
                self._misses += 1
                return None
            self._hits += 1
            self._items.move_to_end(key)
            return item[0]

    def put(self, key: K, value: V, nbytes: int) -> None:
        """Hold `value` under `key`, replacing an older one and evicting the least recently used.

        A value bigger than the whole bound is not kept, and evicts nothing else.

        Raises:
            ValueError: `nbytes` is negative.
        """
        if nbytes < 0:
            raise ValueError(f"nbytes must be >= 0, got {nbytes!r}; pass the value's real size")
        with self._lock:
            if key in self._items:
                self._bytes -= self._items.pop(key)[1]
            if nbytes > self.max_bytes:
                return
            self._items[key] = (value, nbytes)
            self._bytes += nbytes
            while self._bytes > self.max_bytes:
                self._bytes -= self._items.popitem(last=False)[1][1]

    def stats(self) -> ResidentStats:
        """A consistent snapshot of the counters."""
        with self._lock:
            return ResidentStats(self._hits, self._misses, self._bytes, len(self._items))
