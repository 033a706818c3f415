# SPDX-License-Identifier: Apache-2.0
"""An index that entries join and leave at any time, made of indexes that cannot grow.

The logarithmic method (Bentley and Saxe, J. Algorithms 1, 1980): entries lie in a few levels, each
an index built once, each bigger than all smaller ones together. What is added is a level of its own
at first; ``compact`` builds those of like size into one. So an entry is built anew a logarithmic
number of times, and a search looks through a logarithmic number of levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from attncache_vllm.store.found import Found, found_of, merge
from attncache_vllm.store.index import FeatureIndex, Features, Ids
from attncache_vllm.store.sketches import Sketch, SketchIndex, encode_sketches

# Levels with fewer entries are made one: looking into a level costs more than building such a one.
_SMALLEST = 1024


class GrowingIndex:
    """The features, sketches and lengths of entries by id. Safe to share between threads: a search
    goes by the levels that it found at its start, and waits for nobody."""

    def __init__(self) -> None:
        self._levels: tuple[_Level, ...] = ()
        self._changing = Lock()
        self._compacting = Lock()

    def __len__(self) -> int:
        return sum(level.alive for level in self._levels)

    def add(
        self,
        ids: Sequence[int],
        features: Features,
        sketches: Sequence[Sketch],
        lengths: Sequence[int],
    ) -> None:
        """Make N entries findable at once.

        Args:
            ids: N different ones, of which none is here.
            features: float32 ``[N, F]``, finite, with the same F every time.
            sketches: N times uint64 ``[at most 256]``, ascending.
            lengths: tokens of each entry, at least 1.
        """
        if not ids:
            return
        level = _Level(
            np.asarray(ids, dtype=np.int64),
            np.asarray(features, dtype=np.float32),
            list(sketches),
            np.asarray(lengths, dtype=np.int64),
        )
        with self._changing:
            self._levels += (level,)

    def remove(self, ids: Sequence[int]) -> None:
        """Find ``ids`` no longer; those that are not here are ignored."""
        with self._changing:
            for level in self._levels:
                level.forget(ids)
            self._levels = tuple(level for level in self._levels if level.alive)

    def compact(self) -> None:
        """Build levels of like size into one, and those anew of which half is gone.

        Nobody waits for it: while it runs in one thread it returns at once in another, and
        searches, ``add`` and ``remove`` go on.
        """
        if not self._compacting.acquire(blocking=False):
            return
        try:
            while old := self._due():
                new = _Level.of(old)
                with self._changing:
                    gone = np.setdiff1d(new.ids, np.concatenate([lv.findable() for lv in old]))
                    new.forget(gone.tolist())
                    kept = tuple(level for level in self._levels if level not in old)
                    self._levels = (*kept, new) if new.alive else kept
        finally:
            self._compacting.release()

    def lookup(
        self,
        features: Features,
        lengths: Sequence[tuple[int, int]],
        neighbours: int,
        deadline: float,
    ) -> Found:
        """See ``MapStore.lookup``. Where two are as near, the one with the smaller id is first."""
        parts = [
            level.own(level.index.nearest(features, lengths, neighbours, deadline))
            for level in self._levels
        ]
        return merge(parts, len(lengths), neighbours, np.float32)

    def overlaps(self, sketches: Sequence[Sketch], neighbours: int, deadline: float) -> Found:
        """See ``MapStore.overlaps``. Of as many in common, the one with the smaller id is first."""
        parts = []
        for level in self._levels:
            answers = [
                [(o.entry_id, o.common, o.length) for o in answer]
                for answer in level.sketches.search(sketches, neighbours, deadline)
            ]
            parts.append(level.own(found_of(answers, neighbours, np.int64)))
        return merge(parts, len(sketches), neighbours, np.int64)

    def _due(self) -> tuple[_Level, ...]:
        """Levels to be built into one: the smaller ones up to the last that is not bigger than
        those below it together, else one of which half is gone; none if all is well."""
        ascending = sorted(self._levels, key=lambda level: level.alive)
        below, due = 0, 0
        for number, level in enumerate(ascending):
            if number and level.alive <= max(below, _SMALLEST):
                due = number + 1
            below += level.alive
        if due:
            return tuple(ascending[:due])
        return tuple(level for level in ascending if 2 * level.alive < len(level.ids))[:1]


class _Level:
    """Entries in an index that was built once, by rows in order of their ids."""

    def __init__(self, ids: Ids, features: Features, sketches: list[Sketch], lengths: Ids) -> None:
        order = np.argsort(ids)  # of ties the first row wins, which must be the smallest id
        self.ids, self._lengths = ids[order], lengths[order]
        data = encode_sketches([sketches[row] for row in order.tolist()])
        words = np.frombuffer(data, dtype="<u8")
        self._ends = len(ids) + np.cumsum(words[: len(ids)], dtype=np.int64)
        self._words = words
        self.index = FeatureIndex(features[order], self._lengths.tolist())
        self.sketches = SketchIndex(data, self._lengths.tolist())
        self._findable: NDArray[np.bool_] = np.ones(len(ids), dtype=np.bool_)
        self.alive = len(ids)

    @classmethod
    def of(cls, levels: Sequence[_Level]) -> _Level:
        """What is findable in ``levels`` now."""
        rows = [np.flatnonzero(level._findable) for level in levels]
        pairs = list(zip(levels, rows, strict=True))
        return cls(
            np.concatenate([level.ids[at] for level, at in pairs]),
            np.concatenate([level.index.features_of(at) for level, at in pairs]),
            [level._sketch(row) for level, at in pairs for row in at.tolist()],
            np.concatenate([level._lengths[at] for level, at in pairs]),
        )

    def _sketch(self, row: int) -> Sketch:
        return self._words[self._ends[row] - self._words[row].astype(np.int64) : self._ends[row]]

    def own(self, found: Found) -> Found:
        """What was found in rows, with the ids of the entries."""
        rows, values, lengths = found
        return np.where(rows < 0, -1, self.ids[rows]), values, lengths

    def findable(self) -> Ids:
        return self.ids[self._findable]

    def forget(self, ids: Sequence[int]) -> None:
        """Find ``ids`` no longer; those of other levels are ignored."""
        asked = np.unique(np.asarray(ids, dtype=np.int64))
        rows = np.searchsorted(self.ids, asked)
        here = rows < len(self.ids)
        rows = rows[here][self.ids[rows[here]] == asked[here]]
        rows = rows[self._findable[rows]]
        if rows.size:
            self.index.forget(*rows.tolist())
            self.sketches.forget(*rows.tolist())
            self._findable[rows] = False
            self.alive -= len(rows)
