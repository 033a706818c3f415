# SPDX-License-Identifier: Apache-2.0
"""The file of an entry: what is read is what was written and signed, or nothing is."""

import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from entry_samples import ALICE, DIGEST, FEATURES, bytes_of, id_of
from hypothesis import given, settings
from hypothesis import strategies as st
from store_samples import FEATURE_DIM, make_record

from attncache_vllm.errors import StoreDamaged
from attncache_vllm.store.ray.envelope import (
    Envelope,
    NotSigned,
    OtherVersion,
    check_body,
    check_record,
    check_tenant,
    encode_entry,
    read_head,
)
from attncache_vllm.store.ray.files import EntryFiles
from attncache_vllm.store.records import ALIGNMENT, encode_record

KEY = b"a key of the test"
PREFIX = 92


def envelope_of(number: int, tenant: str = ALICE) -> Envelope:
    feature = FEATURES[number]
    return Envelope(bytes.fromhex(DIGEST), tenant, id_of(number, tenant), 1234.5, feature)


def file_of(number: int, key: bytes | None = None, **changes: Any) -> bytes:
    envelope, record = replace(envelope_of(number), **changes), bytes_of(number)
    return b"".join(encode_entry(envelope, record.data, key)) + record.tobytes()


def read_all(data: bytes | bytearray, key: bytes | None = None) -> None:
    check_body(read_head(memoryview(data), key), key)


@pytest.mark.parametrize("key", [None, KEY])
def test_an_entry_survives_the_round_trip(key: bytes | None) -> None:
    data = file_of(5, key)
    head = read_head(memoryview(data), key)
    check_body(head, key)
    found, expected = head.envelope, envelope_of(5)
    assert (found.edition, found.tenant) == (expected.edition, expected.tenant)
    assert (found.entry_id, found.created) == (expected.entry_id, expected.created)
    np.testing.assert_array_equal(found.feature, expected.feature)
    assert bytes(head.record) == bytes_of(5).tobytes()
    np.testing.assert_array_equal(head.sketch, make_record(5).sketch)
    np.testing.assert_array_equal(head.token_ids, make_record(5).token_ids)


def test_the_record_lies_on_an_aligned_offset() -> None:
    data = file_of(5)
    assert data.index(bytes_of(5).tobytes()) % ALIGNMENT == 0


@pytest.mark.parametrize("key", [None, KEY])
def test_every_changed_byte_is_noticed(key: bytes | None) -> None:
    data = bytearray(file_of(3, key))
    # Without a key, what would sign is under the checksum only.
    for place in range(len(data)):
        data[place] ^= 1 << place % 8
        with pytest.raises(StoreDamaged):
            read_all(data, key)
        data[place] ^= 1 << place % 8
    read_all(data, key)


def test_every_truncation_and_any_trailing_byte_is_noticed() -> None:
    data = file_of(3)
    for size in range(len(data)):
        with pytest.raises(StoreDamaged):
            read_all(data[:size])
    with pytest.raises(StoreDamaged):
        read_all(data + bytes(ALIGNMENT))


def test_a_head_is_sound_where_only_the_maps_are_damaged() -> None:
    data = bytearray(file_of(3, KEY))
    data[-65] ^= 1
    head = read_head(memoryview(data), KEY)
    with pytest.raises(StoreDamaged, match="does not have its checksum"):
        check_body(head, KEY)


@pytest.mark.parametrize("written", [None, b"another key"])
def test_what_the_key_did_not_sign_is_not_read(written: bytes | None) -> None:
    data = file_of(3, written)
    read_all(data, written)
    with pytest.raises(NotSigned):
        read_head(memoryview(data), KEY)


@pytest.mark.parametrize("key", [None, KEY])
def test_an_entry_of_another_release_is_told_from_a_damaged_one(key: bytes | None) -> None:
    data = bytearray(file_of(3, KEY))
    struct.pack_into("<I", data, 8, 2)
    with pytest.raises(OtherVersion, match="version must be 1, got 2"):
        read_head(memoryview(data), key)


def test_without_a_key_signatures_are_not_looked_at() -> None:
    read_all(file_of(3, KEY), None)


def with_maps(number: int, value: int) -> np.ndarray:
    """The record of ``number`` with other maps of the same size."""
    record = make_record(number)
    maps = {layer: np.full_like(encoded, value) for layer, encoded in record.maps.items()}
    return np.frombuffer(b"".join(encode_record(replace(record, maps=maps))), np.uint8)


def test_maps_of_another_record_do_not_pass_although_all_checksums_are_right() -> None:
    """The head of the record, with the maps' checksums in it, is under the first signature, the
    maps under the second; and the second is of one first only."""
    envelope = envelope_of(3)
    first, second = with_maps(3, 1), with_maps(3, 2)
    head = b"".join(encode_entry(envelope, first.data, KEY))
    forged = head + second.tobytes()
    with pytest.raises(NotSigned):
        read_head(memoryview(forged), KEY)
    other = b"".join(encode_entry(envelope, second.data, KEY))
    mixed = bytearray(head[:52] + other[52:84] + head[84:] + first.tobytes())
    struct.pack_into("<I", mixed, 88, zlib.crc32(mixed[PREFIX : len(head)], zlib.crc32(mixed[:88])))
    with pytest.raises(StoreDamaged):
        read_all(mixed, KEY)


def forge(change: Any) -> memoryview:
    """An entry whose envelope was changed and has its right checksum."""
    data, record = file_of(3), bytes_of(3).tobytes()
    (size,) = struct.unpack_from("<I", data, 12)
    packed = msgpack.packb(change(msgpack.unpackb(data[PREFIX : PREFIX + size])))
    body = packed + bytes(-(PREFIX + len(packed)) % ALIGNMENT)
    prefix = data[:12] + struct.pack("<IQ", len(packed), len(record)) + bytes(64)
    crc = struct.pack("<I", zlib.crc32(body, zlib.crc32(prefix)))
    return memoryview(prefix + crc + body + record)


def test_an_unchanged_forgery_is_accepted() -> None:
    """Without this the refusals below could come from a mistake in ``forge``."""
    assert read_head(forge(lambda envelope: envelope), None).envelope.tenant == ALICE


@pytest.mark.parametrize(
    "change",
    [
        lambda e: {**e, "extra": 1},
        lambda e: {**e, "edition": b"short"},
        lambda e: {**e, "tenant": "b0b000"},
        lambda e: {**e, "tenant": ""},
        lambda e: {**e, "tenant": "not hex"},
        lambda e: {**e, "tenant": b"a11ce0"},
        lambda e: {**e, "id": e["id"] + 1},
        lambda e: {**e, "id": -1},
        lambda e: {**e, "created": 1},
        lambda e: {**e, "created": -1.0},
        lambda e: {**e, "created": float("nan")},
        lambda e: {**e, "created": float("inf")},
        lambda e: {**e, "feature": b""},
        lambda e: {**e, "feature": bytes(7)},
        lambda e: {**e, "feature": np.full(FEATURE_DIM, np.nan, "<f4").tobytes()},
        lambda e: {**e, "feature": bytes(4 * ((1 << 16) + 1))},
        lambda e: [e],
        lambda e: None,
    ],
)
def test_forged_envelopes_with_right_checksums_are_refused(change: Any) -> None:
    with pytest.raises(StoreDamaged):
        read_head(forge(change), None)


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_damage_and_nothing_else(data: bytes) -> None:
    for start in (b"", b"ATNCENT\0\1\0\0\0"):
        with pytest.raises(StoreDamaged):
            read_head(memoryview(start + data), None)


def test_a_record_that_passes_for_another_sequence_is_refused() -> None:
    data = bytearray(bytes_of(3).tobytes())
    (size,) = struct.unpack_from("<I", data, 12)
    at = data.index(make_record(3).token_hash)
    data[at : at + 32] = make_record(4).token_hash
    end = 28 + size + -(28 + size) % ALIGNMENT
    struct.pack_into("<I", data, 24, zlib.crc32(data[28:end], zlib.crc32(data[:24])))
    with pytest.raises(StoreDamaged, match="must be that of its token ids"):
        check_record(memoryview(data))


def test_a_record_with_a_sketch_out_of_order_is_refused() -> None:
    record = next(make_record(n) for n in range(9) if len(make_record(n).sketch) > 1)
    data = bytearray(b"".join(encode_record(record)))
    layout, _ = check_record(memoryview(data))
    start, stop, end = layout.sketch.start, layout.sketch.stop, layout.sketch.end
    crc = zlib.crc32(data[start:end])
    data[start:stop] = record.sketch[::-1].tobytes()
    (size,) = struct.unpack_from("<I", data, 12)
    head = msgpack.unpackb(data[28 : 28 + size])
    assert head["sketch"][1] == crc
    head["sketch"][1] = zlib.crc32(data[start:end])
    packed = msgpack.packb(head)
    assert len(packed) == size, "the checksum of another sample must be as long in msgpack"
    data[28 : 28 + size] = packed
    body_end = 28 + size + -(28 + size) % ALIGNMENT
    struct.pack_into("<I", data, 24, zlib.crc32(data[28:body_end], zlib.crc32(data[:24])))
    with pytest.raises(StoreDamaged, match="ascending and distinct"):
        check_record(memoryview(data))


@pytest.mark.parametrize("tenant", ["", "0", "0123456789abcdef" * 8])
def test_a_tenant_is_hexadecimal_or_shared(tenant: str) -> None:
    assert check_tenant(tenant) == tenant


@pytest.mark.parametrize("tenant", ["salt", "AB", "a" * 129, None, 7, "../ab", "a\n"])
def test_a_salt_is_no_tenant_and_stays_out_of_the_message(tenant: object) -> None:
    with pytest.raises(ValueError, match="pass the hash of a salt") as error:
        check_tenant(tenant)
    assert "got" not in str(error.value)


# -- the folder ---------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> EntryFiles:
    (tmp_path / DIGEST[:16]).mkdir()
    return EntryFiles(tmp_path, KEY)


def path_of(tmp_path: Path, number: int) -> Path:
    return tmp_path / DIGEST[:16] / f"{id_of(number, ALICE):016x}.entry"


def test_what_is_written_is_scanned_and_read_again(files: EntryFiles, tmp_path: Path) -> None:
    for number in range(5):
        size = files.write(envelope_of(number), bytes_of(number).data)
        assert size == path_of(tmp_path, number).stat().st_size
    files.remove(DIGEST, id_of(4, ALICE))
    heads = list(files.scan(DIGEST, FEATURE_DIM))
    assert {head.envelope.entry_id for head in heads if head} == {
        id_of(number, ALICE) for number in range(4)
    }
    record = np.frombuffer(files.read(DIGEST, id_of(2, ALICE), whole=True).record, np.uint8)
    np.testing.assert_array_equal(record, bytes_of(2))
    assert not record.flags.writeable


def test_a_scan_removes_what_is_damaged_and_leaves_what_others_may_read(
    files: EntryFiles, tmp_path: Path
) -> None:
    for number in range(6):
        files.write(envelope_of(number), bytes_of(number).data)
    damaged, empty, misplaced, other, later = (path_of(tmp_path, number) for number in range(5))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    empty.write_bytes(b"")
    misplaced.rename(misplaced.with_name("0123.entry"))
    other.write_bytes(file_of(3, b"another key"))
    later.write_bytes(later.read_bytes()[:8] + struct.pack("<I", 2) + later.read_bytes()[12:])
    (damaged.parent / "half.tmp").write_bytes(b"cut off")
    (damaged.parent / "edition").write_bytes(b"not an entry")
    found = list(files.scan(DIGEST, FEATURE_DIM))
    assert len([head for head in found if head is None]) == 5
    assert {path.name for path in damaged.parent.iterdir()} == {
        *(path_of(tmp_path, number).name for number in (3, 4, 5)),
        "edition",
    }


def test_a_feature_of_another_size_is_damage(files: EntryFiles) -> None:
    files.write(envelope_of(1), bytes_of(1).data)
    assert list(files.scan(DIGEST, FEATURE_DIM + 1)) == [None]


def test_one_that_is_gone_is_damage(files: EntryFiles) -> None:
    with pytest.raises(StoreDamaged, match="cannot be mapped"):
        files.read(DIGEST, 7, whole=False)
