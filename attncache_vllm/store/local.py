# SPDX-License-Identifier: Apache-2.0
"""The embedded store: a folder of memory-mapped segments under one atomically replaced manifest."""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from attncache_vllm.errors import NamespaceMismatch, StoreDamaged, StoreError
from attncache_vllm.store import checks
from attncache_vllm.store import folder as folders
from attncache_vllm.store.index import Features
from attncache_vllm.store.manifest import FILE_NAME, Entry, Manifest, sync_folder, write_atomic
from attncache_vllm.store.protocol import Namespace, Record
from attncache_vllm.store.published import (
    Serving,
    load_published,
    read_consistently,
    write_artifacts,
    write_published,
)
from attncache_vllm.store.reader import StoreReader, unpublished
from attncache_vllm.store.records import encode_record
from attncache_vllm.store.segments import ROLL_BYTES, SegmentWriter

logger = logging.getLogger(__name__)


class LocalStore(StoreReader):
    """A ``MapStore`` in a folder, for one writer and any number of readers.

    A reader sees the state committed last before it was opened. An entry id is the number of the
    entry in the order of writing. Methods may be called from several threads. What it holds is what
    its owner put in, and is of the shared tenant.
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
        segments = writer.segments if writer else manifest.segments
        super().__init__(folder, manifest, serving, segments)
        self._writer = writer
        self._lock_file = lock

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
            StoreDamaged: its manifest, or (for reading) its features, sketches or projector are
                damaged.
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
        factory: str = "auto",
        artifacts: Mapping[str, bytes] | None = None,
    ) -> None:
        """Commit, together with what makes every entry findable, replacing what was published.

        Args:
            plan: which layers are reused and when; plain data, opaque to the store.
            projector: the serialised projector the features were made with.
            report: how the training went; plain data, opaque to the store.
            features: float32 ``[entries, F]``, finite, row i that of entry i.
            factory: of the index: see `chosen_factory` and `build_index`.
            artifacts: further files by name, opaque to the store; a name is letters from a to z.

        Raises:
            StoreError: there are damaged entries (drop them first), or an argument does not fit.
        """
        with self._mutex:
            self._require_writer()
            sketches = list(self._table.sound_sketches())
            if damaged := sorted(self._table.damaged):
                raise StoreError(
                    f"published entries must be sound, got damaged ones {damaged!r}; "
                    "call drop_damaged() first"
                )
            with folders.storing(f"publish in {self._folder}"):
                published = write_published(
                    self._folder,
                    plan,
                    report,
                    projector,
                    features,
                    factory,
                    sketches,
                    artifacts or {},
                )
            self._commit(replace(self._manifest, published=published))
            with folders.storing(f"publish in {self._folder}"):
                folders.remove_unreferenced(self._folder, self._manifest)
                self._serving = load_published(self._folder, self._manifest, published)
            self._damaged_files = 0

    def publish_plan(
        self,
        plan: dict[str, Any],
        report: dict[str, Any],
        artifacts: Mapping[str, bytes],
    ) -> None:
        """Commit, together with another plan, report and set of artifacts for what is published.

        Projector, features and sketches stay. Arguments are as for ``publish``.

        Raises:
            StoreError: nothing is published yet, or an argument does not fit.
        """
        with self._mutex:
            self._require_writer()
            if (published := self._manifest.published) is None:
                raise unpublished(self._folder)
            with folders.storing(f"publish in {self._folder}"):
                published = replace(
                    published,
                    plan=checks.plain(plan, "plan"),
                    report=checks.plain(report, "report"),
                    artifacts=write_artifacts(self._folder, artifacts),
                )
            self._commit(replace(self._manifest, published=published))
            with folders.storing(f"publish in {self._folder}"):
                folders.remove_unreferenced(self._folder, self._manifest)

    def drop_damaged(self) -> int:
        """Verify and forget damaged entries, durably with the next commit; returns how many.

        If there are any, the entries behind them get new ids, and nothing is published until the
        store is published again.
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
                self._manifest = replace(self._manifest, entries=tuple(sound), published=None)
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

    def _commit(self, manifest: Manifest) -> None:
        writer = self._require_writer()
        manifest = replace(
            manifest, segments=tuple(writer.segments), entries=tuple(self._table.entries)
        )
        with folders.storing(f"commit to {self._folder}"):
            writer.sync()
            write_atomic(self._folder / FILE_NAME, manifest.to_bytes())
        self._manifest = manifest

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
