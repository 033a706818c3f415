# SPDX-License-Identifier: Apache-2.0
"""The editions below a shard's folder, and which of them is current for its model.

Each has a folder, named after its digest, with its file and those of its entries. A file is its
SHA-256, then what it holds. One more file, ``current``, says which edition was published last for
each model.
"""

import hashlib
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgpack

from attncache_vllm.errors import StoreDamaged, StoreError
from attncache_vllm.store import checks
from attncache_vllm.store import folder as folders
from attncache_vllm.store.manifest import sync_folder, write_atomic
from attncache_vllm.store.protocol import Namespace
from attncache_vllm.store.ray.edition import MAX_BYTES, Edition

logger = logging.getLogger(__name__)

_SHA256_BYTES = 32
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Known:
    """What is remembered of an edition: the rest is read when it is asked for."""

    namespace: Namespace
    dim: int


class Catalogue:
    """Needs the lock of ``folder``. ``damaged`` counts files that were found damaged.

    An edition whose file is damaged is unknown until it is published again; its entries stay.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.known: dict[str, Known] = {}
        self.damaged = 0
        self._current: dict[str, str] = {}
        with folders.storing(f"list {folder}"):
            paths = sorted(folder.glob("*/edition"))
        for path in paths:
            try:
                edition = Edition.from_bytes(_read(path))
                if path.parent != self.folder(edition.digest):
                    raise StoreDamaged(f"{path} must be below the digest of its edition")
            except (StoreDamaged, ValueError) as error:
                self._count_damaged(path, error)
            else:
                self.known[edition.digest] = Known(edition.namespace, edition.dim)
        path = folder / "current"
        if path.exists():
            try:
                self._current = self._parse_current(_read(path))
            except (StoreDamaged, ValueError) as error:
                self._count_damaged(path, error)

    def folder(self, digest: str) -> Path:
        """Where an edition's entries are; ``StoreError`` if ``digest`` is none."""
        if not _DIGEST.fullmatch(digest):
            raise StoreError(
                f"an edition must be 64 hexadecimal digits, got {checks.shown(digest)}"
            )
        return self._folder / digest[:16]

    def publish(self, edition: Edition) -> None:
        """Keep ``edition`` and make it current; ``StoreError`` if the disk refuses."""
        digest = edition.digest
        folder = self.folder(digest)
        with folders.storing(f"publish in {self._folder}"):
            folder.mkdir(exist_ok=True)
            _write(folder / "edition", edition.to_bytes())
            sync_folder(self._folder)
            self._write_current({**self._current, edition.namespace.digest(): digest})
        self.known[digest] = Known(edition.namespace, edition.dim)

    def read(self, digest: str) -> bytes | None:
        """``Edition.to_bytes`` of a known edition; None if it is unknown, or damaged meanwhile."""
        if digest not in self.known:
            return None
        path = self.folder(digest) / "edition"
        try:
            return _read(path)
        except StoreDamaged as error:
            self._count_damaged(path, error)
            return None

    def current(self, namespace: str) -> str | None:
        """The digest of the edition that was published last for the namespace of this digest."""
        digest = self._current.get(namespace)
        return digest if digest in self.known else None

    def remove(self, digest: str) -> None:
        """Forget an edition, and remove whatever is in its folder."""
        folder = self.folder(digest)
        with folders.storing(f"remove an edition from {self._folder}"):
            current = {name: value for name, value in self._current.items() if value != digest}
            if current != self._current:
                self._write_current(current)
            self.known.pop(digest, None)
            shutil.rmtree(folder, ignore_errors=True)

    def _write_current(self, current: dict[str, str]) -> None:
        _write(self._folder / "current", msgpack.packb(current))
        self._current = current

    def _parse_current(self, data: bytes) -> dict[str, str]:
        given = checks.unpack(data)
        if not isinstance(given, dict):
            raise ValueError(f"current editions must be a mapping, got {checks.shown(given)}")
        return {
            checks.text(name, "a namespace"): checks.text(digest, "an edition")
            for name, digest in given.items()
        }

    def _count_damaged(self, path: Path, error: Exception) -> None:
        self.damaged += 1
        logger.warning("%s is skipped until published again: %s", path, error)


def _write(path: Path, data: bytes) -> None:
    write_atomic(path, hashlib.sha256(data).digest() + data)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            sha256, data = file.read(_SHA256_BYTES), file.read(MAX_BYTES)
    except OSError as error:
        raise StoreDamaged(f"{path} cannot be read: {error}") from error
    if hashlib.sha256(data).digest() != sha256:
        raise StoreDamaged(f"{path} does not have its checksum")
    return data
