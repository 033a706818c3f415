# SPDX-License-Identifier: Apache-2.0
"""Frames over a pair of sockets, with files beside them in memory that both sides then share.

A record crosses in a sealed memory file (Linux ``memfd``): whoever receives it maps it, and as
nobody can write to it or cut it short any more, what was checked once stays as it was checked.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import mmap
import os
import socket
import struct
from collections.abc import Sequence
from threading import Lock

from attncache_vllm.store.ray.messages import HEAD_BYTES, MAX_FILES, Head, parse_head

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_READ_BYTES = 1 << 20
# Beyond it the kernel writes a part only.
_WRITE_BYTES = 1 << 30


class Channel:
    """One end of a connection. Several threads may send; one receives.

    Args:
        end: a Unix stream socket; owned from now on.
        send_seconds: how long the other end may take to make room before it counts as gone.
    """

    def __init__(self, end: socket.socket, send_seconds: float) -> None:
        self._end = end
        self._lock = Lock()
        timeout = struct.pack("ll", int(send_seconds), int(send_seconds % 1 * 1e6))
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)

    def send(self, frame: bytes, files: Sequence[int] = ()) -> None:
        """Send a frame whole, with descriptors that stay the caller's.

        Raises:
            OSError: the other end is gone or makes no room; the connection is then of no more use.
        """
        with self._lock:
            try:
                sent = socket.send_fds(self._end, [frame], list(files))
                self._end.sendall(memoryview(frame)[sent:])
            except OSError:
                self.close()
                raise

    def receive(self) -> tuple[Head, bytes, list[int]]:
        """Wait for a frame: its head, body and descriptors, which are then the caller's.

        Raises:
            EOFError: the other end is gone.
            ValueError: what comes is not a frame.
        """
        files: list[int] = []
        try:
            head = parse_head(self._read(HEAD_BYTES, files))
            body = self._read(head.size, files)
            if len(files) != head.files:
                raise ValueError(f"a frame must have its {head.files} files, got {len(files)!r}")
        except BaseException:
            close_all(files)
            raise
        return head, body, files

    def close(self) -> None:
        """End the connection; a thread that receives gets ``EOFError``."""
        with contextlib.suppress(OSError):  # it is already gone
            self._end.shutdown(socket.SHUT_RDWR)

    def _read(self, size: int, files: list[int]) -> bytes:
        data = bytearray()
        room = socket.CMSG_SPACE(MAX_FILES * array.array("i").itemsize)
        while len(data) < size:
            try:
                part, ancillary, _, _ = self._end.recvmsg(
                    min(size - len(data), _READ_BYTES), room, socket.MSG_CMSG_CLOEXEC
                )
            except OSError as error:
                raise EOFError(str(error)) from error
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    descriptors = array.array("i")
                    descriptors.frombytes(content[: len(content) // 4 * 4])
                    files.extend(descriptors)
            if not part:
                raise EOFError("the other end is gone")
            data += part
        return bytes(data)


def sealed(data: bytes | memoryview) -> int:
    """The descriptor of a memory file with ``data``, which nobody can change any more.

    Raises:
        OSError: there is no memory for it.
    """
    file = os.memfd_create("attncache", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest[:_WRITE_BYTES]) :]
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(file)
        raise
    return file


def mapped(file: int, most: int) -> memoryview:
    """The contents of a sealed memory file, read-only; its descriptor stays the caller's.

    Raises:
        ValueError: it is not sealed, empty, or has more than ``most`` bytes.
    """
    try:
        seals = fcntl.fcntl(file, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ValueError(f"a file beside a frame must be in memory: {error}") from error
    size = os.fstat(file).st_size
    if seals & _SEALS != _SEALS or not 0 < size <= most:
        raise ValueError(
            f"a file beside a frame must be sealed and have 1 to {most} bytes, "
            f"got seals {seals!r} and {size!r} bytes"
        )
    return memoryview(mmap.mmap(file, size, prot=mmap.PROT_READ))


def close_all(files: Sequence[int]) -> None:
    for file in files:
        os.close(file)
