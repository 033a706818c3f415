# SPDX-License-Identifier: Apache-2.0
"""The reading half of the embedded store: one committed state, and what was put since."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from attncache_vllm.errors import StoreDamaged, StoreError, StoreTimeout
from attncache_vllm.store import folder as folders
from attncache_vllm.store.entries import EntryTable
from attncache_vllm.store.index import Features
from attncache_vllm.store.manifest import Entry, Manifest, Segment
from attncache_vllm.store.protocol import (
    Namespace,
    Neighbour,
    Overlap,
    Record,
    StoreHealth,
    StoreStats,
    VerifyReport,
)
from attncache_vllm.store.published import Serving, read_artifact, read_file
from attncache_vllm.store.rearm import rearmed_at
from attncache_vllm.store.sketches import Sketch
from attncache_vllm.tenants import SHARED_TENANT

# Queries that have no answer: no entry is as short, or shares a value.
_NO_LENGTH = (1, 0)
_NO_SKETCH: Sketch = np.empty(0, dtype=np.uint64)

Q = TypeVar("Q")


class StoreReader:
    """What a ``LocalStore`` answers. A writer gives its own list as ``segments``, which grows.

    All entries are of the shared tenant; queries of others find nothing.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        serving: Serving | None,
        segments: Sequence[Segment],
    ) -> None:
        self._folder = folder
        self._manifest = manifest
        self._serving = serving
        self._segments = segments
        self._mutex = RLock()
        self._table = self._table_of(manifest.entries)
        self._damaged_files = int(serving is None and manifest.published is not None)
        self._lookups = self._late = 0
        self._closed = False

    @property
    def manifest(self) -> Manifest:
        """The committed state, less damaged entries that were dropped since."""
        return self._manifest

    @property
    def namespace(self) -> Namespace:
        """What its maps are comparable with."""
        return self._manifest.namespace

    @property
    def build(self) -> dict[str, Any]:
        """The settings of the build, as ``create`` was given them."""
        return self._manifest.build

    @property
    def plan(self) -> dict[str, Any]:
        """The published plan; ``StoreError`` before the first publication."""
        self._require_serving()
        assert self._manifest.published is not None
        return self._manifest.published.plan

    @property
    def projector_bytes(self) -> bytes:
        """The published projector; ``StoreError`` before the first publication.

        A writer gets it even where other published files are damaged.
        """
        self._require_open()
        if self._serving is None and (published := self._manifest.published) is not None:
            with folders.storing(f"read the projector of {self._folder}"):
                return read_file(self._folder, published.projector)
        return self._require_serving().projector

    def artifact(self, name: str) -> bytes | None:
        """What was published under ``name``, ``None`` if nothing was; read and checked anew.

        Raises:
            StoreDamaged: it is not what was published, or gone.
        """
        self._require_open()
        published = self._manifest.published
        file = None if published is None else published.artifacts.get(name)
        return None if file is None else read_artifact(self._folder, file)

    def lookup(
        self,
        features: Features,
        lengths: Sequence[tuple[int, int]],
        *,
        tenants: Sequence[str],
        neighbours: int,
        deadline: float,
    ) -> list[list[Neighbour]]:
        """See ``MapStore``. Only published entries are found, and none known to be damaged."""
        index = self._require_serving().index
        lengths = _of_shared_tenant(lengths, tenants, _NO_LENGTH)
        with self._mutex:
            self._lookups += 1
        with self._counting_late():
            return index.search(features, lengths, neighbours, deadline)

    def overlaps(
        self,
        sketches: Sequence[Sketch],
        *,
        tenants: Sequence[str],
        neighbours: int,
        deadline: float,
    ) -> list[list[Overlap]]:
        """See ``MapStore``. Only published entries are found, and none known to be damaged."""
        index = self._require_serving().sketches
        sketches = _of_shared_tenant(sketches, tenants, _NO_SKETCH)
        with self._counting_late():
            return index.search(sketches, neighbours, deadline)

    def token_ids(
        self, entry_ids: Sequence[int], *, deadline: float
    ) -> list[NDArray[np.int32] | None]:
        """See ``MapStore``. Checksums are computed once, as those of ``load``."""
        self._require_open()
        with self._counting_late():
            return [self._table.token_ids(entry_id, deadline) for entry_id in entry_ids]

    def load(self, entry_ids: Sequence[int], *, deadline: float) -> list[Record | None]:
        """See ``MapStore``. Checksums are computed at an entry's first load and remembered."""
        self._require_open()
        with self._counting_late():
            return [self._table.load(entry_id, deadline) for entry_id in entry_ids]

    def rearmed_at(self) -> int:
        """When ``attncache rearm`` was last called for the folder, in nanoseconds; 0 if never."""
        return rearmed_at(self._folder)

    def health(self) -> StoreHealth:
        """See ``ServedStore``: a folder has no shards, and its faults are raised."""
        return StoreHealth({}, 0)

    def has(self, token_hash: bytes) -> bool:
        """Whether the sequence was put, committed or not."""
        return self._table.id_of(token_hash) is not None

    def records(self) -> Iterator[tuple[int, Record]]:
        """Entry id and record of every sound entry, in order; damaged ones are skipped."""
        self._require_open()
        return self._table.sound_records()

    def verify(self) -> VerifyReport:
        """Read and check every byte again, whatever is remembered of earlier checks."""
        self._require_open()
        damaged = self._table.check_all()
        problems = []
        if (published := self._manifest.published) is not None:
            for file in published.files():
                try:
                    read_file(self._folder, file)
                except (StoreDamaged, OSError) as error:
                    problems.append(f"{file.name}: {error}")
        entries = len(self._table.entries)
        rows = 0 if published is None else published.rows
        return VerifyReport(entries, damaged, problems, unpublished=entries - rows)

    def stats(self) -> StoreStats:
        """See ``MapStore``. Entries and bytes include what is not committed yet."""
        with self._mutex:
            return StoreStats(
                entries=len(self._table.entries),
                bytes=sum(entry.size for entry in self._table.entries),
                damaged=len(self._table.damaged) + self._damaged_files,
                lookups=self._lookups,
                late=self._late,
            )

    # -- inside -------------------------------------------------------------------------------

    def _table_of(self, entries: Sequence[Entry]) -> EntryTable:
        return EntryTable(self._folder, entries, self._segments, self._forget)

    def _forget(self, entry_id: int) -> None:
        with self._mutex:
            if self._serving is not None:
                self._serving.forget(entry_id)

    @contextmanager
    def _counting_late(self) -> Iterator[None]:
        try:
            yield
        except StoreTimeout:
            with self._mutex:
                self._late += 1
            raise

    def _require_open(self) -> None:
        if self._closed:
            raise StoreError(f"the store must be open, got closed: {self._folder}; open it again")

    def _require_serving(self) -> Serving:
        self._require_open()
        if self._serving is None:
            raise unpublished(self._folder)
        return self._serving


def _of_shared_tenant(queries: Sequence[Q], tenants: Sequence[str], nothing: Q) -> list[Q]:
    """The queries, with ``nothing`` in the place of those of other tenants."""
    if len(tenants) != len(queries):
        raise StoreError(f"each of {len(queries)} queries must have a tenant, got {len(tenants)}")
    return [
        query if tenant == SHARED_TENANT else nothing
        for query, tenant in zip(queries, tenants, strict=True)
    ]


def unpublished(folder: Path) -> StoreError:
    """What a store says that was built but not published."""
    return StoreError(
        f"{folder} must be built to its end before it is looked up in; run 'attncache build'"
    )
