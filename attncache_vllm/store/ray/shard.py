# SPDX-License-Identifier: Apache-2.0
"""One shard of a store: entries in files, findable by tenant, within bounds of bytes and of age."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from attncache_vllm.errors import StoreError
from attncache_vllm.store import folder as folders
from attncache_vllm.store import rearm as rearming
from attncache_vllm.store.index import Features
from attncache_vllm.store.ray.calls import FULL
from attncache_vllm.store.ray.edition import Edition
from attncache_vllm.store.ray.envelope import Envelope, check_maps, check_record, check_tenant
from attncache_vllm.store.ray.growing import GrowingIndex
from attncache_vllm.store.ray.kept import Entry, Limits
from attncache_vllm.store.ray.reading import Bytes, Exported, ShardReader
from attncache_vllm.store.ray.ring import entry_id
from attncache_vllm.store.records import Layout
from attncache_vllm.store.sketches import Sketch

__all__ = ["Exported", "Limits", "Shard"]


class _Arrival(NamedTuple):
    """An entry whose file is there and which is to be found from now on."""

    entry_id: int
    entry: Entry
    feature: Features
    sketch: Sketch
    length: int


class Shard(ShardReader):
    """Entries of any number of editions and tenants. Safe to share between threads.

    Searches and loads wait neither for a ``put`` nor for an index that is being built. What is
    found damaged is forgotten and counted. Another shard object on the same folder, after this one
    was closed or its process died, has what was kept.

    Args:
        folder: where the files are; made if it is not there. One shard at a time.
        limits: what does not fit goes by Greedy-Dual-Size-Frequency, a load being a use.
        key: what files are signed with, and without whose signature none is read; None: neither.
        wall: the clock of the world, looked at once for each entry: when it is kept, or found at
            the start. If it jumps in between, nothing happens.
        monotonic: the clock that ages are counted with.

    Raises:
        StoreError: the folder cannot be used, or another shard has it.
    """

    def __init__(
        self,
        folder: Path,
        limits: Limits,
        key: bytes | None = None,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        with folders.storing(f"create {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._wall = wall
        self._writing = Lock()  # before the mutex where a thread takes both
        self._lock_file: int | None = folders.lock(folder)
        try:
            super().__init__(folder, limits, key, monotonic)
            for edition in self._catalogue.known:
                self._scan(edition)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the folder back. Records already loaded stay readable."""
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def publish(self, edition: bytes) -> str:
        """Keep what ``Edition.to_bytes`` made, as the current edition of its namespace; its digest.

        Raises:
            StoreError: it is malformed, or the disk refuses.
        """
        try:
            published = Edition.from_bytes(edition)
        except ValueError as error:
            raise StoreError(f"the edition cannot be published: {error}") from error
        with self._writing:
            found_again = published.digest not in self._catalogue.known
            self._catalogue.publish(published)
            if found_again:
                self._scan(published.digest)
        return published.digest

    def rearm(self) -> None:
        """See ``attncache_vllm.store.rearm``."""
        rearming.rearm(self._folder)

    def rearmed_at(self) -> int:
        """See ``attncache_vllm.store.rearm``."""
        return rearming.rearmed_at(self._folder)

    def put(
        self,
        edition: str,
        tenant: str,
        features: Features,
        records: Sequence[Bytes],
        ages_s: Sequence[float] | None = None,
    ) -> list[str]:
        """Keep N entries of a tenant: ``"kept"``, ``"known"`` or ``"refused: <why>"`` for each.

        Args:
            edition: digest of what they were made with; if it is unknown all are refused.
            tenant: ``""`` is the shared one, else hexadecimal.
            features: float32 ``[N, F]``.
            records: N times uint8 ``[bytes]``, as ``encode_record`` makes them. All is checked.
            ages_s: seconds since each was first kept elsewhere; None: they are new.

        Raises:
            StoreError: the arguments do not fit each other, or the tenant may be none.
        """
        features, ages = np.asarray(features), [0.0] * len(records) if ages_s is None else ages_s
        if features.dtype != np.float32 or features.ndim != 2 or len(features) != len(records):
            raise StoreError(
                f"features must be float32 [{len(records)}, F], "
                f"got {features.dtype} {features.shape!r}"
            )
        if len(ages) != len(records) or not all(0 <= age < math.inf for age in ages):
            raise StoreError(f"ages_s must be {len(records)} numbers >= 0, got {ages!r:.100}")
        try:
            check_tenant(tenant)
        except ValueError as error:
            raise StoreError(str(error)) from None
        with self._writing:
            self._forget_expired()
            arrivals: dict[int, _Arrival] = {}
            answers: list[str | _Arrival] = []
            for feature, record, age in zip(features, records, ages, strict=True):
                try:
                    arrival = self._arrive(edition, tenant, feature, record, age, arrivals)
                except (StoreError, OSError) as error:
                    answers.append(f"refused: {error}")
                    continue
                answers.append("known" if arrival is None else arrival)
                if arrival is not None:
                    arrivals[arrival.entry_id] = arrival
            if arrivals:
                with folders.storing(f"write to {self._folder}"):
                    self._files.sync(edition)
                self._settle(edition, list(arrivals.values()))
            with self._mutex:
                here = self._kept.of(edition)
                told = [
                    answer
                    if isinstance(answer, str)
                    else "kept"
                    if answer.entry_id in here
                    else FULL
                    for answer in answers
                ]
                self._counts["refused"] += sum(answer.startswith("refused") for answer in told)
                index = self._indexes.get((edition, tenant))
        if index is not None:
            index.compact()
        return told

    def remove(self, edition: str, ids: Sequence[int]) -> int:
        """Forget entries and remove their files; returns how many there were."""
        return self._forget((edition, entry_id) for entry_id in ids)

    def delete(self, tenant: str | None = None, edition: str | None = None) -> int:
        """Forget all entries of a tenant, of an edition with what was published, or of one in the
        other; returns how many there were.

        Raises:
            StoreError: neither is given.
        """
        if tenant is None and edition is None:
            raise StoreError("delete needs a tenant, an edition or both, got neither")
        with self._writing:
            with self._mutex:
                forgotten = self._forget(self._kept.keys_of(edition, tenant))
            if edition is not None and tenant is None:
                self._catalogue.remove(edition)
            self._drop_empty_indexes()
        return forgotten

    def expire(self) -> int:
        """Forget what is too old, and give back the memory of what was forgotten; returns how many
        entries were too old. For a thread that has time: others only forget."""
        with self._writing:
            expired = self._forget_expired()
            self._drop_empty_indexes()
            with self._mutex:
                indexes = list(self._indexes.values())
        for index in indexes:
            index.compact()
        return expired

    # -- inside -------------------------------------------------------------------------------

    def _arrive(
        self,
        edition: str,
        tenant: str,
        feature: Features,
        record: Bytes,
        age: float,
        arrivals: dict[int, _Arrival],
    ) -> _Arrival | None:
        """Check an entry and write its file; None if it is there, or among ``arrivals``, already.

        Raises:
            StoreError: it cannot be kept.
            OSError: the disk refuses.
        """
        known = self._catalogue.known.get(edition)
        if known is None:
            raise StoreError(f"edition {edition:.16} is not published here; publish it first")
        if feature.shape != (known.dim,) or not np.isfinite(feature).all():
            raise StoreError(f"a feature must be {known.dim} finite numbers, got {feature!r:.100}")
        if record.dtype != np.uint8 or record.ndim != 1:
            raise StoreError(f"a record must be uint8 [bytes], got {record.dtype} {record.shape!r}")
        if len(record) > self._limits.largest:
            raise StoreError(
                f"a record must have at most {self._limits.largest} bytes, got {len(record)!r}; "
                "raise the quota of tenants or shards"
            )
        data = np.ascontiguousarray(record).data
        layout, sketch = check_record(data)
        check_maps(data, layout)
        number = entry_id(tenant, layout.token_hash)
        with self._mutex:
            kept = self._kept.of(edition).get(number)
        there = arrivals[number].entry if number in arrivals else kept
        if there is not None:
            if (there.tenant, there.token_hash) != (tenant, layout.token_hash):
                raise StoreError(f"another sequence has the id {number:016x} already")
            return None
        created = max(0.0, self._wall() - age)
        envelope = Envelope(bytes.fromhex(edition), tenant, number, created, feature)
        size = self._files.write(envelope, data)
        return _arrival(envelope, layout, sketch, size, self._monotonic() - age)

    def _settle(self, edition: str, arrivals: Sequence[_Arrival]) -> None:
        """Let entries be found, and give up what there is no room for, oldest first."""
        by_tenant: dict[str, list[_Arrival]] = defaultdict(list)
        for arrival in sorted(arrivals, key=lambda arrival: arrival.entry.born):
            by_tenant[arrival.entry.tenant].append(arrival)
        for tenant, own in by_tenant.items():
            with self._mutex:
                index = self._indexes.setdefault((edition, tenant), GrowingIndex())
            # First: what is evicted below must be there to be withdrawn.
            index.add(
                [arrival.entry_id for arrival in own],
                np.stack([arrival.feature for arrival in own]),
                [arrival.sketch for arrival in own],
                [arrival.length for arrival in own],
            )
            with self._mutex:
                for arrival in own:
                    evicted = self._kept.add((edition, arrival.entry_id), arrival.entry)
                    self._counts["evicted"] += len(evicted)
                    self._withdraw(evicted)

    def _scan(self, edition: str) -> None:
        """Find what a former run kept."""
        wall, monotonic = self._wall(), self._monotonic()
        arrivals = []
        for head in self._files.scan(edition, self._catalogue.known[edition].dim):
            if head is None:
                self._counts["damaged"] += 1
            else:
                born = monotonic - max(0.0, wall - head.envelope.created)
                size = len(head.file)
                arrivals.append(_arrival(head.envelope, head.layout, head.sketch, size, born))
        self._settle(edition, arrivals)
        self._forget_expired()

    def _drop_empty_indexes(self) -> None:
        """Needs ``_writing``: a ``put`` may be about to fill one."""
        with self._mutex:
            self._indexes = {owner: index for owner, index in self._indexes.items() if len(index)}


def _arrival(
    envelope: Envelope, layout: Layout, sketch: Sketch, size: int, born: float
) -> _Arrival:
    # A hit saves about as much for every token of every map.
    cost = float(layout.length * len(layout.maps))
    entry = Entry(envelope.tenant, layout.token_hash, size, cost, born, sound=False)
    return _Arrival(envelope.entry_id, entry, envelope.feature, sketch, layout.length)
