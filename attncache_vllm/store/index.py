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
# one core, with 100,000 rows of 128 dimensions, both ways take about as long at this share.
_RARE = 16
# Of how many candidates for each neighbour distances are computed from the features.
_CANDIDATES = 4

AUTO = "auto"
EXACT = "Flat"
# Rows up to which comparing with all of them is fast enough beside a model: `benchmarks/lookup.py`.
_EXACT_UP_TO = 16_384
# An inverted file looks through one list in so many.
_LISTS_PER_PROBE = 64
# Farther than any feature: what is forgotten must not stand before what is not.
_FAR = 1e15


def chosen_factory(factory: str, rows: int) -> str:
    """``factory``, or what ``auto`` stands for: an exact index, and beyond 16,384 rows an inverted
    file of about four times as many lists as the square root of the rows."""
    if factory != AUTO:
        return factory
    return EXACT if rows <= _EXACT_UP_TO else f"IVF{2 ** round(math.log2(4 * rows**0.5))},Flat"


def build_index(features: Features, factory: str) -> faiss.IndexIVF | None:
    """Train and fill the inverted file that ``factory`` names (L2) with ``features`` ``[N, F]``;
    None for ``Flat``, which is the features themselves.

    It is set to look through a 64th of its lists, at least one.

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
    index.nprobe = max(1, index.nlist // _LISTS_PER_PROBE)
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
        self._inverted = build_index(self._features, chosen_factory(factory, len(features)))
        self._alive: NDArray[np.bool_] = np.ones(len(of_entry), dtype=np.bool_)
        # The same in bits, as faiss takes it, once something was forgotten.
        self._present: NDArray[np.uint8] | None = None

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
        dim = self._features.shape[1]
        if queries.ndim != 2 or queries.shape != (len(lengths), dim):
            raise StoreError(
                f"features must be [{len(lengths)}, {dim}], got {list(queries.shape)!r}"
            )
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        shortest, longest = np.asarray(lengths, dtype=np.int64).reshape(len(lengths), 2).T
        start = np.searchsorted(self._lengths, shortest, side="left")
        stop = np.searchsorted(self._lengths, longest, side="right")
        asked = (start < stop) & np.isfinite(queries).all(axis=1) & (neighbours > 0)
        answers: list[list[Neighbour]] = [[] for _ in lengths]
        for group in _alike(start, stop, np.flatnonzero(asked)):
            raise_if_late(deadline)
            first, last = int(start[group].min()), int(stop[group[0]])
            rows = self._candidates(queries[group], first, last, _CANDIDATES * neighbours)
            rows[rows < start[group, None]] = -1
            found = self._nearest(queries[group], rows, neighbours)
            for query, of_query in zip(group, found, strict=True):
                if len(of_query) < neighbours and start[query] > first:
                    # Others than it may have were nearer: among its own alone, then.
                    alone, own = queries[query : query + 1], int(start[query])
                    rows = self._candidates(alone, own, last, _CANDIDATES * neighbours)
                    [of_query] = self._nearest(alone, rows, neighbours)
                answers[query] = of_query
        raise_if_late(deadline)
        return answers

    def _candidates(self, queries: Features, first: int, last: int, most: int) -> Ids:
        """Rows from ``first`` to ``last`` near each query, ``[B, at most most]``; -1 for none."""
        most = min(most, last - first)
        with _one_thread():
            if self._inverted is None or (last - first) * _RARE <= len(self._ids):
                _, found = faiss.knn(queries, self._features[first:last], most)
                found[found >= 0] += first
            else:
                # faiss keeps pointers only: all of these live until it has answered. Rows were
                # added in their order, so that of each list a range is looked at.
                within, bits = faiss.IDSelectorRange(first, last, True), self._present
                parameters = faiss.SearchParametersIVF()
                parameters.nprobe = self._inverted.nprobe
                parameters.sel = within
                if bits is not None:
                    present = faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits))
                    both = faiss.IDSelectorAnd(within, present)
                    parameters.sel = both
                _, found = self._inverted.search(queries, most, params=parameters)
        return found

    def _nearest(self, queries: Features, rows: Ids, neighbours: int) -> list[list[Neighbour]]:
        """The nearest of each query's own rows, ``[B, C]``, that are not forgotten."""
        apart = self._features[rows] - queries[:, None]
        distances = np.sqrt(np.einsum("bcf,bcf->bc", apart, apart))
        distances[(rows < 0) | ~self._alive[rows]] = np.inf
        ids = self._ids[rows]
        order = np.lexsort((ids, distances), axis=-1)[:, :neighbours]
        columns = (
            np.take_along_axis(of_rows, order, axis=1).tolist()
            for of_rows in (ids, distances, self._lengths[rows])
        )
        return [
            [Neighbour(*found) for found in zip(*of_query, strict=True) if found[1] < np.inf]
            for of_query in zip(*columns, strict=True)
        ]


def _alike(start: Ids, stop: Ids, asked: Ids) -> list[list[int]]:
    """Of the queries ``asked``, those together whose ranges of rows end at the same and of which
    none is twice as long as another: at least half of what is nearest to one is its own."""
    groups: dict[tuple[int, int], list[int]] = {}
    for query in asked.tolist():
        rows = int(stop[query] - start[query])
        groups.setdefault((int(stop[query]), rows.bit_length()), []).append(query)
    return list(groups.values())


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
