# SPDX-License-Identifier: Apache-2.0
"""The files of a shard's entries: one each, below the folder of its edition."""

import logging
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from attncache_vllm.errors import StoreDamaged
from attncache_vllm.store import folder as folders
from attncache_vllm.store.manifest import sync_folder
from attncache_vllm.store.ray.envelope import (
    Envelope,
    Head,
    NotOurs,
    check_body,
    encode_entry,
    read_head,
)

logger = logging.getLogger(__name__)

_SUFFIX = ".entry"


class EntryFiles:
    """``<first 16 digits of the edition>/<id, 16 hexadecimal digits>.entry`` below a folder.

    A file is open only while it is read: a process may have too few descriptors for all of them.
    Nothing guards against another program that truncates one while it is mapped.
    """

    def __init__(self, folder: Path, key: bytes | None) -> None:
        self._folder = folder
        self._key = key

    def write(self, envelope: Envelope, record: memoryview) -> int:
        """Keep an entry and return its size in bytes. After a crash it is there whole or not at
        all; that it is there is certain after ``sync``. One thread writes at a time.

        Raises:
            OSError: the disk refuses.
        """
        path = self._path(envelope.edition.hex(), envelope.entry_id)
        temporary = path.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                for buffer in encode_entry(envelope, record, self._key):
                    file.write(buffer)
                file.write(record)
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        return size

    def sync(self, edition: str) -> None:
        """Make what was written durable; ``OSError`` if the disk refuses."""
        sync_folder(self._folder / edition[:16])

    def read(self, edition: str, entry_id: int, *, whole: bool) -> Head:
        """Map an entry into memory and check its head, or all of it if ``whole``.

        Raises:
            StoreDamaged: it is gone, damaged, not signed as it must be, or another entry.
        """
        path = self._path(edition, entry_id)
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise StoreDamaged(f"{path.name} cannot be mapped: {error}") from error
        head = read_head(memoryview(mapped), self._key)
        if (head.envelope.edition.hex(), head.envelope.entry_id) != (edition, entry_id):
            raise StoreDamaged(f"{path.name} must be the entry that its name says")
        if whole:
            check_body(head, self._key)
        return head

    def remove(self, edition: str, entry_id: int) -> None:
        _unlink(self._path(edition, entry_id))

    def scan(self, edition: str, dim: int) -> Iterator[Head | None]:
        """The entries of an edition, in no order; None for one that is damaged, or whose feature
        has not ``dim`` values.

        Removes what was damaged or left behind by a crash. What another key signed or another
        release wrote stays: either may come back.
        """
        with folders.storing(f"list the entries below {self._folder}"):
            names = os.listdir(self._folder / edition[:16])
        for name in names:
            path = self._folder / edition[:16] / name
            if path.suffix == ".tmp":
                _unlink(path)
            elif path.suffix == _SUFFIX:
                try:
                    head = self.read(edition, _id_of(path), whole=False)
                    if len(head.envelope.feature) != dim:
                        raise StoreDamaged(f"its feature must have {dim} values")
                except NotOurs as error:
                    logger.warning("%s is left alone: %s", path, error)
                    yield None
                except StoreDamaged as error:
                    logger.warning("%s is removed: %s", path, error)
                    _unlink(path)
                    yield None
                else:
                    yield head

    def _path(self, edition: str, entry_id: int) -> Path:
        return self._folder / edition[:16] / f"{entry_id:016x}{_SUFFIX}"


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("what is forgotten stays on the disk: %s", error)


def _id_of(path: Path) -> int:
    try:
        return int(path.stem, 16)
    except ValueError as error:
        raise StoreDamaged(f"an entry's name must be its id, got {path.name}") from error
