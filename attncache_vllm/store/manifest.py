# SPDX-License-Identifier: Apache-2.0
"""The one file that says what a store holds; replacing it atomically is what a commit is.

    magic     8 bytes
    checksum  SHA-256 of everything after it
    version   u32, little endian
    body      msgpack

Magic, checksum and version stay where they are in every later format, so that a newer store is told
apart from a damaged one.
"""

import hashlib
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from attncache_vllm.errors import StoreDamaged, StoreError
from attncache_vllm.store import checks
from attncache_vllm.store.protocol import Namespace
from attncache_vllm.store.records import ALIGNMENT, MAX_LENGTH, MAX_SKETCH

FILE_NAME = "manifest"
FORMAT_VERSION = 3

_MAGIC = b"ATNCSTOR"
_CHECKED_FROM = len(_MAGIC) + 32
_BODY_FROM = _CHECKED_FROM + 4
_MAX_BYTES = 1 << 30
_MAX_FILE_BYTES = 1 << 50
_MAX_COUNT = 1 << 32
_SEGMENT_NAME = re.compile(r"maps-[0-9]{6}")
_ARTIFACT = re.compile(r"[a-z]{1,32}")
_FILE_NAME = re.compile(
    rf"(features|projector|sketches|artifact-{_ARTIFACT.pattern})-[0-9a-f]{{16}}"
)


@dataclass(frozen=True)
class Segment:
    """A file of records laid end to end, and how many of its bytes count."""

    name: str
    size: int


@dataclass(frozen=True)
class Entry:
    """Where a record lies, and which sequence it must turn out to be."""

    segment: int
    offset: int
    size: int
    length: int
    token_hash: bytes


@dataclass(frozen=True)
class FileRef:
    """A whole file, named after its SHA-256 so that no version ever overwrites another."""

    name: str
    size: int
    sha256: bytes

    @classmethod
    def of(cls, kind: str, data: bytes) -> "FileRef":
        sha256 = hashlib.sha256(data).digest()
        return cls(f"{kind}-{sha256.hex()[:16]}", len(data), sha256)


@dataclass(frozen=True)
class Published:
    """What a build adds so that the first ``rows`` entries can be looked up and reused.

    ``plan``, ``report`` and the contents of ``artifacts`` mean nothing to a store. ``features``
    holds float32 ``[rows, dim]``, row i that of entry i; ``factory`` is that of the index which is
    built of them when the store is opened; ``sketches`` are those of the entries, as
    ``attncache_vllm.store.sketches`` has them.
    """

    plan: dict[str, Any]
    report: dict[str, Any]
    projector: FileRef
    features: FileRef
    rows: int
    dim: int
    factory: str
    sketches: FileRef
    artifacts: dict[str, FileRef]

    def files(self) -> tuple[FileRef, ...]:
        own = self.projector, self.features, self.sketches
        return *own, *self.artifacts.values()


def artifact_kind(name: object) -> str:
    """What the file of the artifact ``name`` is called by; ``ValueError`` for no good name."""
    if not isinstance(name, str) or not _ARTIFACT.fullmatch(name):
        raise ValueError(f"an artifact's name must be 1 to 32 letters from a to z, got {name!r}")
    return f"artifact-{name}"


@dataclass(frozen=True)
class Manifest:
    """One committed state of a store. ``build`` records the settings it was built with."""

    namespace: Namespace
    build: dict[str, Any]
    segments: tuple[Segment, ...] = ()
    entries: tuple[Entry, ...] = ()
    published: Published | None = None

    def to_bytes(self) -> bytes:
        published = None
        if self.published is not None:
            published = dict(vars(self.published))
            for name in ("projector", "features", "sketches"):
                published[name] = list(vars(published[name]).values())
            published["artifacts"] = {
                name: list(vars(file).values()) for name, file in self.published.artifacts.items()
            }
        body: bytes = msgpack.packb(
            {
                "namespace": self.namespace.to_dict(),
                "build": self.build,
                "segments": [[segment.name, segment.size] for segment in self.segments],
                "entries": [list(vars(entry).values()) for entry in self.entries],
                "published": published,
            }
        )
        checked = struct.pack("<I", FORMAT_VERSION) + body
        return _MAGIC + hashlib.sha256(checked).digest() + checked

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """The inverse of ``to_bytes``.

        Raises:
            StoreDamaged: the bytes are not those of a manifest, or contradict each other.
            StoreError: a release with another format wrote it.
        """
        view = memoryview(data)
        if len(view) < _BODY_FROM or view[: len(_MAGIC)] != _MAGIC:
            raise StoreDamaged("the manifest is cut short or is not one; build the store again")
        if hashlib.sha256(view[_CHECKED_FROM:]).digest() != view[len(_MAGIC) : _CHECKED_FROM]:
            raise StoreDamaged("the manifest does not have its checksum; build the store again")
        (version,) = struct.unpack_from("<I", view, _CHECKED_FROM)
        if version != FORMAT_VERSION:
            raise StoreError(
                f"the store's format must be {FORMAT_VERSION}, got {version!r}; "
                "open it with the release that built it, or build it again"
            )
        try:
            return _parse(checks.unpack(view[_BODY_FROM:]))
        except ValueError as error:
            raise StoreDamaged(f"the manifest is malformed: {error}") from error

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of the store in ``folder``; ``StoreError`` says why there is none."""
        path = folder / FILE_NAME
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size > _MAX_BYTES:
                    raise StoreDamaged(f"{path} must have at most {_MAX_BYTES} bytes")
                return cls.from_bytes(file.read(_MAX_BYTES))
        except OSError as error:
            raise StoreError(
                f"{folder} must be the folder of a store, got {error.strerror} for its manifest; "
                "make one with 'attncache build'"
            ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` so that after a crash it holds its old bytes or ``data``, durably.

    Callers hold the store's lock, so the temporary name cannot clash.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make creations and renames in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def owned_by_store(name: str) -> bool:
    """Whether ``name`` is one a store gives its data files, finished or temporary."""
    stem = name.removesuffix(".tmp")
    return bool(
        _SEGMENT_NAME.fullmatch(stem) or _FILE_NAME.fullmatch(stem) or name == FILE_NAME + ".tmp"
    )


def _parse(data: object) -> Manifest:
    given = checks.fields(
        data, ["namespace", "build", "segments", "entries", "published"], "a manifest"
    )
    segments = tuple(_segment(item) for item in checks.items(given["segments"], None, "segments"))
    if len({segment.name for segment in segments}) != len(segments):
        raise ValueError("segments must have different names")
    entries = tuple(
        _entry(item, segments) for item in checks.items(given["entries"], None, "entries")
    )
    if len({entry.token_hash for entry in entries}) != len(entries):
        raise ValueError("entries must have different token hashes")
    published = given["published"]
    return Manifest(
        namespace=Namespace.from_dict(given["namespace"]),
        build=_plain_dict(given["build"], "build"),
        segments=segments,
        entries=entries,
        published=None if published is None else _published(published, len(entries)),
    )


def _segment(item: object) -> Segment:
    name, size = checks.items(item, 2, "a segment")
    if not isinstance(name, str) or not _SEGMENT_NAME.fullmatch(name):
        raise ValueError(f"a segment's name must be like maps-000000, got {name!r}")
    return Segment(name, checks.integer(size, 0, _MAX_FILE_BYTES, "a segment's size"))


def _entry(item: object, segments: tuple[Segment, ...]) -> Entry:
    segment, offset, size, length, token_hash = checks.items(item, 5, "an entry")
    checks.integer(segment, 0, len(segments) - 1, "an entry's segment")
    checks.integer(offset, 0, segments[segment].size, "an entry's offset")
    checks.integer(size, 1, segments[segment].size - offset, "an entry's size")
    if offset % ALIGNMENT:
        raise ValueError(f"an entry's offset must be a multiple of {ALIGNMENT}, got {offset!r}")
    checks.integer(length, 1, MAX_LENGTH, "an entry's length")
    return Entry(segment, offset, size, length, checks.digest(token_hash, "an entry's token hash"))


def _published(data: object, entries: int) -> Published:
    files = ["projector", "features", "sketches", "artifacts"]
    given = checks.fields(data, ["plan", "report", "rows", "dim", "factory", *files], "published")
    rows = checks.integer(given["rows"], 1, entries, "rows")
    dim = checks.integer(given["dim"], 1, 1 << 20, "dim")
    features = _file_ref(given["features"], "features")
    if features.size != 4 * rows * dim:
        raise ValueError(f"features of {rows} x {dim} float32, got {features.size!r} bytes")
    sketches = _file_ref(given["sketches"], "sketches")
    if not 8 * rows <= sketches.size <= 8 * rows * (1 + MAX_SKETCH):
        raise ValueError(f"sketches of {rows} entries, got {sketches.size!r} bytes")
    return Published(
        plan=_plain_dict(given["plan"], "plan"),
        report=_plain_dict(given["report"], "report"),
        projector=_file_ref(given["projector"], "projector"),
        features=features,
        rows=rows,
        dim=dim,
        factory=checks.text(given["factory"], "factory"),
        sketches=sketches,
        artifacts={
            name: _file_ref(file, artifact_kind(name))
            for name, file in _plain_dict(given["artifacts"], "artifacts").items()
        },
    )


def _file_ref(item: object, kind: str) -> FileRef:
    name, size, sha256 = checks.items(item, 3, f"the {kind} file")
    checks.digest(sha256, f"the {kind} file's checksum")
    if name != f"{kind}-{sha256.hex()[:16]}":
        raise ValueError(f"the {kind} file must be named after its checksum, got {name!r}")
    return FileRef(name, checks.integer(size, 0, _MAX_COUNT << 12, f"{kind} bytes"), sha256)


def _plain_dict(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a mapping, got {value!r}")
    return value
