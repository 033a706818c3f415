# SPDX-License-Identifier: Apache-2.0
import struct
import zlib
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from store_samples import assert_same, make_record

from attncache_vllm.errors import StoreDamaged
from attncache_vllm.store import Record, token_hash
from attncache_vllm.store.records import (
    ALIGNMENT,
    MAX_SKETCH,
    decode_record,
    encode_record,
    read_layout,
)


def with_token_ids(token_ids: np.ndarray, **fields: Any) -> Record:
    return Record(
        token_hash=token_hash(token_ids), length=len(token_ids), token_ids=token_ids, **fields
    )


records = st.builds(
    with_token_ids,
    token_ids=arrays.arrays(np.int32, st.integers(1, 300)),
    sketch=arrays.arrays(np.uint64, st.integers(0, MAX_SKETCH), unique=True).map(np.sort),
    codec=st.text(min_size=1, max_size=64).filter(lambda text: text.isprintable()),
    pooled=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 9), st.integers(1, 40)),
        elements=st.floats(-60000, 60000, width=16),
    ),
    maps=st.dictionaries(
        st.integers(0, 1023),
        arrays.arrays(np.uint8, st.integers(1, 300)),
        max_size=5,
    ),
)


def joined(record: Record) -> bytes:
    return b"".join(encode_record(record))


def forge(change: Any) -> memoryview:
    """A record whose header was changed and whose head has its right checksum."""
    data = joined(make_record(0))
    header_bytes = struct.unpack_from("<I", data, 12)[0]
    header = msgpack.unpackb(data[28 : 28 + header_bytes])
    payload = data[28 + header_bytes + -(28 + header_bytes) % ALIGNMENT :]
    packed = msgpack.packb(change(header))
    body = packed + bytes(-(28 + len(packed)) % ALIGNMENT)
    prefix = data[:12] + struct.pack("<IQ", len(packed), len(payload))
    crc = zlib.crc32(body, zlib.crc32(prefix))
    return memoryview(prefix + struct.pack("<I", crc) + body + payload)


@given(records)
def test_any_record_survives_the_round_trip(record: Record) -> None:
    expected = replace(record, maps=dict(sorted(record.maps.items())))
    assert_same(decode_record(memoryview(joined(record))), expected)


@given(records)
def test_sections_lie_on_aligned_offsets_and_fill_the_record(record: Record) -> None:
    data = memoryview(joined(record))
    layout = read_layout(data)
    sections = list(layout.sections())
    assert sections[:2] == [layout.token_ids, layout.sketch]  # what is read without the maps
    assert all(section.start % ALIGNMENT == 0 for section in sections)
    assert [s.end for s in sections] == [*(s.start for s in sections[1:]), len(data)]


def test_maps_are_read_only_views_of_the_buffer() -> None:
    data = joined(make_record(0))
    for encoded in decode_record(memoryview(data)).maps.values():
        assert np.shares_memory(encoded, np.frombuffer(data, np.uint8))
        assert not encoded.flags.writeable


def test_every_single_bit_flip_is_noticed() -> None:
    data = bytearray(joined(make_record(0)))
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(StoreDamaged):
            decode_record(memoryview(data))
        data[bit // 8] ^= 1 << bit % 8
    assert_same(decode_record(memoryview(data)), make_record(0))


def test_every_truncation_and_any_trailing_byte_is_noticed() -> None:
    data = joined(make_record(0))
    for size in range(len(data)):
        with pytest.raises(StoreDamaged):
            decode_record(memoryview(data)[:size])
    with pytest.raises(StoreDamaged):
        decode_record(memoryview(data + bytes(ALIGNMENT)))


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_damage_and_nothing_else(data: bytes) -> None:
    with pytest.raises(StoreDamaged):
        decode_record(memoryview(data))
    forged = b"ATNCREC\0" + data
    with pytest.raises(StoreDamaged):
        decode_record(memoryview(forged))


def test_an_unchanged_forgery_is_accepted() -> None:
    """Without this the refusals below could come from a mistake in ``forge``."""
    assert_same(decode_record(forge(lambda header: header)), make_record(0))


@pytest.mark.parametrize(
    "change",
    [
        lambda h: {**h, "extra": 1},
        lambda h: {k: v for k, v in h.items() if k != "codec"},
        lambda h: {**h, "length": 0},
        lambda h: {**h, "length": True},
        lambda h: {**h, "length": 1 << 40},
        lambda h: {**h, "codec": ""},
        lambda h: {**h, "token_hash": b"short"},
        lambda h: {**h, "length": 17},
        lambda h: {**h, "length": 1 << 20},
        lambda h: {**h, "token_ids": -1},
        lambda h: {**h, "token_ids": [1, 0]},
        lambda h: {**h, "sketch": 1},
        lambda h: {**h, "sketch": [1]},
        lambda h: {**h, "sketch": [-8, h["sketch"][1]]},
        lambda h: {**h, "sketch": [257, h["sketch"][1]]},
        lambda h: {**h, "sketch": [1 << 62, h["sketch"][1]]},
        lambda h: {**h, "sketch": [9, h["sketch"][1]]},
        lambda h: {**h, "pooled": [1 << 40, 1, 0]},
        lambda h: {**h, "pooled": [1 << 13, 1 << 13, 0]},
        lambda h: {**h, "pooled": [2, 4]},
        lambda h: {**h, "maps": {}},
        lambda h: {**h, "maps": h["maps"][:1]},
        lambda h: {**h, "maps": [[3, *h["maps"][0][1:]], [1, *h["maps"][1][1:]]]},
        lambda h: {**h, "maps": [[1, *h["maps"][0][1:]], [1, *h["maps"][1][1:]]]},
        lambda h: {**h, "maps": [[1, 1 << 62, 0], h["maps"][1]]},
        lambda h: {**h, "maps": [[1, -64, 0], h["maps"][1]]},
        lambda h: {**h, "maps": [[1.0, 60, 0], h["maps"][1]]},
        lambda h: [h],
        lambda h: None,
    ],
)
def test_forged_headers_with_right_checksums_are_refused(change: Any) -> None:
    with pytest.raises(StoreDamaged):
        decode_record(forge(change))


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("token_hash", b"short", "32 bytes"),
        ("token_hash", bytes(32), "must be that of token_ids"),
        ("token_ids", np.zeros(1, np.int64), r"must be int32 \[1\], got int64"),
        ("token_ids", np.zeros(2, np.int32), r"must be int32 \[1\]"),
        ("token_ids", np.zeros((1, 1), np.int32), r"must be int32 \[1\]"),
        ("token_ids", np.zeros(1, np.int32), "must be that of token_ids"),
        ("length", 2, r"must be int32 \[2\]"),
        ("sketch", np.zeros(1, np.int64), "must be uint64"),
        ("sketch", np.zeros((1, 1), np.uint64), "must be uint64"),
        ("sketch", np.arange(257, dtype=np.uint64), "at most 256"),
        ("sketch", np.array([2, 1], np.uint64), "ascending and distinct"),
        ("sketch", np.array([1, 1], np.uint64), "ascending and distinct"),
        ("length", 0, "length must be an integer from 1"),
        ("length", (1 << 20) + 1, "length must be an integer from 1"),
        ("codec", "", "codec"),
        ("pooled", np.zeros(4, np.float32), "slots, hidden"),
        ("pooled", np.zeros((0, 4), np.float32), "slots, hidden"),
        ("pooled", np.full((2, 4), 70000, np.float32), "got a magnitude of 70000.0"),
        ("pooled", np.full((2, 4), np.nan, np.float32), "finite"),
        ("maps", {0: np.zeros(4, np.int8)}, "uint8"),
        ("maps", {0: np.zeros((2, 2), np.uint8)}, "uint8"),
        ("maps", {0: np.zeros(0, np.uint8)}, "uint8"),
        ("maps", {-1: np.zeros(4, np.uint8)}, "layer"),
        ("maps", {1024: np.zeros(4, np.uint8)}, "layer"),
    ],
)
def test_a_record_outside_its_limits_is_not_encoded(field: str, value: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        encode_record(replace(make_record(0), **{field: value}))


def test_a_strided_map_is_stored_as_its_values() -> None:
    strided = np.arange(100, dtype=np.uint8)[::2]
    record = replace(make_record(0), maps={0: strided})
    np.testing.assert_array_equal(decode_record(memoryview(joined(record))).maps[0], strided)
