# SPDX-License-Identifier: Apache-2.0
"""The reading half of a shard: searches, loads, and what is forgotten on the way."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attncache_vllm.errors import StoreDamaged, StoreError
from attncache_vllm.store.found import Found, Values, nothing
from attncache_vllm.store.index import Features, Ids
from attncache_vllm.store.ray.catalogue import Catalogue
from attncache_vllm.store.ray.envelope import Head
from attncache_vllm.store.ray.files import EntryFiles
from attncache_vllm.store.ray.growing import GrowingIndex
from attncache_vllm.store.ray.kept import Entry, KeptEntries, Key, Limits
from attncache_vllm.store.sketches import Sketch

logger = logging.getLogger(__name__)

Bytes = NDArray[np.uint8]

MAX_NEIGHBOURS = 1 << 10


class Exported(NamedTuple):
    """An entry as ``put`` of another shard takes it: ``record`` is a read-only memory map, and
    ``age_s`` the seconds since it was first kept."""

    tenant: str
    feature: Features
    record: Bytes
    age_s: float


class ShardReader:
    """What a ``Shard`` answers; arguments are those of a ``Shard``."""

    def __init__(
        self, folder: Path, limits: Limits, key: bytes | None, monotonic: Callable[[], float]
    ) -> None:
        self._limits = limits
        self._monotonic = monotonic
        self._catalogue = Catalogue(folder)
        self._files = EntryFiles(folder, key)
        self._kept = KeptEntries(limits)
        self._indexes: dict[tuple[str, str], GrowingIndex] = {}  # by edition and tenant
        self._counts: Counter[str] = Counter()
        # Of the three above. Not held while a record is read or an index searched.
        self._mutex = RLock()

    def edition(self, digest: str) -> bytes | None:
        """What was published under ``digest``; None if nothing was, or it is damaged."""
        return self._catalogue.read(digest)

    def editions(self) -> dict[str, dict[str, Any]]:
        """Digest to ``{"namespace": Namespace.to_dict(), "current": bool, "entries": int}``."""
        with self._mutex:
            return {
                digest: {
                    "namespace": known.namespace.to_dict(),
                    "current": self.current(known.namespace.digest()) == digest,
                    "entries": len(self._kept.of(digest)),
                }
                for digest, known in dict(self._catalogue.known).items()
            }

    def current(self, namespace: str) -> str | None:
        """The digest of the edition published last for the namespace of this digest."""
        return self._catalogue.current(namespace)

    def lookup(
        self,
        edition: str,
        tenants: Sequence[str],
        features: Features,
        lengths: Ids,
        neighbours: int,
    ) -> Found:
        """The nearest entries of B queries, as ``MapStore.lookup`` has it; of an unknown edition
        none.

        Args:
            edition: digest of what the features were made with.
            tenants: whose entries each query may find.
            features: float32 ``[B, F]``.
            lengths: int64 ``[B, 2]``, the shortest and the longest entry that will do.
            neighbours: K, how many a query wants at most.

        Raises:
            StoreError: the arguments do not fit each other or the edition.
        """
        features, lengths = np.asarray(features), np.asarray(lengths)
        found = _nothing(len(tenants), neighbours, np.float32)
        known = self._catalogue.known.get(edition)
        dim = features.shape[-1] if known is None else known.dim
        if features.shape != (len(tenants), dim) or lengths.shape != (len(tenants), 2):
            raise StoreError(
                f"features must be [{len(tenants)}, {dim}] and lengths [{len(tenants)}, 2], "
                f"got {features.shape!r} and {lengths.shape!r}"
            )
        started = time.perf_counter()
        for index, rows in self._indexes_of(edition, tenants):
            bounds = [(int(low), int(high)) for low, high in lengths[rows]]
            answers = index.lookup(features[rows], bounds, neighbours, math.inf)
            for part, own in zip(found, answers, strict=True):
                part[rows] = own
        with self._mutex:
            self._counts["lookups"] += 1
            self._counts["lookup_us"] += round((time.perf_counter() - started) * 1e6)
        return found

    def overlaps(
        self, edition: str, tenants: Sequence[str], sketches: Sequence[Sketch], neighbours: int
    ) -> Found:
        """The entries that share most with B sketches, as ``MapStore.overlaps`` has it.

        Args:
            edition: digest of what the entries must have been made with.
            tenants: whose entries each query may find.
            sketches: B times uint64 ``[at most 256]``, distinct.
            neighbours: K, how many a query wants at most.

        Raises:
            StoreError: an argument is out of range.
        """
        if len(sketches) != len(tenants):
            raise StoreError(f"there must be {len(tenants)} sketches, got {len(sketches)!r}")
        found = _nothing(len(tenants), neighbours, np.int64)
        for index, rows in self._indexes_of(edition, tenants):
            answers = index.overlaps([sketches[row] for row in rows], neighbours, math.inf)
            for part, own in zip(found, answers, strict=True):
                part[rows] = own
        return found

    def token_ids(self, edition: str, ids: Sequence[int]) -> list[NDArray[np.int32] | None]:
        """Token ids int32 ``[length]`` of entries; None for one that is damaged or gone."""
        self._forget_expired()
        heads = (self._read(edition, entry_id, whole=False) for entry_id in ids)
        return [None if found is None else found[1].token_ids for found in heads]

    def load(self, edition: str, ids: Sequence[int]) -> list[Bytes | None]:
        """Records of entries, uint8 ``[bytes]``, read-only memory maps whose maps lie on 64-byte
        boundaries; None for one that is damaged or gone. All is checked at the first load."""
        self._forget_expired()
        records: list[Bytes | None] = []
        for entry_id in ids:
            found = self._read(edition, entry_id, whole=True)
            records.append(None if found is None else np.frombuffer(found[1].record, np.uint8))
            with self._mutex:
                self._kept.use((edition, entry_id))
        return records

    def export(self, edition: str, ids: Sequence[int]) -> list[Exported | None]:
        """What another shard's ``put`` needs to keep entries; None for one that is damaged or gone.
        That is no use of them."""
        self._forget_expired()
        exported: list[Exported | None] = []
        for entry_id in ids:
            found = self._read(edition, entry_id, whole=True)
            if found is None:
                exported.append(None)
                continue
            entry, head = found
            record = np.frombuffer(head.record, np.uint8)
            age = max(0.0, self._monotonic() - entry.born)
            exported.append(Exported(entry.tenant, head.envelope.feature, record, age))
        return exported

    def ids(
        self, edition: str, tenant: str | None = None, after: int = -1, most: int = 65_536
    ) -> Ids:
        """Ids above ``after``, ascending, int64: ``most`` of them, or fewer if there are no more.

        Args:
            edition: whose entries.
            tenant: only its entries, unless None.
            after: the last id of the page before.
            most: the size of a page.
        """
        with self._mutex:
            self._forget_expired()
            keys = self._kept.keys_of(edition, tenant)
        ids = np.fromiter((entry_id for _, entry_id in keys), np.int64, len(keys))
        return np.sort(ids[ids > after])[:most]

    def stats(self) -> dict[str, int]:
        """What is kept now, and counts since the start: ``damaged`` of entries and files that were
        found damaged, ``refused`` of records, ``lookups`` of calls of ``lookup``, which took
        ``lookup_us`` microseconds together."""
        with self._mutex:
            self._forget_expired()
            return {
                "entries": len(self._kept),
                "bytes": self._kept.bytes,
                "max_bytes": self._limits.max_bytes,
                "tenants": self._kept.tenants,
                "evicted": self._counts["evicted"],
                "expired": self._counts["expired"],
                "damaged": self._counts["damaged"] + self._catalogue.damaged,
                "refused": self._counts["refused"],
                "lookups": self._counts["lookups"],
                "lookup_us": self._counts["lookup_us"],
            }

    # -- inside -------------------------------------------------------------------------------

    def _indexes_of(
        self, edition: str, tenants: Sequence[str]
    ) -> Iterator[tuple[GrowingIndex, list[int]]]:
        """The index of each tenant that has one, and the numbers of its queries."""
        self._forget_expired()
        rows_of: dict[str, list[int]] = defaultdict(list)
        for row, tenant in enumerate(tenants):
            rows_of[tenant].append(row)
        with self._mutex:
            found = {tenant: self._indexes.get((edition, tenant)) for tenant in rows_of}
        for tenant, index in found.items():
            if index is not None:
                yield index, rows_of[tenant]

    def _read(self, edition: str, entry_id: int, *, whole: bool) -> tuple[Entry, Head] | None:
        """An entry and its file; None if it is gone or damaged, which is logged."""
        with self._mutex:
            entry = self._kept.of(edition).get(entry_id)
        if entry is None:
            return None
        try:
            head = self._files.read(edition, entry_id, whole=whole and not entry.sound)
            if head.envelope.tenant != entry.tenant:
                raise StoreDamaged("an entry must stay with its tenant")
        except StoreDamaged as error:
            with self._mutex:
                # Else it was evicted while it was read.
                if self._kept.of(edition).get(entry_id) is entry:
                    logger.warning("entry %016x is forgotten: %s", entry_id, error)
                    self._counts["damaged"] += self._forget([(edition, entry_id)])
            return None
        entry.sound |= whole
        return entry, head

    def _forget(self, keys: Iterable[Key]) -> int:
        """Forget entries and remove their files; returns how many there were."""
        with self._mutex:
            removed = self._kept.remove(keys)
            self._withdraw(removed)
        return len(removed)

    def _withdraw(self, removed: Iterable[tuple[Key, Entry]]) -> None:
        """Let what is kept no longer be found no longer. Holding the mutex, so that none of these
        is put again before its file is gone."""
        ids_of: dict[tuple[str, str], list[int]] = defaultdict(list)
        for (edition, entry_id), entry in removed:
            ids_of[edition, entry.tenant].append(entry_id)
            self._files.remove(edition, entry_id)
        for owner, ids in ids_of.items():
            self._indexes[owner].remove(ids)

    def _forget_expired(self) -> int:
        """Forget what is too old; returns how many entries that were."""
        with self._mutex:
            expired = self._forget(self._kept.expired(self._monotonic()))
            self._counts["expired"] += expired
        return expired


def _nothing(queries: int, neighbours: int, kind: Values) -> Found:
    if not 0 <= neighbours <= MAX_NEIGHBOURS:
        raise StoreError(f"neighbours must be 0 to {MAX_NEIGHBOURS}, got {neighbours!r}")
    return nothing(queries, neighbours, kind)
