# SPDX-License-Identifier: Apache-2.0
"""The entries of an open store: finding, checking and loading their records."""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attncache_vllm.errors import StoreDamaged, StoreError
from attncache_vllm.store.index import raise_if_late
from attncache_vllm.store.manifest import Entry, Segment
from attncache_vllm.store.protocol import Record
from attncache_vllm.store.records import (
    Layout,
    assemble,
    check_section,
    read_layout,
    sketch_of,
    token_ids_of,
)
from attncache_vllm.store.segments import SegmentReader

logger = logging.getLogger(__name__)

# How many leading sections of a record must be sound before these may be read.
_TOKEN_IDS, _SKETCH = 1, 2


class EntryTable:
    """Entries by id, which is their number in the order of writing, and what is known of them.

    ``segments`` may be a writer's own list: it is looked at anew for every record. ``on_damaged``
    is told each damaged entry's id once. Loading is safe from several threads; one may add.
    """

    def __init__(
        self,
        folder: Path,
        entries: Sequence[Entry],
        segments: Sequence[Segment],
        on_damaged: Callable[[int], None],
    ) -> None:
        self.entries = list(entries)
        self.damaged: dict[int, str] = {}
        self._folder = folder
        self._segments = segments
        self._on_damaged = on_damaged
        self._files = SegmentReader(folder)
        self._ids = {entry.token_hash: i for i, entry in enumerate(self.entries)}
        self._checked: dict[int, int] = {}  # entry id -> leading sections known to be sound

    def add(self, entry: Entry) -> int:
        self.entries.append(entry)
        self._ids[entry.token_hash] = len(self.entries) - 1
        return len(self.entries) - 1

    def id_of(self, token_hash: bytes) -> int | None:
        return self._ids.get(token_hash)

    def load(self, entry_id: int, deadline: float) -> Record | None:
        """The record, or ``None`` if it is damaged or gone, which is logged the first time.

        Checksums are computed once per section. A call that runs late, which is a ``StoreTimeout``,
        has still checked one section more, so that repeated calls get there.
        """
        sound = self._sound(entry_id, deadline)
        return None if sound is None else assemble(*sound)

    def token_ids(self, entry_id: int, deadline: float) -> NDArray[np.int32] | None:
        """As ``load``, but reads and checks the token ids only."""
        sound = self._sound(entry_id, deadline, _TOKEN_IDS)
        return None if sound is None else token_ids_of(*sound)

    def sound_sketches(self) -> Iterator[NDArray[np.uint64]]:
        """The sketch of every entry that is not damaged as far as it was read, in order."""
        for entry_id in range(len(self.entries)):
            sound = self._sound(entry_id, math.inf, _SKETCH)
            if sound is not None:
                yield sketch_of(*sound)

    def sound_records(self) -> Iterator[tuple[int, Record]]:
        """Entry id and record of every entry that is not damaged, in order."""
        for entry_id in range(len(self.entries)):
            record = self.load(entry_id, math.inf)
            if record is not None:
                yield entry_id, record

    def check_all(self) -> list[tuple[int, str]]:
        """Check every byte of every entry again; the ids of damaged ones, each with the reason."""
        damaged = []
        for entry_id in range(len(self.entries)):
            try:
                record, layout = self._view(entry_id)
                for section in layout.sections():
                    check_section(record, section)
            except StoreDamaged as error:
                damaged.append((entry_id, str(error)))
                self._mark_damaged(entry_id, str(error))
        return damaged

    def close(self) -> None:
        self._files.close()

    def _sound(
        self, entry_id: int, deadline: float, sections: int | None = None
    ) -> tuple[memoryview, Layout] | None:
        """A record of which the leading ``sections`` (all) are sound, else ``None``."""
        if entry_id in self.damaged:
            return None
        try:
            record, layout = self._view(entry_id)
            for number, section in enumerate(itertools.islice(layout.sections(), sections)):
                if number >= self._checked.get(entry_id, 0):
                    check_section(record, section)
                    self._checked[entry_id] = number + 1
                    raise_if_late(deadline)
        except StoreDamaged as error:
            self._mark_damaged(entry_id, str(error))
            return None
        raise_if_late(deadline)
        return record, layout

    def _view(self, entry_id: int) -> tuple[memoryview, Layout]:
        if not 0 <= entry_id < len(self.entries):
            raise StoreError(
                f"an entry id must be one that lookup or put returned, from 0 to "
                f"{len(self.entries) - 1}, got {entry_id!r}"
            )
        entry = self.entries[entry_id]
        record = self._files.view(self._segments[entry.segment], entry.offset, entry.size)
        layout = read_layout(record)
        if (layout.token_hash, layout.length) != (entry.token_hash, entry.length):
            raise StoreDamaged("the record is not that of its entry")
        return record, layout

    def _mark_damaged(self, entry_id: int, reason: str) -> None:
        if entry_id not in self.damaged:
            self.damaged[entry_id] = reason
            self._on_damaged(entry_id)
            logger.warning("%s: entry %d is skipped: %s", self._folder, entry_id, reason)
