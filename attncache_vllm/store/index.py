# SPDX-License-Identifier: Apache-2.0
"""Nearest-neighbour search over the features of a store, on top of faiss."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from attncache_vllm.errors import StoreError, StoreTimeout
from attncache_vllm.store.found import Found, answers_of, nothing
from attncache_vllm.store.protocol import Neighbour

Features = NDArray[np.float32]
Ids = NDArray[np.int64]

# Where fewer than one entry in so many will do for a query, it is compared with these directly. On
# one core, with 100,000 rows of 128 dimensions, both ways take about as long at this share.
_RARE = 64
# Queries are asked together if their entries begin and end in the same of so many parts.
_PARTS = 4
# Of how many candidates for each neighbour distances are computed from the features: codes tell
# entries of one kind apart only roughly, and a feature comes from memory, not from a cache.
_CANDIDATES = 4

AUTO = "auto"
EXACT = "Flat"
# Rows up to which comparing 32 queries with all of them takes about as long as an inverted file.
_EXACT_UP_TO = 8192
# How many of its lists an inverted file looks through.
_PROBES = 32
# Farther than any feature: what is forgotten must not stand before what is not.
_FAR = 1e15


def chosen_factory(factory: str, rows: int, dim: int) -> str:
    """``factory``, or what ``auto`` stands for: an exact index, and beyond 8,192 rows an inverted
    file of about twice as many lists as the square root of the rows.

    Its lists are of product codes, 4 bits for each pair of values (for each value, if their number
    is odd), which faiss compares a register at a time: they only propose.
    """
    if factory != AUTO:
        return factory
    if rows <= _EXACT_UP_TO:
        return EXACT
    return f"IVF{2 ** round(math.log2(2 * rows**0.5))},PQ{dim if dim % 2 else dim // 2}x4fs"


def build_index(features: Features, factory: str) -> faiss.IndexIVF | None:
    """Train and fill the inverted file that ``factory`` names (L2) with ``features`` ``[N, F]``;
    None for ``Flat``, which is the features themselves.

    It is set to look through 32 of its lists.

    Raises:
        StoreError: faiss does not know the factory, cannot train it with N rows, or makes another
            kind of index of it: others cannot be asked for entries of some lengths only.
    """
    if factory == EXACT:
        return None
    try:
        index = faiss.index_factory(features.shape[1], factory, faiss.METRIC_L2)
        if not isinstance(index, faiss.IndexIVF):
            raise RuntimeError("it is no inverted file")
        index.train(features)
        index.add(features)
    except RuntimeError as error:
        raise StoreError(
            "the index factory must be 'auto', 'Flat', or an inverted file that faiss can build "
            f"from {len(features)} rows, got {factory!r}; 'auto' always works "
            f"({_first_line(error)})"
        ) from error
    index.nprobe = min(index.nlist, _PROBES)
    return index


class FeatureIndex:
    """The features of entries in order of their lengths, so that those of some lengths are a range
    of rows; and an inverted file over them where there are many.

    Distances are computed from the features themselves: a compressed index only estimates them, and
    a gate that compares them must not depend on the choice of an index.
    """

    def __init__(self, features: Features, lengths: Sequence[int], factory: str = AUTO) -> None:
        """
        Args:
            features: float32 ``[N, F]``, finite; copied.
            lengths: tokens of each entry.
            factory: as for ``chosen_factory`` and ``build_index``.

        Raises:
            StoreError: see ``build_index``.
        """
        of_entry = np.asarray(lengths, dtype=np.int64)
        self._ids: Ids = np.argsort(of_entry, kind="stable")
        self._rows = np.empty_like(self._ids)
        self._rows[self._ids] = np.arange(len(self._ids))
        self._lengths = of_entry[self._ids]
        self._features = np.ascontiguousarray(features[self._ids], dtype=np.float32)
        self._inverted = build_index(self._features, chosen_factory(factory, *features.shape))
        self._alive: NDArray[np.bool_] = np.ones(len(of_entry), dtype=np.bool_)
        # The same in bits, as faiss takes it, once something was forgotten.
        self._present: NDArray[np.uint8] | None = None

    def features_of(self, entry_ids: Ids) -> Features:
        """The features of entries that are not forgotten, ``[N, F]``."""
        return self._features[self._rows[entry_ids]]

    def forget(self, *entry_ids: int) -> None:
        """Never answer with ``entry_ids`` again; an id that is not indexed is ignored."""
        rows = [self._rows[i] for i in entry_ids if i < len(self._rows)]
        if rows:
            # A new one, so that a search in another thread keeps a consistent one.
            alive = self._alive.copy()
            alive[rows] = False
            self._alive = alive
            self._present = np.packbits(alive, bitorder="little")
            self._features[rows] = _FAR

    def search(
        self,
        queries: Features,
        lengths: Sequence[tuple[int, int]],
        neighbours: int,
        deadline: float,
    ) -> list[list[Neighbour]]:
        """The nearest entries of a length that will do, nearest first; see ``MapStore.lookup``.

        An exact index ("Flat") gives the true nearest, and so does any where few entries have a
        length that will do.
        """
        found = self.nearest(queries, lengths, neighbours, deadline)
        return [[Neighbour(*answer) for answer in answers] for answers in answers_of(found)]

    def nearest(
        self,
        queries: Features,
        lengths: Sequence[tuple[int, int]],
        neighbours: int,
        deadline: float,
    ) -> Found:
        """As ``search``, in arrays. Where two are as near, the one with the smaller id is first."""
        dim = self._features.shape[1]
        if queries.ndim != 2 or queries.shape != (len(lengths), dim):
            raise StoreError(
                f"features must be [{len(lengths)}, {dim}], got {list(queries.shape)!r}"
            )
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        shortest, longest = np.asarray(lengths, dtype=np.int64).reshape(len(lengths), 2).T
        start = np.searchsorted(self._lengths, shortest, side="left")
        stop = np.searchsorted(self._lengths, longest, side="right")
        neighbours = max(neighbours, 0)
        asked = (start < stop) & np.isfinite(queries).all(axis=1) & (neighbours > 0)
        groups = self._groups(start, stop, np.flatnonzero(asked))
        probes = self._probes(queries) if any(self._is_wide(*span) for span in groups) else None
        rows = np.full((len(lengths), _CANDIDATES * neighbours), -1, dtype=np.int64)
        shared = np.zeros(len(lengths), dtype=np.bool_)
        for (first, last), group in groups.items():
            raise_if_late(deadline)
            self._propose(rows, group, queries, probes, first, last)
            shared[group] = (start[group] > first) | (stop[group] < last)
        rows[(rows < start[:, None]) | (rows >= stop[:, None])] = -1
        few = np.count_nonzero(rows >= 0, axis=1) < np.minimum(neighbours, stop - start)
        for query in np.flatnonzero(shared & few).tolist():
            raise_if_late(deadline)
            # Others than it may have were nearer: among its own alone, then.
            rows[query] = -1
            self._propose(rows, [query], queries, probes, int(start[query]), int(stop[query]))
        found = self._best(queries, rows, neighbours)
        raise_if_late(deadline)
        return found

    def _groups(self, start: Ids, stop: Ids, asked: Ids) -> dict[tuple[int, int], list[int]]:
        """Queries by ranges of rows that hold theirs and little more."""
        part = max(1, len(self._ids) // _PARTS)
        groups: dict[tuple[int, int], list[int]] = {}
        for query in asked.tolist():
            first = int(start[query]) // part * part
            last = min(len(self._ids), -(-int(stop[query]) // part) * part)
            if (stop[query] - start[query]) * 2 <= last - first:
                first, last = int(start[query]), int(stop[query])
            groups.setdefault((first, last), []).append(query)
        return groups

    def _is_wide(self, first: int, last: int) -> bool:
        """Whether the inverted file is asked for a range of rows."""
        return self._inverted is not None and (last - first) * _RARE > len(self._ids)

    def _probes(self, queries: Features) -> tuple[Features, Ids]:
        """Distances and numbers of the lists to look through for each query, ``[B, nprobe]``."""
        assert self._inverted is not None
        with _one_thread():
            distances, lists = self._inverted.quantizer.search(queries, self._inverted.nprobe)
        return distances, lists

    def _propose(
        self,
        rows: Ids,
        group: list[int],
        queries: Features,
        probes: tuple[Features, Ids] | None,
        first: int,
        last: int,
    ) -> None:
        """Put rows from ``first`` to ``last`` near each query of a group into ``rows``; ``probes``
        are those of all queries, which a wide range needs."""
        most = min(rows.shape[1], last - first)
        asked = queries[group]
        if probes is None or not self._is_wide(first, last):
            with _one_thread():
                _, found = faiss.knn(asked, self._features[first:last], most)
            found[found >= 0] += first
        else:
            index: Any = self._inverted
            # faiss keeps pointers only: all of these live until it has answered. Rows were added in
            # their order, so that in a list a range of them lies side by side.
            within, bits = faiss.IDSelectorRange(first, last, True), self._present
            parameters = faiss.SearchParametersIVF()
            parameters.nprobe = index.nprobe
            parameters.sel = within
            if bits is not None:
                present = faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits))
                both = faiss.IDSelectorAnd(within, present)
                parameters.sel = both
            away, lists = (np.ascontiguousarray(part[group]) for part in probes)
            distances = np.empty((len(group), most), dtype=np.float32)
            found = np.empty((len(group), most), dtype=np.int64)
            pointers = map(faiss.swig_ptr, (lists, away, distances, found))
            with _one_thread():
                # faiss' own for Python, without the suffix, takes no parameters.
                index.search_preassigned_c(
                    len(group), faiss.swig_ptr(asked), most, *pointers, False, parameters
                )
        rows[group, :most] = found

    def _best(self, queries: Features, rows: Ids, most: int) -> Found:
        """The entries in ``rows`` ``[B, K]`` that are not forgotten: ``most`` of them, nearest
        first."""
        found = nothing(len(rows), most, np.float32)
        absent = (rows < 0) | ~self._alive[rows]
        distances = np.empty(rows.shape, dtype=np.float32)
        native: Any = faiss  # whose types know nothing of this function
        pointers = map(native.swig_ptr, (distances, queries, self._features, rows))
        with _one_thread():
            native.fvec_L2sqr_by_idx(*pointers, queries.shape[1], *rows.shape)
        np.sqrt(distances, out=distances)
        distances[absent] = np.inf
        ids = self._ids[rows]
        best = np.lexsort((ids, distances), axis=1)[:, :most]
        present = ~np.take_along_axis(absent, best, 1)
        for out, values in zip(found, (ids, distances, self._lengths[rows]), strict=True):
            np.copyto(out, np.take_along_axis(values, best, 1), where=present)
        return found


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
