# SPDX-License-Identifier: Apache-2.0
"""Search for entries that share tokens with a sequence, by what their sketches have in common.

On disk: the number of values of each entry, then their values, entry by entry; all uint64, little
endian. In memory the values are sorted as well, each with the entry it is of, so that the entries
that have a value lie side by side (its posting list).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from attncache_vllm.errors import StoreDamaged, StoreError
from attncache_vllm.store.index import Ids, raise_if_late
from attncache_vllm.store.protocol import Overlap
from attncache_vllm.store.records import MAX_SKETCH

Sketch = NDArray[np.uint64]

# How far a posting list is followed. A beginning that all entries share would otherwise be looked
# at entry by entry, although it tells none of them apart.
MAX_POSTINGS = 64
# Of at least so many entries, those of the rarest values, what they have in common is counted.
_COUNTED = 64


def encode_sketches(sketches: Sequence[Sketch]) -> bytes:
    counts = np.array([len(sketch) for sketch in sketches], dtype="<u8")
    return b"".join([counts.tobytes(), *(sketch.astype("<u8").tobytes() for sketch in sketches)])


class SketchIndex:
    """The sketches of the first entries of a store, in memory."""

    def __init__(self, data: bytes, lengths: Sequence[int]) -> None:
        """
        Args:
            data: as ``encode_sketches`` made it; kept.
            lengths: tokens of each entry.

        Raises:
            StoreDamaged: ``data`` is not the sketches of so many entries.
        """
        rows = len(lengths)
        words = np.frombuffer(data[: len(data) // 8 * 8], dtype="<u8")
        counts = words[:rows]
        if (
            len(counts) != rows
            or (counts > MAX_SKETCH).any()
            or len(data) != 8 * (rows + int(counts.sum()))
        ):
            raise StoreDamaged(
                f"sketches must be those of {rows} entries with at most {MAX_SKETCH} values each, "
                f"got {len(data)} bytes that are not; run 'attncache build' again"
            )
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._findable = np.ones(rows, dtype=np.bool_)
        self._counts = counts.astype(np.int64)
        self._starts = np.cumsum(self._counts) - self._counts
        self._values = words[rows:]
        order = np.argsort(self._values, kind="stable")
        self._sorted = self._values[order]
        self._owners = np.repeat(np.arange(rows), self._counts)[order]

    def forget(self, *entry_ids: int) -> None:
        """Never answer with ``entry_ids`` again; an id that is not indexed is ignored."""
        self._findable[[i for i in entry_ids if i < len(self._findable)]] = False

    def search(
        self, sketches: Sequence[Sketch], neighbours: int, deadline: float
    ) -> list[list[Overlap]]:
        """The entries with most values in common, most first; see ``MapStore.overlaps``.

        Entries are proposed by the values they share, each weighed by how few entries have it, as
        a value that many share finds only the first ``MAX_POSTINGS`` of them. What the proposed
        have in common is then counted exactly.
        """
        for sketch in sketches:
            if sketch.dtype != np.uint64 or sketch.ndim != 1 or len(sketch) > MAX_SKETCH:
                raise StoreError(
                    f"a sketch must be uint64 [at most {MAX_SKETCH}], "
                    f"got {sketch.dtype} {sketch.shape!r}"
                )
        answers = []
        for sketch in sketches:
            raise_if_late(deadline)
            proposed = self._propose(sketch, max(_COUNTED, 4 * neighbours))
            common = self._common(proposed, sketch)
            order = np.lexsort((proposed, -common))[: max(neighbours, 0)]
            found = zip(proposed[order], common[order], strict=True)
            answers.append([Overlap(int(i), int(n), int(self._lengths[i])) for i, n in found])
        raise_if_late(deadline)
        return answers

    def _propose(self, sketch: Sketch, most: int) -> Ids:
        """At most ``most`` entries that share values with ``sketch``, those of the rarest first."""
        first = np.searchsorted(self._sorted, sketch, side="left")
        postings = np.searchsorted(self._sorted, sketch, side="right") - first
        followed = np.minimum(postings, MAX_POSTINGS)
        entries, place = np.unique(self._owners[_ranges(first, followed)], return_inverse=True)
        weights = np.repeat(1 / np.maximum(postings, 1), followed)
        weight = np.bincount(place, weights, minlength=len(entries))
        weight[~self._findable[entries]] = 0
        proposed = np.argsort(-weight, kind="stable")[: min(most, np.count_nonzero(weight))]
        return entries[proposed]

    def _common(self, entries: Ids, sketch: Sketch) -> Ids:
        """How many values each of ``entries`` has in common with ``sketch``."""
        counts = self._counts[entries]
        shared = np.isin(self._values[_ranges(self._starts[entries], counts)], sketch)
        owners = np.repeat(np.arange(len(entries)), counts)
        return np.bincount(owners[shared], minlength=len(entries))


def _ranges(starts: Ids, sizes: Ids) -> Ids:
    """``start, start + 1, ...`` of each size, one after the other."""
    offsets = starts - (np.cumsum(sizes) - sizes)
    return np.repeat(offsets, sizes) + np.arange(sizes.sum())
