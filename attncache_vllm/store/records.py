# SPDX-License-Identifier: Apache-2.0
"""One record on disk: a checksummed head, then checksummed sections on 64-byte boundaries.

    prefix    28 bytes, little endian: magic, version, header bytes, payload bytes, CRC of the head
    header    msgpack: token_hash, length, codec, token_ids CRC, sketch [values, CRC],
              pooled [slots, hidden, CRC], maps [[layer, bytes, CRC], ...]
    padding   zeros to the next multiple of 64
    sections  token ids (int32), sketch (uint64), pooled (float16), then one map per layer in
              ascending order, each padded with zeros

What is needed to choose an entry comes first, so that it is read without touching the maps.

A CRC-32 covers the padding after its bytes as well, so that every bit of a record is under exactly
one. Sections follow each other without gaps: their offsets are sums of their sizes and there is no
offset on disk to forge. A CRC finds accidents; it is no defence against someone who can write to
the store.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import msgpack
import numpy as np
from numpy.typing import NDArray

from attncache_vllm.errors import StoreDamaged
from attncache_vllm.store import checks
from attncache_vllm.store.protocol import Record, token_hash

ALIGNMENT = 64
MAX_HEADER_BYTES = 1 << 20
MAX_LENGTH = 1 << 20
MAX_LAYERS = 1 << 10
MAX_SKETCH = 1 << 8
MAX_POOLED_VALUES = 1 << 24
MAX_MAP_BYTES = 1 << 36

_MAGIC = b"ATNCREC\0"
_VERSION = 2
_PREFIX = struct.Struct("<8sIIQI")
_CRC_AT = _PREFIX.size - 4


@dataclass(frozen=True)
class Section:
    """Bytes of a record under one checksum: data from start to stop, zeros from stop to end."""

    start: int
    stop: int
    end: int
    crc: int


@dataclass(frozen=True)
class Layout:
    """A verified head: what the record is, and where its sections lie in its buffer."""

    token_hash: bytes
    length: int
    codec: str
    slots: int
    hidden: int
    token_ids: Section
    sketch: Section
    pooled: Section
    maps: dict[int, Section]

    def sections(self) -> Iterator[Section]:
        """In the order they lie in."""
        yield self.token_ids
        yield self.sketch
        yield self.pooled
        yield from self.maps.values()


def encode_record(record: Record) -> list[bytes | memoryview]:
    """The buffers whose concatenation is ``record`` on disk; maps are not copied.

    Raises:
        ValueError: a field is outside its limits, fields contradict each other, or pooled does not
            fit float16.
    """
    checks.digest(record.token_hash, "token_hash")
    checks.integer(record.length, 1, MAX_LENGTH, "length")
    checks.text(record.codec, "codec", longest=64)
    token_ids, sketch = record.token_ids, record.sketch
    if token_ids.dtype != np.int32 or token_ids.shape != (record.length,):
        raise ValueError(
            f"token_ids must be int32 [{record.length}], got {token_ids.dtype} {token_ids.shape!r}"
        )
    if token_hash(token_ids) != record.token_hash:
        raise ValueError(
            f"token_hash must be that of token_ids, {token_hash(token_ids).hex()}, "
            f"got {record.token_hash.hex()}"
        )
    if sketch.dtype != np.uint64 or sketch.ndim != 1 or sketch.size > MAX_SKETCH:
        raise ValueError(
            f"a sketch must be uint64 [at most {MAX_SKETCH}], got {sketch.dtype} {sketch.shape!r}"
        )
    if not (sketch[:-1] < sketch[1:]).all():
        raise ValueError(f"a sketch must be ascending and distinct, got {sketch.tolist()!r}")
    if record.pooled.ndim != 2 or not 0 < record.pooled.size <= MAX_POOLED_VALUES:
        raise ValueError(f"pooled must be [slots, hidden], got shape {record.pooled.shape!r}")
    with np.errstate(over="ignore"):
        pooled = np.ascontiguousarray(record.pooled, dtype="<f2")
    if not np.isfinite(pooled).all():
        largest = float(np.max(np.abs(record.pooled)))
        raise ValueError(f"pooled must be finite in float16, got a magnitude of {largest!r}")

    buffers: list[bytes | memoryview] = []
    token_ids_crc = _append_section(buffers, memoryview(token_ids.astype("<i4").tobytes()))
    sketch_crc = _append_section(buffers, memoryview(sketch.astype("<u8").tobytes()))
    pooled_crc = _append_section(buffers, pooled.data.cast("B"))
    maps: list[list[int]] = []
    for layer in sorted(record.maps):
        encoded = record.maps[layer]
        checks.integer(layer, 0, MAX_LAYERS - 1, "layer")
        if encoded.dtype != np.uint8 or encoded.ndim != 1 or not 0 < encoded.size <= MAX_MAP_BYTES:
            raise ValueError(
                f"an encoded map must be uint8 [bytes], got {encoded.dtype} {encoded.shape!r} "
                f"for layer {layer}"
            )
        crc = _append_section(buffers, np.ascontiguousarray(encoded).data)
        maps.append([layer, encoded.size, crc])
    header = msgpack.packb(
        {
            "token_hash": record.token_hash,
            "length": record.length,
            "codec": record.codec,
            "token_ids": token_ids_crc,
            "sketch": [sketch.size, sketch_crc],
            "pooled": [*pooled.shape, pooled_crc],
            "maps": maps,
        }
    )
    payload_bytes = sum(len(buffer) for buffer in buffers)
    prefix = _PREFIX.pack(_MAGIC, _VERSION, len(header), payload_bytes, 0)[:_CRC_AT]
    body = header + bytes(_padding(_PREFIX.size + len(header)))
    crc = zlib.crc32(body, zlib.crc32(prefix))
    return [prefix + struct.pack("<I", crc) + body, *buffers]


def read_layout(record: memoryview) -> Layout:
    """Check the head of a record and that its sections fill ``record`` exactly.

    Raises:
        StoreDamaged: anything at all is not as ``encode_record`` writes it.
    """
    if len(record) < _PREFIX.size:
        raise StoreDamaged(f"a record has at least {_PREFIX.size} bytes, got {len(record)!r}")
    magic, version, header_bytes, payload_bytes, crc = _PREFIX.unpack_from(record)
    payload_start = _aligned(_PREFIX.size + header_bytes)
    if magic != _MAGIC:
        raise StoreDamaged(f"a record starts with {_MAGIC!r}, got {magic!r}")
    if header_bytes > MAX_HEADER_BYTES or payload_start + payload_bytes != len(record):
        raise StoreDamaged(
            f"a record's sizes must add up to its {len(record)} bytes, "
            f"got a header of {header_bytes!r} and a payload of {payload_bytes!r}"
        )
    body = record[_PREFIX.size : payload_start]
    if zlib.crc32(body, zlib.crc32(record[:_CRC_AT])) != crc:
        raise StoreDamaged("the head of a record does not have its checksum")
    if version != _VERSION:
        raise StoreDamaged(f"record version must be {_VERSION}, got {version!r}")
    try:
        layout = _parse_header(body[:header_bytes], payload_start)
    except ValueError as error:
        raise StoreDamaged(f"the header of a record is malformed: {error}") from error
    if list(layout.sections())[-1].end != len(record):
        raise StoreDamaged(f"the sections of a record must fill its {len(record)} bytes")
    return layout


def check_section(record: memoryview, section: Section) -> None:
    """Raise ``StoreDamaged`` unless ``section`` holds the bytes that were written."""
    if zlib.crc32(record[section.start : section.end]) != section.crc:
        raise StoreDamaged(f"the section at byte {section.start} does not have its checksum")


def token_ids_of(record: memoryview, layout: Layout) -> NDArray[np.int32]:
    """A copy of the token ids of a record."""
    section = layout.token_ids
    return np.frombuffer(record[section.start : section.stop], dtype="<i4").astype(np.int32)


def sketch_of(record: memoryview, layout: Layout) -> NDArray[np.uint64]:
    """A copy of the sketch of a record."""
    section = layout.sketch
    return np.frombuffer(record[section.start : section.stop], dtype="<u8").astype(np.uint64)


def assemble(record: memoryview, layout: Layout) -> Record:
    """The record behind a layout; its maps are views of ``record``, the rest are copies."""
    pooled = np.frombuffer(record[layout.pooled.start : layout.pooled.stop], dtype="<f2")
    return Record(
        token_hash=layout.token_hash,
        length=layout.length,
        codec=layout.codec,
        pooled=pooled.reshape(layout.slots, layout.hidden).astype(np.float32),
        maps={
            layer: np.frombuffer(record[section.start : section.stop], dtype=np.uint8)
            for layer, section in layout.maps.items()
        },
        token_ids=token_ids_of(record, layout),
        sketch=sketch_of(record, layout),
    )


def decode_record(record: memoryview) -> Record:
    """Check every byte of a record and assemble it; ``StoreDamaged`` if one is wrong."""
    layout = read_layout(record)
    for section in layout.sections():
        check_section(record, section)
    return assemble(record, layout)


def _parse_header(data: memoryview, payload_start: int) -> Layout:
    names = ["token_hash", "length", "codec", "token_ids", "sketch", "pooled", "maps"]
    header = checks.fields(checks.unpack(data), names, "a record header")
    length = checks.integer(header["length"], 1, MAX_LENGTH, "length")
    token_ids = _section(payload_start, 4 * length, header["token_ids"])
    values, crc = checks.items(header["sketch"], 2, "sketch")
    checks.integer(values, 0, MAX_SKETCH, "sketch values")
    sketch = _section(token_ids.end, 8 * values, crc)
    slots, hidden, crc = checks.items(header["pooled"], 3, "pooled")
    checks.integer(slots, 1, MAX_POOLED_VALUES, "slots")
    checks.integer(hidden, 1, MAX_POOLED_VALUES // slots, "hidden")
    pooled = _section(sketch.end, 2 * slots * hidden, crc)
    maps: dict[int, Section] = {}
    end, lowest = pooled.end, 0
    for item in checks.items(header["maps"], None, "maps"):
        layer, size, crc = checks.items(item, 3, "a map")
        checks.integer(layer, lowest, MAX_LAYERS - 1, "layer")
        checks.integer(size, 1, MAX_MAP_BYTES, "map bytes")
        maps[layer] = _section(end, size, crc)
        end, lowest = maps[layer].end, layer + 1
    return Layout(
        token_hash=checks.digest(header["token_hash"], "token_hash"),
        length=length,
        codec=checks.text(header["codec"], "codec", longest=64),
        slots=slots,
        hidden=hidden,
        token_ids=token_ids,
        sketch=sketch,
        pooled=pooled,
        maps=maps,
    )


def _section(start: int, size: int, crc: object) -> Section:
    checked = checks.integer(crc, 0, (1 << 32) - 1, "checksum")
    return Section(start, start + size, _aligned(start + size), checked)


def _append_section(buffers: list[bytes | memoryview], data: memoryview) -> int:
    padding = bytes(_padding(len(data)))
    buffers += [data, padding]
    return zlib.crc32(padding, zlib.crc32(data))


def _padding(size: int) -> int:
    return -size % ALIGNMENT


def _aligned(size: int) -> int:
    return size + _padding(size)
