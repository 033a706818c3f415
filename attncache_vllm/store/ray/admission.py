# SPDX-License-Identifier: Apache-2.0
"""New entries on their way to a store: in the background, bounded, and each once."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition, Thread

from attncache_vllm.store.index import Features
from attncache_vllm.store.protocol import Record

logger = logging.getLogger(__name__)

# Ids that are remembered, so that a text that comes again and again is not sent again and again.
_REMEMBERED = 1 << 16


@dataclass(frozen=True, eq=False)
class Admitted:
    """An entry to be sent."""

    entry_id: int
    tenant: str
    feature: Features
    record: Record

    @property
    def nbytes(self) -> int:
        return sum(encoded.nbytes for encoded in self.record.maps.values())


class Admission:
    """A bounded queue with one thread that empties it at a bounded rate.

    Args:
        send: what an entry is given to; what it raises is the entry's loss, which is counted.
        max_bytes: of the maps that wait.
        bytes_per_second: of the maps that are sent, on average.
    """

    def __init__(
        self,
        send: Callable[[Admitted], None],
        max_bytes: int,
        bytes_per_second: float,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._send = send
        self._max_bytes = max_bytes
        self._rate = bytes_per_second
        self._sleep = sleep
        self._waiting: deque[Admitted] = deque()
        self._bytes = 0
        self._known: OrderedDict[int, None] = OrderedDict()
        self._changed = Condition()
        self._closed = False
        self._dropping = False
        self.dropped = 0
        """Entries that found no room or could not be sent."""
        Thread(target=self._empty, name="attncache-admission", daemon=True).start()

    def offer(self, entry: Admitted) -> bool:
        """Queue an entry up; False if it was offered lately, or there is no room, which counts."""
        with self._changed:
            if entry.entry_id in self._known:
                self._known.move_to_end(entry.entry_id)
                return False
            if self._closed or self._bytes + entry.nbytes > self._max_bytes:
                self._drop("they come faster than they are sent")
                return False
            self._known[entry.entry_id] = None
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
            self._waiting.append(entry)
            self._bytes += entry.nbytes
            self._changed.notify()
            return True

    def knows(self, entry_id: int) -> bool:
        """Whether it was offered lately, and not lost."""
        with self._changed:
            return entry_id in self._known

    def close(self) -> None:
        """Forget what waits."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify()

    def _empty(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                entry = self._waiting.popleft()
                self._bytes -= entry.nbytes
            try:
                self._send(entry)
            except Exception as error:
                with self._changed:
                    self._drop(str(error))
                    # So that it is taken when it is offered again.
                    self._known.pop(entry.entry_id, None)
            else:
                with self._changed:
                    if self._dropping and not self._waiting:
                        self._dropping = False
                        logger.warning("new entries are no longer dropped")
            self._sleep(entry.nbytes / self._rate)

    def _drop(self, reason: str) -> None:
        """Count a loss; the first since all that waited was sent is logged."""
        self.dropped += 1
        if not self._dropping and not self._closed:
            self._dropping = True
            logger.warning("new entries are dropped for now: %s", reason)
