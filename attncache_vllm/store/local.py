# SPDX-License-Identifier: Apache-2.0
"""The embedded store: a folder of memory-mapped segments under one atomically replaced manifest."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np

from attncache_vllm.errors import NamespaceMismatch, StoreDamaged, StoreError, StoreTimeout
from attncache_vllm.store import checks
from attncache_vllm.store import folder as folders
from attncache_vllm.store.entries import EntryTable
from attncache_vllm.store.index import Features
from attncache_vllm.store.manifest import FILE_NAME, Entry, Manifest, sync_folder, write_atomic
from attncache_vllm.store.protocol import (
    Namespace,
    Neighbour,
    Record,
    StoreStats,
    VerifyReport,
)
from attncache_vllm.store.published import (
    Serving,
    load_published,
    read_consistently,
    read_file,
    write_published,
)
from attncache_vllm.store.records import encode_record
from attncache_vllm.store.segments import ROLL_BYTES, SegmentWriter

logger = logging.getLogger(__name__)


class LocalStore:
    """A ``MapStore`` in a folder, for one writer and any number of readers.

    A reader sees the state committed last before it was opened. An entry id is the number of the
    entry in the order of writing. Methods may be called from several threads.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        serving: Serving | None,
        writer: SegmentWriter | None = None,
        lock: int | None = None,
    ) -> None:
        """Not for callers: use ``create`` or ``open``."""
        self._folder = folder
        self._manifest = manifest
        self._serving = serving
        self._writer = writer
        self._lock_file = lock
        self._mutex = RLock()
        self._table = self._table_of(manifest.entries)
        self._damaged_files = int(serving.rebuilt) if serving else int(bool(manifest.published))
        self._lookups = self._late = 0
        self._closed = False

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        namespace: Namespace,
        build: dict[str, Any],
        *,
        roll_bytes: int = ROLL_BYTES,
    ) -> "LocalStore":
        """A new, empty, writable store at ``path``, which must be empty or not exist.

        Args:
            path: the folder.
            namespace: what its maps will be comparable with.
            build: the settings of the build, kept for the record.
            roll_bytes: size in bytes at which a segment file is left for the next one.
        """
        folder = Path(path)
        with folders.storing(f"create {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
        folders.require_empty(folder)
        lock = folders.lock(folder)
        try:
            folders.require_empty(folder)  # again: another writer may just have left
            manifest = Manifest(namespace, checks.plain(build, "build"))
            with folders.storing(f"create {folder}"):
                write_atomic(folder / FILE_NAME, manifest.to_bytes())
                sync_folder(folder.parent)
        except BaseException:
            os.close(lock)
            raise
        return cls(folder, manifest, None, SegmentWriter(folder, (), roll_bytes), lock)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        writable: bool = False,
        namespace: Namespace | None = None,
        roll_bytes: int = ROLL_BYTES,
    ) -> "LocalStore":
        """The store at ``path`` as last committed.

        Opening for writing drops what a predecessor put but did not commit, and forgives damage of
        published files, so that ``publish`` can cure it.

        Raises:
            StoreError: there is no store, a newer release wrote it, or it has a writer already.
            StoreDamaged: its manifest, or (for reading) its features or projector are damaged.
            NamespaceMismatch: it does not fit ``namespace``; the message lists the differences.
        """
        folder = Path(path)
        _require_namespace(folder, Manifest.read(folder), namespace)
        if not writable:
            return cls(folder, *read_consistently(folder))
        lock = folders.lock(folder)
        try:
            manifest = Manifest.read(folder)  # again: the writer before us may have committed
            with folders.storing(f"resume {folder}"):
                folders.remove_unreferenced(folder, manifest)
                writer = SegmentWriter(folder, manifest.segments, roll_bytes)
            serving = None
            if manifest.published is not None:
                try:
                    serving = load_published(folder, manifest, manifest.published)
                except (StoreDamaged, OSError) as error:
                    logger.warning("%s cannot be looked up in until published: %s", folder, error)
        except BaseException:
            os.close(lock)
            raise
        return cls(folder, manifest, serving, writer, lock)

    # -- reading ------------------------------------------------------------------------------

    @property
    def manifest(self) -> Manifest:
        """The committed state; what was put since is not in it."""
        return self._manifest

    @property
    def plan(self) -> dict[str, Any]:
        """The published plan; ``StoreError`` before the first calibration."""
        self._require_serving()
        assert self._manifest.published is not None
        return self._manifest.published.plan

    @property
    def projector_bytes(self) -> bytes:
        """The published projector; ``StoreError`` before the first calibration."""
        return self._require_serving().projector

    def lookup(
        self,
        features: Features,
        lengths: Sequence[tuple[int, int]],
        *,
        neighbours: int,
        deadline: float,
    ) -> list[list[Neighbour]]:
        """See ``MapStore``. Only published entries are found, and none known to be damaged."""
        index = self._require_serving().index
        with self._mutex:
            self._lookups += 1
        with self._counting_late():
            return index.search(features, lengths, neighbours, deadline)

    def load(self, entry_ids: Sequence[int], *, deadline: float) -> list[Record | None]:
        """See ``MapStore``. Checksums are computed at an entry's first load and remembered."""
        self._require_open()
        with self._counting_late():
            return [self._table.load(entry_id, deadline) for entry_id in entry_ids]

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

    # -- writing ------------------------------------------------------------------------------

    def put(self, record: Record) -> int:
        """See ``MapStore``. The record is durable after the next ``commit``.

        Raises:
            StoreError: the store is open for reading, a field is out of range, or the disk refuses.
        """
        with self._mutex:
            writer = self._require_writer()
            if (known := self._table.id_of(record.token_hash)) is not None:
                return known
            try:
                buffers = encode_record(record)
            except ValueError as error:
                raise StoreError(f"the record cannot be stored: {error}") from error
            with folders.storing(f"write to {self._folder}"):
                segment, offset = writer.append(buffers)
            size = sum(len(buffer) for buffer in buffers)
            return self._table.add(Entry(segment, offset, size, record.length, record.token_hash))

    def commit(self) -> None:
        """Make everything put so far durable and visible to readers opened from now on.

        Rewrites the manifest, about 60 bytes an entry: commit after many puts, not after each.
        """
        with self._mutex:
            self._commit(self._manifest)

    def publish(
        self,
        plan: dict[str, Any],
        projector: bytes,
        report: dict[str, Any],
        features: Features,
        factory: str = "Flat",
    ) -> None:
        """Commit, together with what makes every entry findable, replacing what was published.

        Args:
            plan: which layers are reused and when; plain data, opaque to the store.
            projector: the serialised projector the features were made with.
            report: how the training went; plain data, opaque to the store.
            features: float32 ``[entries, F]``, finite, row i that of entry i.
            factory: faiss index factory string.

        Raises:
            StoreError: there are damaged entries (drop them first), or an argument does not fit.
        """
        with self._mutex:
            self._require_writer()
            if damaged := sorted(self._table.damaged):
                raise StoreError(
                    f"published entries must be sound, got damaged ones {damaged!r}; "
                    "call drop_damaged() first"
                )
            rows = len(self._table.entries)
            if rows == 0 or features.ndim != 2 or len(features) != rows:
                raise StoreError(
                    f"features must be one row for each of {rows} (at least 1) entries, "
                    f"got shape {features.shape!r}"
                )
            if not np.isfinite(features).all():
                raise StoreError("features must be finite, got NaN or infinity; train again")
            with folders.storing(f"publish in {self._folder}"):
                published = write_published(
                    self._folder, plan, report, projector, features, factory
                )
            self._commit(replace(self._manifest, published=published))
            with folders.storing(f"publish in {self._folder}"):
                folders.remove_unreferenced(self._folder, self._manifest)
                self._serving = load_published(self._folder, self._manifest, published)
            self._damaged_files = 0

    def drop_damaged(self) -> int:
        """Verify, forget damaged entries and commit; returns how many.

        If there are any, the entries behind them get new ids and the store must be published again.
        """
        with self._mutex:
            self._require_writer()
            bad = {entry_id for entry_id, _ in self.verify().damaged}
            if bad:
                sound = [e for i, e in enumerate(self._table.entries) if i not in bad]
                self._table.close()
                self._table = self._table_of(sound)
                self._serving = None
                self._damaged_files = 0
                self._commit(replace(self._manifest, published=None))
            return len(bad)

    def close(self) -> None:
        """See ``MapStore``. What was put but not committed is lost."""
        with self._mutex:
            self._closed = True
            self._table.close()
            if self._writer is not None:
                self._writer.close()
            if self._lock_file is not None:
                os.close(self._lock_file)
            self._writer = self._lock_file = None

    def __enter__(self) -> "LocalStore":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- inside -------------------------------------------------------------------------------

    def _table_of(self, entries: Sequence[Entry]) -> EntryTable:
        segments = self._writer.segments if self._writer else self._manifest.segments
        return EntryTable(self._folder, entries, segments, self._forget)

    def _forget(self, entry_id: int) -> None:
        with self._mutex:
            if self._serving is not None:
                self._serving.index.forget(entry_id)

    def _commit(self, manifest: Manifest) -> None:
        writer = self._require_writer()
        manifest = replace(
            manifest, segments=tuple(writer.segments), entries=tuple(self._table.entries)
        )
        with folders.storing(f"commit to {self._folder}"):
            writer.sync()
            write_atomic(self._folder / FILE_NAME, manifest.to_bytes())
        self._manifest = manifest

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
            raise StoreError(
                f"{self._folder} must be calibrated before it is looked up in; "
                "run 'attncache build'"
            )
        return self._serving

    def _require_writer(self) -> SegmentWriter:
        self._require_open()
        if self._writer is None:
            raise StoreError(f"{self._folder} is open for reading; open it with writable=True")
        return self._writer


def _require_namespace(folder: Path, manifest: Manifest, namespace: Namespace | None) -> None:
    if namespace is not None and (found := manifest.namespace.differences(namespace)):
        raise NamespaceMismatch(
            f"the maps of {folder} are of another namespace: {'; '.join(found)}; "
            "serve the model they were built with, or build a store for this one"
        )
