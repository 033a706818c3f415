# SPDX-License-Identifier: Apache-2.0
"""An entry of a shard is a file: a checksummed envelope, then the record as every store has it.

    prefix    92 bytes, little endian: magic, version, envelope bytes, record bytes, two HMACs
              (zeros: unsigned), CRC of the rest of the prefix and of the envelope
    envelope  msgpack: edition (32 bytes), tenant, id, created (seconds), feature (float32)
    padding   zeros to the next multiple of 64
    record    as ``attncache_vllm.store.records`` has it; its maps are aligned in memory, too

Where a key is configured, the first HMAC-SHA256 is over what chooses an entry: prefix, envelope and
the record up to its sketch. The second is over the first and the rest of the record, which is read
only when its maps are wanted. Without a key signatures are neither made nor looked at.
"""

import hashlib
import hmac
import struct
import zlib
from dataclasses import dataclass

import msgpack
import numpy as np
from numpy.typing import NDArray

from attncache_vllm.errors import StoreDamaged
from attncache_vllm.store import checks
from attncache_vllm.store.index import Features
from attncache_vllm.store.protocol import token_hash
from attncache_vllm.store.ray.edition import MAX_DIM
from attncache_vllm.store.ray.ring import entry_id
from attncache_vllm.store.records import (
    ALIGNMENT,
    Layout,
    check_section,
    read_layout,
    sketch_of,
    token_ids_of,
)

MAX_ENVELOPE_BYTES = 4 * MAX_DIM + 1024
MAX_TENANT = 128
MAX_CREATED = 1 << 40

_MAGIC = b"ATNCENT\0"
_VERSION = 1
_SIZES = struct.Struct("<8sIIQ")
_HMAC_BYTES = 32
_BODY_HMAC_AT = _SIZES.size + _HMAC_BYTES
_CRC_AT = _BODY_HMAC_AT + _HMAC_BYTES
_PREFIX_BYTES = _CRC_AT + 4


class NotOurs(StoreDamaged):
    """Sound, as far as can be told, and for another release or another key to read."""


class OtherVersion(NotOurs):
    """The version of the format is not the one that is read here."""


class NotSigned(NotOurs):
    """A sound entry, of another key perhaps."""


@dataclass(frozen=True, eq=False)
class Envelope:
    """What a shard knows of an entry beside its record.

    Attributes:
        edition: digest of the edition, 32 bytes.
        tenant: hexadecimal, or empty for the shared one.
        entry_id: ``ring.entry_id`` of the tenant and the record's token hash.
        created: when it was first kept, in seconds since 1970.
        feature: float32 ``[F]``, finite.
    """

    edition: bytes
    tenant: str
    entry_id: int
    created: float
    feature: Features


@dataclass(frozen=True, eq=False)
class Head:
    """A file whose envelope, record's head, token ids and sketch are sound.

    Attributes:
        envelope: whose id is that of the record.
        file: all of it, for ``check_body``.
        record: the part of ``file`` that is the record; read-only if the file is.
        layout: of ``record``.
        sketch: uint64 ``[at most 256]``, ascending.
    """

    envelope: Envelope
    file: memoryview
    record: memoryview
    layout: Layout
    sketch: NDArray[np.uint64]

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """A copy."""
        return token_ids_of(self.record, self.layout)


def check_tenant(tenant: object) -> str:
    """``tenant`` if it may be one: up to 128 hexadecimal digits; else ``ValueError``."""
    if (
        not isinstance(tenant, str)
        or len(tenant) > MAX_TENANT
        or not set(tenant) <= set("0123456789abcdef")
    ):
        # Not its value: a caller that passes a salt by mistake must not find it in a log.
        raise ValueError(
            f"a tenant must be at most {MAX_TENANT} digits of 0 to 9 and a to f, or empty for the "
            "shared one; pass the hash of a salt, not the salt"
        )
    return tenant


def check_record(record: memoryview) -> tuple[Layout, NDArray[np.uint64]]:
    """Check the head of a record, its token ids and its sketch; its layout and its sketch.

    Raises:
        StoreDamaged: one is not as ``encode_record`` makes it.
    """
    layout = read_layout(record)
    check_section(record, layout.token_ids)
    check_section(record, layout.sketch)
    # A record may come from anywhere: without this it could pass for another sequence's.
    if token_hash(token_ids_of(record, layout)) != layout.token_hash:
        raise StoreDamaged("a record's token hash must be that of its token ids")
    sketch = sketch_of(record, layout)
    if not (sketch[:-1] < sketch[1:]).all():
        raise StoreDamaged("a record's sketch must be ascending and distinct")
    return layout, sketch


def check_maps(record: memoryview, layout: Layout) -> None:
    """Check the sections of a record that ``check_record`` leaves out; ``StoreDamaged``."""
    for section in (layout.pooled, *layout.maps.values()):
        check_section(record, section)


def encode_entry(envelope: Envelope, record: memoryview, key: bytes | None) -> list[bytes]:
    """The file of an entry, but for the record, which follows; signed with ``key`` if there is one.

    ``record`` must have passed ``check_record``, and ``envelope`` belong to it.
    """
    packed = msgpack.packb(
        {
            "edition": envelope.edition,
            "tenant": envelope.tenant,
            "id": envelope.entry_id,
            "created": float(envelope.created),
            "feature": envelope.feature.astype("<f4").tobytes(),
        }
    )
    body = packed + bytes(-(_PREFIX_BYTES + len(packed)) % ALIGNMENT)
    sizes = _SIZES.pack(_MAGIC, _VERSION, len(packed), len(record))
    front = read_layout(record).sketch.end
    head_hmac = body_hmac = bytes(_HMAC_BYTES)
    if key is not None:
        head_hmac = _sign(key, sizes, body, record[:front])
        body_hmac = _sign(key, head_hmac, record[front:])
    prefix = sizes + head_hmac + body_hmac
    return [prefix, struct.pack("<I", zlib.crc32(body, zlib.crc32(prefix))), body]


def read_head(file: memoryview, key: bytes | None) -> Head:
    """Check everything of an entry's file but the maps (and pooled input) of its record.

    Raises:
        StoreDamaged: anything at all is not as ``encode_entry`` writes it, another release wrote it
            (``OtherVersion``), or ``key`` did not sign it (``NotSigned``).
    """
    if len(file) < _PREFIX_BYTES:
        raise StoreDamaged(f"an entry has at least {_PREFIX_BYTES} bytes, got {len(file)!r}")
    magic, version, envelope_bytes, record_bytes = _SIZES.unpack_from(file)
    if magic != _MAGIC:
        raise StoreDamaged(f"an entry starts with {_MAGIC!r}, got {magic!r}")
    if version != _VERSION:  # before anything that another version may have elsewhere
        raise OtherVersion(f"an entry's version must be {_VERSION}, got {version!r}")
    end = _PREFIX_BYTES + envelope_bytes
    start = end + -end % ALIGNMENT
    if envelope_bytes > MAX_ENVELOPE_BYTES or start + record_bytes != len(file):
        raise StoreDamaged(
            f"an entry's sizes must add up to its {len(file)} bytes, "
            f"got an envelope of {envelope_bytes!r} and a record of {record_bytes!r}"
        )
    body = file[_PREFIX_BYTES:start]
    (crc,) = struct.unpack_from("<I", file, _CRC_AT)
    if zlib.crc32(body, zlib.crc32(file[:_CRC_AT])) != crc:
        raise StoreDamaged("the envelope of an entry does not have its checksum")
    record = file[start:]
    layout, sketch = check_record(record)
    if key is not None:
        signed = _sign(key, file[: _SIZES.size], body, record[: layout.sketch.end])
        _require_signed(signed, file[_SIZES.size : _BODY_HMAC_AT])
    try:
        envelope = _parse_envelope(body[:envelope_bytes])
    except ValueError as error:
        raise StoreDamaged(f"the envelope of an entry is malformed: {error}") from error
    if envelope.entry_id != entry_id(envelope.tenant, layout.token_hash):
        raise StoreDamaged("an entry's id must be that of its tenant and its token ids")
    return Head(envelope, file, record, layout, sketch)


def check_body(head: Head, key: bytes | None) -> None:
    """Check what ``read_head`` left out; ``StoreDamaged`` if it is not what was written."""
    check_maps(head.record, head.layout)
    if key is not None:
        head_hmac = head.file[_SIZES.size : _BODY_HMAC_AT]
        signed = _sign(key, head_hmac, head.record[head.layout.sketch.end :])
        _require_signed(signed, head.file[_BODY_HMAC_AT:_CRC_AT])


def _parse_envelope(data: memoryview) -> Envelope:
    names = ["edition", "tenant", "id", "created", "feature"]
    given = checks.fields(checks.unpack(data), names, "an envelope")
    created, raw = given["created"], given["feature"]
    if not isinstance(created, float) or not 0 <= created < MAX_CREATED:
        raise ValueError(f"created must be 0 to {MAX_CREATED} s, got {checks.shown(created)}")
    if not isinstance(raw, bytes) or not 0 < len(raw) <= 4 * MAX_DIM or len(raw) % 4:
        raise ValueError(f"feature must be 1 to {MAX_DIM} float32, got {checks.shown(raw)}")
    feature = np.frombuffer(raw, dtype="<f4").astype(np.float32)
    if not np.isfinite(feature).all():
        raise ValueError("feature must be finite, got NaN or infinity")
    return Envelope(
        edition=checks.digest(given["edition"], "edition"),
        tenant=check_tenant(given["tenant"]),
        entry_id=checks.integer(given["id"], 0, (1 << 63) - 1, "id"),
        created=created,
        feature=feature,
    )


def _sign(key: bytes, *parts: bytes | memoryview) -> bytes:
    signature = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        signature.update(part)
    return signature.digest()


def _require_signed(expected: bytes, found: memoryview) -> None:
    if not hmac.compare_digest(expected, found):
        raise NotSigned("an entry must be signed with the configured key, got another signature")
