# SPDX-License-Identifier: Apache-2.0
"""What stays where there is not room for all: decoded maps in a server's memory, and the entries of
a shard."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import count
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
    """A cache bounded in bytes, which evicts by Greedy-Dual-Size-Frequency; safe to share between
    threads.

    An item's priority is ``age + uses * cost / bytes`` (Cherkasova, HP Laboratories, HPL-98-69R1,
    1998): what is used often, costs much to do without and takes few bytes stays. ``age`` is the
    priority of what was evicted last, so that what was popular once goes as well. With equal costs
    and sizes, and each item used once, the oldest goes first.

    Args:
        max_bytes: bound on the sum of the `nbytes` given to `put`; 0 keeps nothing.

    Raises:
        ValueError: `max_bytes` is negative.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be >= 0, got {max_bytes!r}; 0 keeps nothing")
        self.max_bytes = max_bytes
        self._items: dict[K, _Item[V]] = {}
        # Of an item's entries only the one with its present turn counts.
        self._queue: list[tuple[float, int, K]] = []
        self._turns = count()
        self._lock = Lock()
        self._age = 0.0
        self._bytes = self._hits = self._misses = 0

    def get(self, key: K) -> V | None:
        """The value of `key`, used once more; None if it is not held."""
        with self._lock:
            item = self._items.get(key)
            if item is None:
                self._misses += 1
                return None
            self._hits += 1
            item.uses += 1
            self._queue_up(key, item)
            return item.value

    @property
    def bytes(self) -> int:
        """Held now."""
        return self._bytes

    def put(self, key: K, value: V, nbytes: int, cost: float = 1.0) -> list[K]:
        """Hold `value` under `key`, replacing an older one and evicting what has least priority;
        returns the keys that were evicted.

        A value bigger than the whole bound is not kept, and evicts nothing else.

        Args:
            nbytes: its size.
            cost: what a use of it saves, in any unit that all items share.

        Raises:
            ValueError: `nbytes` or `cost` is negative.
        """
        if nbytes < 0 or cost < 0:
            raise ValueError(
                f"nbytes must be >= 0 and cost, too, got {nbytes!r} and {cost!r}; pass the value's "
                "real size and what it saves"
            )
        with self._lock:
            if key in self._items:
                self._bytes -= self._items.pop(key).nbytes
            if nbytes > self.max_bytes:
                return []
            evicted = []
            while self._bytes + nbytes > self.max_bytes:
                evicted.append(self._evict())
            item = _Item(value, nbytes, cost)
            self._items[key] = item
            self._bytes += nbytes
            self._queue_up(key, item)
            return evicted

    def evict(self) -> K:
        """Give up what has least priority, and return its key.

        Raises:
            ValueError: nothing is held.
        """
        with self._lock:
            if not self._items:
                raise ValueError("evict() needs something that is held, got an empty set")
            return self._evict()

    def remove(self, key: K) -> None:
        """Hold `key` no longer; one that is not held is ignored."""
        with self._lock:
            if key in self._items:
                self._bytes -= self._items.pop(key).nbytes

    def stats(self) -> ResidentStats:
        """A consistent snapshot of the counters."""
        with self._lock:
            return ResidentStats(self._hits, self._misses, self._bytes, len(self._items))

    def _queue_up(self, key: K, item: _Item[V]) -> None:
        item.turn = next(self._turns)
        priority = self._age + item.uses * item.cost / max(1, item.nbytes)
        heapq.heappush(self._queue, (priority, item.turn, key))
        # Entries that no longer count are dropped when they are most of the queue.
        if len(self._queue) > 64 + 4 * len(self._items):
            self._queue = [entry for entry in self._queue if self._counts(entry)]
            heapq.heapify(self._queue)

    def _evict(self) -> K:
        while not self._counts(entry := heapq.heappop(self._queue)):
            pass
        self._age, _, key = entry
        self._bytes -= self._items.pop(key).nbytes
        return key

    def _counts(self, entry: tuple[float, int, K]) -> bool:
        item = self._items.get(entry[2])
        return item is not None and item.turn == entry[1]


@dataclass
class _Item(Generic[V]):
    value: V
    nbytes: int
    cost: float
    uses: int = 1
    turn: int = 0
