# SPDX-License-Identifier: Apache-2.0
"""Feeds mutated bytes to everything that reads what a store keeps or a cluster sends:
``python -m benchmarks.fuzz --inputs 1000000``. Exits with 1 at the first input that is answered by
anything but an error made for it, or by much memory; ``--seed`` says how to find it again.

Half of the inputs are files of bytes that were changed, half have changed values and right sizes
and checksums, so that what lies behind those is reached.
"""

from __future__ import annotations

import argparse
import random
import struct
import sys
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
from rich.console import Console

from attncache_vllm.errors import StoreError
from attncache_vllm.store import Namespace, Record, checks, token_hash
from attncache_vllm.store.ray import messages
from attncache_vllm.store.ray.edition import Edition
from attncache_vllm.store.ray.envelope import (
    Envelope,
    check_body,
    check_record,
    encode_entry,
    read_head,
)
from attncache_vllm.store.ray.ring import entry_id
from attncache_vllm.store.records import ALIGNMENT, decode_record, encode_record

# What reading an input may take beside the input: error messages, checksums, copies of small parts.
MOST_MEMORY = 1 << 20

_KEY = b"key"
_RECORD_PREFIX, _ENTRY_PREFIX = 28, 92
_ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 63, 64, 1 << 20, 1 << 31, 1 << 32, (1 << 63) - 1, (1 << 64) - 1),
    *(-(1 << 63), 0.0, float("nan"), float("inf"), "", "text", "a" * 5000, b"", bytes(32), b"\xff"),
    *([], {}, [[]], {1: 2}, [0] * 300, msgpack.ExtType(5, b"x"), msgpack.Timestamp(1, 1)),
)


@dataclass(frozen=True)
class Target:
    """Something that reads.

    Attributes:
        samples: values it accepts: plain data that ``frame`` makes bytes of.
        frame: what puts sizes and checksums around packed plain data.
        read: raises ``ValueError`` or ``StoreError`` for what it does not accept.
    """

    samples: tuple[Any, ...]
    frame: Callable[[bytes], bytes]
    read: Callable[[bytes], object]


def targets() -> dict[str, Target]:
    """What there is to feed."""
    record = b"".join(encode_record(_sample_record()))
    entry = _sample_entry(record)
    header, payload = _parts(record, _RECORD_PREFIX)
    envelope, _ = _parts(entry, _ENTRY_PREFIX)
    edition = msgpack.unpackb(_sample_edition().to_bytes())
    requests = tuple(map(messages.request_body, _sample_requests()))
    news = messages.news_body(
        messages.News({"entries": 1, "bytes": 2, "damaged": 0}, 0, {1: "?"}, {"late": 1})
    )
    found = np.zeros((2, 3), np.int64), np.zeros((2, 3), np.float32), np.zeros((2, 3), np.int64)
    ids = messages.token_ids_body([np.arange(5, dtype=np.int32), None])
    return {
        "record": Target(
            (header,), lambda data: _framed_record(data, payload), lambda data: _read_record(data)
        ),
        "entry": Target(
            (envelope,),
            lambda data: _framed_entry(data, entry, record),
            lambda data: check_body(read_head(memoryview(data), None), None),
        ),
        "signed entry": Target(
            (envelope,),
            lambda data: _framed_entry(data, entry, record),
            lambda data: _read_signed(data, entry),
        ),
        "edition": Target((edition,), bytes, lambda data: Edition.from_bytes(data).digest),
        "request": Target(
            requests, bytes, lambda data: messages.parse_request(checks.unpack(data))
        ),
        "found": Target(
            (messages.found_body(found),),
            bytes,
            lambda data: messages.parse_found(checks.unpack(data), 2, 3, np.float32),
        ),
        "token ids": Target(
            (ids,), bytes, lambda data: messages.parse_token_ids(checks.unpack(data), 2)
        ),
        "news": Target((news,), bytes, lambda data: messages.parse_news(checks.unpack(data))),
        "head": Target(
            (messages.Kind.NEWS,),
            lambda _: messages.frame(messages.Kind.NEWS, 0, None)[: messages.HEAD_BYTES],
            messages.parse_head,
        ),
    }


def fuzz(inputs: int, seed: int) -> Counter[str]:
    """Feed ``inputs`` mutations, of all targets in turn; counts by target and whether it accepted.

    Raises:
        AssertionError: an input is not answered as it should be.
    """
    draw = random.Random(seed)
    fed: Counter[str] = Counter()
    chosen = list(targets().items())
    tracemalloc.start()
    try:
        for number in range(inputs):
            name, target = chosen[number % len(chosen)]
            data = mutate(target, draw)
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            try:
                target.read(data)
                fed[f"{name}, accepted"] += 1
            except (ValueError, StoreError):
                fed[f"{name}, refused"] += 1
            except Exception as error:
                raise AssertionError(
                    f"{name}, input {number} of seed {seed}: {type(error).__name__}: {error}"
                ) from error
            taken = tracemalloc.get_traced_memory()[1] - before
            if taken > MOST_MEMORY + 4 * len(data):
                raise AssertionError(
                    f"{name}, input {number} of seed {seed}: {len(data)} bytes took {taken}"
                )
    finally:
        tracemalloc.stop()
    return fed


def mutate(target: Target, draw: random.Random) -> bytes:
    """One input: bytes of a sample changed, or values of it."""
    sample = draw.choice(target.samples)
    if draw.random() < 0.5:
        return target.frame(msgpack.packb(_changed_value(sample, draw)))
    data = bytearray(target.frame(msgpack.packb(sample)))
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        _change_bytes(data, draw)
    return bytes(data)


def _change_bytes(data: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(data) + 1)
    match draw.randrange(7):
        case 0 if at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        case 1:
            data[at : at + 1] = draw.randbytes(1)
        case 2:
            data[at : at + draw.choice((1, 2, 4, 8, 64))] = b""
        case 3:
            data[at:at] = draw.randbytes(draw.choice((1, 2, 4, 8, 64)))
        case 4:
            # In place of a value, or of all of them. No packer nests as deep as an unpacker goes.
            start, stop = draw.choice(((at, at + 1), (0, len(data))))
            data[start:stop] = b"\x91" * draw.choice((10, 900, 1000)) + b"\xc0"
        case 5:
            odd = draw.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000))
            data[at : at + 4] = struct.pack(draw.choice("<>") + "I", odd)
        case _:
            start = draw.randrange(len(data) + 1)
            data[at : at + 16] = data[start : start + 16]


def _changed_value(value: Any, draw: random.Random) -> Any:
    """A copy of ``value`` in which something, at any depth, is something else."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        copy = dict(value)
        name = draw.choice(list(copy))
        match draw.randrange(8):
            case 0:
                del copy[name]
            case 1:
                copy[draw.choice(("extra", 7, b"x", None))] = copy[name]
            case _:
                copy[name] = _changed_value(copy[name], draw)
        return copy
    if isinstance(value, list) and value and draw.random() < 0.9:
        items = list(value)
        at = draw.randrange(len(items))
        match draw.randrange(8):
            case 0:
                del items[at]
            case 1:
                items.insert(at, items[at])
            case _:
                items[at] = _changed_value(items[at], draw)
        return items
    match draw.randrange(6):
        case 0 if isinstance(value, bytes) and value:
            changed = bytearray(value)
            _change_bytes(changed, draw)
            return bytes(changed)
        case 1 if isinstance(value, int):
            return max(-(1 << 63), min((1 << 63) - 1, value + draw.choice((-64, -1, 1, 64))))
        case 2:
            for _ in range(draw.choice((1, 10, 400))):  # msgpack refuses to pack more than 511
                value = [value]
            return value
        case _:
            return draw.choice(_ODD_VALUES)


def _sample_record() -> Record:
    token_ids = np.arange(5, 45, dtype=np.int32)
    return Record(
        token_hash=token_hash(token_ids),
        length=len(token_ids),
        codec="test",
        pooled=np.ones((2, 4), np.float32),
        maps={layer: np.arange(100, dtype=np.uint8) for layer in (1, 3)},
        token_ids=token_ids,
        sketch=np.arange(1, 9, dtype=np.uint64),
    )


def _sample_entry(record: bytes) -> bytes:
    hashed = _sample_record().token_hash
    feature = np.arange(8, dtype=np.float32)
    envelope = Envelope(bytes(32), "a1", entry_id("a1", hashed), 1e9, feature)
    return b"".join(encode_entry(envelope, memoryview(record), _KEY)) + record


def _sample_edition() -> Edition:
    sizes = {"num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_size": 64}
    names = ("model", "weights", "architecture", "dtype", "attention", "rope", "tensor_parallel")
    namespace = Namespace.from_dict({**dict.fromkeys(names, "name"), **sizes})
    plan = {"sources": {"neighbour": {"layers": [1, 3], "gate": 0.5}}}
    return Edition(namespace, {}, plan, {"loss": 0.5}, b"projector", 8, {"templates": b"maps"})


def _sample_requests() -> Iterator[messages.Request]:
    features, lengths = np.ones((2, 8), np.float32), np.ones((2, 2), np.int64)
    yield messages.Open(_sample_edition().namespace, "0" * 64)
    yield messages.Lookup(["", "a1"], features, lengths, 8, 1.0)
    yield messages.Overlaps(["a1"], [np.arange(5, dtype=np.uint64)], 4, 1.0)
    yield messages.TokenIds([1, 2], 1.0)
    yield messages.Load([1, 2], 1.0)
    yield messages.Put("a1", 7, features[0])


def _parts(file: bytes, prefix: int) -> tuple[Any, bytes]:
    """The plain data behind a prefix, and what follows it and its padding."""
    (size,) = struct.unpack_from("<I", file, 12)
    return msgpack.unpackb(file[prefix : prefix + size]), file[_aligned(prefix + size) :]


def _framed_record(header: bytes, payload: bytes) -> bytes:
    prefix = struct.pack("<8sIIQ", b"ATNCREC\0", 2, len(header), len(payload))
    return _checksummed(prefix, header) + payload


def _framed_entry(envelope: bytes, signed: bytes, record: bytes) -> bytes:
    """With the signatures of another: what one can write who has not the key."""
    prefix = struct.pack("<8sIIQ", b"ATNCENT\0", 1, len(envelope), len(record)) + signed[24:88]
    return _checksummed(prefix, envelope) + record


def _checksummed(prefix: bytes, body: bytes) -> bytes:
    size = len(prefix) + 4 + len(body)
    body += bytes(_aligned(size) - size)
    return prefix + struct.pack("<I", zlib.crc32(body, zlib.crc32(prefix))) + body


def _aligned(size: int) -> int:
    return size + -size % ALIGNMENT


def _read_record(data: bytes) -> None:
    check_record(memoryview(data))
    decode_record(memoryview(data))


def _read_signed(data: bytes, signed: bytes) -> None:
    check_body(read_head(memoryview(data), _KEY), _KEY)
    if data != signed:
        raise AssertionError("what was not signed was accepted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    try:
        fed = fuzz(options.inputs, options.seed)
    except AssertionError as error:
        Console(stderr=True).print(f"error: {error}", markup=False)
        sys.exit(1)
    for name, count in sorted(fed.items()):
        Console().print(f"{count:>9} {name}")
    Console().print(f"{options.inputs} inputs in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
