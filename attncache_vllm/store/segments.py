# SPDX-License-Identifier: Apache-2.0
"""Segment files: records appended by one writer, memory-mapped by any number of readers."""

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

from attncache_vllm.errors import StoreDamaged
from attncache_vllm.store.manifest import Segment, sync_folder

ROLL_BYTES = 256 << 20
"""A segment takes no further record once it has this many bytes."""


class SegmentReader:
    """Read-only views of segments, mapped when first needed.

    Only committed bytes are mapped, never the tail that the next writer may cut off: touching a
    mapped page behind the end of its file would kill the process. Nothing guards against another
    program that truncates a segment between ``view`` and the use of the view.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: dict[str, mmap.mmap] = {}
        self._lock = Lock()

    def view(self, segment: Segment, offset: int, size: int) -> memoryview:
        """``size`` bytes of ``segment`` at ``offset``; ``StoreDamaged`` if the file lacks them."""
        end = offset + size
        try:
            with self._lock:
                mapped = self._maps.get(segment.name)
                if mapped is None or len(mapped) < end:
                    mapped = self._maps[segment.name] = self._map(segment)
            available = min(len(mapped), mapped.size())
        except (OSError, ValueError) as error:
            raise StoreDamaged(f"segment {segment.name} cannot be mapped: {error}") from error
        if end > available:
            raise StoreDamaged(f"segment {segment.name} must reach byte {end}, got {available!r}")
        return memoryview(mapped)[offset:end]

    def close(self) -> None:
        """Forget the mappings; each lives on until the last view of it is gone."""
        with self._lock:
            self._maps.clear()

    def _map(self, segment: Segment) -> mmap.mmap:
        with (self._folder / segment.name).open("rb") as file:
            length = min(segment.size, os.fstat(file.fileno()).st_size)
            return mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ)


class SegmentWriter:
    """Appends records to the last segment, starting the next one at ``roll_bytes``.

    Needs the store's lock. Cuts off whatever a predecessor wrote but did not commit. ``segments``
    is what has been written, durable or not, and is changed in place.
    """

    def __init__(self, folder: Path, committed: Sequence[Segment], roll_bytes: int) -> None:
        self.segments = list(committed)
        self._folder = folder
        self._roll_bytes = roll_bytes
        self._file: int | None = None
        if committed:
            self._resume(committed[-1])

    def append(self, buffers: Sequence[bytes | memoryview]) -> tuple[int, int]:
        """Write ``buffers`` one after the other; returns segment number and offset.

        After an ``OSError`` nothing counts as written: the next append overwrites the rest.
        """
        if self._file is None or self.segments[-1].size >= self._roll_bytes:
            self._start_segment()
        assert self._file is not None
        number, segment = len(self.segments) - 1, self.segments[-1]
        position = segment.size
        for buffer in buffers:
            rest = memoryview(buffer)
            while rest:
                written = os.pwrite(self._file, rest, position)
                rest = rest[written:]
                position += written
        self.segments[-1] = Segment(segment.name, position)
        return number, segment.size

    def sync(self) -> None:
        """Make everything appended durable; earlier segments were synced when they were left."""
        if self._file is not None:
            os.fsync(self._file)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _start_segment(self) -> None:
        self.sync()
        name = f"maps-{len(self.segments):06d}"
        file = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self.close()
        self._file = file
        self.segments.append(Segment(name, 0))
        sync_folder(self._folder)

    def _resume(self, last: Segment) -> None:
        try:
            file = os.open(self._folder / last.name, os.O_WRONLY)
        except FileNotFoundError:
            return
        self._file = file
        # A segment shortened by damage grows back; its lost records keep failing their checks.
        os.ftruncate(file, last.size)
