# SPDX-License-Identifier: Apache-2.0
"""Nearest-neighbour search over the features of a store, on top of faiss."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import faiss
import numpy as np
from numpy.typing import NDArray

from attncache_vllm.errors import StoreError, StoreTimeout
from attncache_vllm.store.protocol import Neighbour

Features = NDArray[np.float32]


def build_index(features: Features, factory: str) -> faiss.Index:
    """Train and fill the faiss index that ``factory`` names (L2) with ``features`` ``[N, F]``.

    Raises:
        StoreError: faiss does not know the factory, or cannot train it with N rows.
    """
    try:
        index = faiss.index_factory(features.shape[1], factory, faiss.METRIC_L2)
        index.train(features)
        index.add(features)
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
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._ascending = np.sort(self._lengths)

    def forget(self, entry_id: int) -> None:
        """Never answer with ``entry_id`` again; an id that is not indexed is ignored."""
        if entry_id < len(self._lengths):
            # A new array, so that a search in another thread keeps a consistent pair.
            lengths = self._lengths.copy()
            lengths[entry_id] = 0
            self._lengths, self._ascending = lengths, np.sort(lengths)

    def search(
        self, queries: Features, lengths: Sequence[int], neighbours: int, deadline: float
    ) -> list[list[Neighbour]]:
        """The nearest entries that are long enough, nearest first; see ``MapStore.lookup``.

        An exact index ("Flat") gives the true nearest. Entries are proposed in growing numbers
        until enough are long enough or faiss has no more to propose.
        """
        dim = self._features.shape[1]
        if queries.ndim != 2 or queries.shape != (len(lengths), dim):
            raise StoreError(
                f"features must be [{len(lengths)}, {dim}], got {list(queries.shape)!r}"
            )
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        entry_lengths, ascending = self._lengths, self._ascending
        total = len(entry_lengths)
        long_enough = total - np.searchsorted(ascending, np.maximum(lengths, 1))
        wanted = np.minimum(long_enough, max(neighbours, 0))

        answers: list[list[Neighbour]] = [[] for _ in lengths]
        pending = np.flatnonzero(wanted)
        # Twice what would do if length and distance were independent.
        rarity = np.max(wanted * total / np.maximum(long_enough, 1), initial=0)
        proposals = 2 * max(neighbours, int(rarity))
        while pending.size:
            raise_if_late(deadline)
            proposals = min(total, proposals)
            with _one_thread():
                _, proposed = self._index.search(queries[pending], proposals)
            unanswered = []
            for query, ids in zip(pending.tolist(), proposed, strict=True):
                ids = ids[ids >= 0]
                ids = ids[entry_lengths[ids] >= max(lengths[query], 1)]
                if len(ids) >= wanted[query] or proposals == total:
                    closest = self._closest(queries[query], ids[: 4 * neighbours])[:neighbours]
                    answers[query] = [
                        Neighbour(entry_id, distance, int(entry_lengths[entry_id]))
                        for distance, entry_id in closest
                    ]
                else:
                    unanswered.append(query)
            pending = np.asarray(unanswered, dtype=np.int64)
            proposals *= 8
        raise_if_late(deadline)
        return answers

    def _closest(self, query: Features, ids: NDArray[np.int64]) -> list[tuple[float, int]]:
        distances = np.linalg.norm(self._features[ids] - query, axis=1)
        return sorted(zip(distances.tolist(), ids.tolist(), strict=True))


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
