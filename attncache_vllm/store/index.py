# SPDX-License-Identifier: Apache-2.0
"""Nearest-neighbour search over the features of a store, on top of faiss."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import faiss
import numpy as np
from numpy.typing import NDArray

from attncache_vllm.errors import StoreError, StoreTimeout
from attncache_vllm.store.protocol import Neighbour

Features = NDArray[np.float32]
Ids = NDArray[np.int64]

# Where fewer than one entry in so many will do for a query, it is compared with these directly. On
# one core, with 100,000 rows of 128 dimensions and ten neighbours, both ways take about 3 ms at
# this share; with 50 entries that will do, the direct one takes 0.03 ms, growing proposals 10 ms.
_RARE = 16

AUTO = "auto"
# Rows up to which comparing with all of them is fast enough beside a model: `benchmarks/lookup.py`.
_EXACT_UP_TO = 16_384
# An inverted file looks through one list in so many.
_LISTS_PER_PROBE = 64


def chosen_factory(factory: str, rows: int) -> str:
    """``factory``, or what ``auto`` stands for: an exact index, and beyond 16,384 rows an inverted
    file of about four times as many lists as the square root of the rows."""
    if factory != AUTO:
        return factory
    return "Flat" if rows <= _EXACT_UP_TO else f"IVF{2 ** round(math.log2(4 * rows**0.5))},Flat"


def build_index(features: Features, factory: str) -> faiss.Index:
    """Train and fill the faiss index that ``factory`` names (L2) with ``features`` ``[N, F]``.

    An inverted file is set to look through a 64th of its lists, at least one.

    Raises:
        StoreError: faiss does not know the factory, or cannot train it with N rows.
    """
    try:
        index = faiss.index_factory(features.shape[1], factory, faiss.METRIC_L2)
        index.train(features)
        index.add(features)
        inverted = faiss.try_extract_index_ivf(index)
        if inverted is not None:
            inverted.nprobe = max(1, inverted.nlist // _LISTS_PER_PROBE)
    except RuntimeError as error:
        raise StoreError(
            f"the index factory must be one faiss can build from {len(features)} rows, "
            f"got {factory!r}; 'Flat' always works ({_first_line(error)})"
        ) from error
    return index


def serialize_index(index: faiss.Index) -> bytes:
    return bytes(faiss.serialize_index(index).tobytes())


def deserialize_index(data: bytes, rows: int, dim: int) -> faiss.Index:
    """The index in ``data``, whose checksum the caller has verified: faiss parses C++ structures.

    Raises:
        StoreError: it is no index of ``rows`` vectors of ``dim`` dimensions.
    """
    try:
        index = faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))
    except RuntimeError as error:
        raise StoreError(f"faiss cannot read its index: {_first_line(error)}") from error
    if (index.ntotal, index.d) != (rows, dim):
        raise StoreError(f"the index must be {rows} x {dim}, got {index.ntotal} x {index.d}")
    return index


class FeatureIndex:
    """A faiss index that proposes entries, and the features that decide among them.

    Distances are computed from the features themselves: a compressed index only estimates them, and
    a gate that compares them must not depend on the choice of an index.
    """

    def __init__(self, index: faiss.Index, features: Features, lengths: Sequence[int]) -> None:
        self._index = index
        self._features = features
        self._lengths = _Lengths(np.asarray(lengths, dtype=np.int64))

    def forget(self, *entry_ids: int) -> None:
        """Never answer with ``entry_ids`` again; an id that is not indexed is ignored."""
        indexed = [i for i in entry_ids if i < len(self._lengths.of_entry)]
        if indexed:
            # A new object, so that a search in another thread keeps a consistent one.
            self._lengths = self._lengths.without(indexed)

    def search(
        self,
        queries: Features,
        lengths: Sequence[tuple[int, int]],
        neighbours: int,
        deadline: float,
    ) -> list[list[Neighbour]]:
        """The nearest entries of a length that will do, nearest first; see ``MapStore.lookup``.

        An exact index ("Flat") gives the true nearest. Entries are proposed in growing numbers
        until enough have a length that will do or faiss has no more to propose. Where few have
        one, these are compared directly, which is exact with any index.
        """
        dim = self._features.shape[1]
        if queries.ndim != 2 or queries.shape != (len(lengths), dim):
            raise StoreError(
                f"features must be [{len(lengths)}, {dim}], got {list(queries.shape)!r}"
            )
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        entries, total = self._lengths, len(self._features)
        shortest, longest = np.asarray(lengths, dtype=np.int64).reshape(len(lengths), 2).T
        shortest = np.maximum(shortest, 1)  # no forgotten entry
        start, stop = entries.places(shortest, longest)
        usable = stop - start
        wanted = np.minimum(usable, max(neighbours, 0))
        wanted[~np.isfinite(queries).all(axis=1)] = 0

        answers: list[list[Neighbour]] = [[] for _ in lengths]
        rare = usable * _RARE <= total
        for query in np.flatnonzero(rare & (wanted > 0)).tolist():
            ids = entries.ascending_ids[start[query] : stop[query]]
            answers[query] = self._nearest(queries[query], ids, entries, neighbours)
        pending = np.flatnonzero(~rare & (wanted > 0))
        # Twice what would do if length and distance were independent.
        rarity = np.max(wanted[pending] * total / usable[pending], initial=0)
        proposals = 2 * max(neighbours, int(rarity))
        while pending.size:
            raise_if_late(deadline)
            proposals = min(total, proposals)
            with _one_thread():
                _, proposed = self._index.search(queries[pending], proposals)
            unanswered = []
            for query, ids in zip(pending.tolist(), proposed, strict=True):
                exhausted = ids[-1] < 0  # there is no more in the lists that were looked through
                ids = ids[ids >= 0]
                found = entries.of_entry[ids]
                ids = ids[(found >= shortest[query]) & (found <= longest[query])]
                if len(ids) >= wanted[query] or proposals == total or exhausted:
                    ids = ids[: 4 * neighbours]
                    answers[query] = self._nearest(queries[query], ids, entries, neighbours)
                else:
                    unanswered.append(query)
            pending = np.asarray(unanswered, dtype=np.int64)
            proposals *= 8
        raise_if_late(deadline)
        return answers

    def _nearest(
        self, query: Features, ids: Ids, entries: "_Lengths", neighbours: int
    ) -> list[Neighbour]:
        distances = np.linalg.norm(self._features[ids] - query, axis=1)
        order = np.lexsort((ids, distances))[:neighbours]
        found = zip(ids[order], distances[order], entries.of_entry[ids[order]], strict=True)
        return [Neighbour(int(i), float(distance), int(length)) for i, distance, length in found]


class _Lengths:
    """The length of each entry, 0 for a forgotten one, and the others in order of length."""

    def __init__(self, of_entry: Ids, ascending_ids: Ids | None = None) -> None:
        self.of_entry = of_entry
        if ascending_ids is None:
            ascending_ids = np.argsort(of_entry, kind="stable")
        self.ascending_ids = ascending_ids
        self._ascending = of_entry[ascending_ids]

    def without(self, entry_ids: Sequence[int]) -> "_Lengths":
        of_entry = self.of_entry.copy()
        of_entry[entry_ids] = 0
        return _Lengths(of_entry, self.ascending_ids[of_entry[self.ascending_ids] > 0])

    def places(self, shortest: Ids, longest: Ids) -> tuple[Ids, Ids]:
        """Where in ``ascending_ids`` the lengths from shortest to longest start and stop."""
        return (
            np.searchsorted(self._ascending, shortest, side="left"),
            np.searchsorted(self._ascending, longest, side="right"),
        )


def raise_if_late(deadline: float) -> None:
    """Raise ``StoreTimeout`` once ``time.monotonic()`` has passed ``deadline``."""
    late = time.monotonic() - deadline
    if late > 0:
        raise StoreTimeout(f"a store must answer before its deadline, got {late:.3f} s late")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep faiss on the calling thread.

    A search runs beside the model's layers, on the same cores, where a team of threads waits for a
    core at every barrier: with 1,000 rows and 8 queries, on two busy cores, 16 to 32 ms instead of
    0.1 ms.
    """
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().partition("\n")[0]
