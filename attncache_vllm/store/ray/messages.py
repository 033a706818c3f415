# SPDX-License-Identifier: Apache-2.0
"""What a server and its gateway say to each other: frames of msgpack, checked on both sides.

    head    16 bytes, little endian: magic, version, kind, files, number, bytes of the body
    body    msgpack

Arrays are raw little-endian bytes whose size must be what the other fields make it. Records and
editions are not in the body: they come as files beside the frame, see ``channel``.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from attncache_vllm.store import checks
from attncache_vllm.store.found import Found, Values
from attncache_vllm.store.index import Features, Ids
from attncache_vllm.store.protocol import Namespace
from attncache_vllm.store.ray.arrays import raw, shaped, values_of
from attncache_vllm.store.records import MAX_LENGTH, MAX_SKETCH
from attncache_vllm.store.sketches import Sketch

VERSION = 1
HEAD_BYTES = 16
MAX_BODY = 1 << 26
MAX_FILES = 64
MAX_QUERIES = 1 << 12
MAX_NEIGHBOURS = 1 << 10
MAX_TENANT = 128
MAX_RECORD_BYTES = 1 << 34

_MAGIC = b"ATNG"
_HEAD = struct.Struct("<4sBBHII")
_MAX_ID = (1 << 63) - 1


class Kind(IntEnum):
    REQUEST = 1
    ANSWER = 2
    FAULT = 3
    NEWS = 4


@dataclass(frozen=True)
class Head:
    """What comes before a body: the number is that of the request, 0 for news."""

    kind: Kind
    number: int
    files: int
    size: int


@dataclass(frozen=True)
class Open:
    """Asks for the edition with this digest, or else the current one of the namespace, or of the
    only one there is. The answer is a file with it."""

    namespace: Namespace | None
    edition: str | None


@dataclass(frozen=True, eq=False)
class Lookup:
    """``Fanout.lookup``: features float32 ``[B, F]``, lengths int64 ``[B, 2]``."""

    tenants: list[str]
    features: Features
    lengths: Ids
    neighbours: int
    deadline: float


@dataclass(frozen=True, eq=False)
class Overlaps:
    """``Fanout.overlaps``."""

    tenants: list[str]
    sketches: list[Sketch]
    neighbours: int
    deadline: float


@dataclass(frozen=True)
class TokenIds:
    """``Fanout.token_ids``."""

    ids: list[int]
    deadline: float


@dataclass(frozen=True)
class Load:
    """``Fanout.load`` of at most 64 entries. The answer says which are found; their records are
    files, in that order."""

    ids: list[int]
    deadline: float


@dataclass(frozen=True, eq=False)
class Put:
    """Keep the record that is the file beside it; there is no answer."""

    tenant: str
    entry_id: int
    feature: Features


Request = Open | Lookup | Overlaps | TokenIds | Load | Put


@dataclass(frozen=True)
class News:
    """What a gateway says on its own, every few seconds.

    Attributes:
        figures: sums over the shards that answered: entries, bytes, damaged.
        rearmed_at: the latest instant servers were told to try tripped layers again; 0 for never.
        out: shards that are not asked at present, each with the reason.
        faults: how often what went wrong since the gateway started, by kind: see ``Peers.faults``,
            and ``dropped`` for entries that were put and that no shard keeps.
    """

    figures: dict[str, int]
    rearmed_at: int
    out: dict[int, str]
    faults: dict[str, int]


def frame(kind: Kind, number: int, body: object, files: int = 0) -> bytes:
    """Head and body; ``ValueError`` if the other side would refuse them."""
    data: bytes = msgpack.packb(body)
    if len(data) > MAX_BODY or files > MAX_FILES:
        raise ValueError(
            f"a frame must have at most {MAX_BODY} bytes and {MAX_FILES} files, "
            f"got {len(data)!r} and {files!r}; ask for less at once"
        )
    return _HEAD.pack(_MAGIC, VERSION, kind, files, number, len(data)) + data


def parse_head(data: bytes) -> Head:
    """The head in ``data``; ``ValueError`` for anything odd, before a body is read."""
    if len(data) != HEAD_BYTES:
        raise ValueError(f"a head must have {HEAD_BYTES} bytes, got {len(data)!r}")
    magic, version, kind, files, number, size = _HEAD.unpack(data)
    if magic != _MAGIC or version != VERSION:
        raise ValueError(f"a frame starts with {_MAGIC!r} {VERSION}, got {magic!r} {version!r}")
    checks.integer(files, 0, MAX_FILES, "files")
    checks.integer(size, 1, MAX_BODY, "bytes of a body")
    return Head(Kind(kind), number, files, size)


def request_body(request: Request) -> dict[str, Any]:
    """What ``parse_request`` reads."""
    body: dict[str, Any] = {"method": type(request).__name__}
    for name, value in vars(request).items():
        if isinstance(value, np.ndarray):
            value = [list(value.shape), raw(value)]
        elif isinstance(value, Namespace):
            value = value.to_dict()
        elif name == "sketches":
            value = [raw(sketch) for sketch in value]
        body[name] = value
    return body


def parse_request(body: object) -> Request:
    """The request in ``body``; ``ValueError`` for anything odd."""
    method = body.get("method") if isinstance(body, dict) else None
    kinds = {kind.__name__: kind for kind in (Open, Lookup, Overlaps, TokenIds, Load, Put)}
    kind = kinds.get(method) if isinstance(method, str) else None
    if kind is None:
        raise ValueError(f"a request must be one of {sorted(kinds)}, got {method!r:.100}")
    given = checks.fields(body, ["method", *kind.__dataclass_fields__], "a request")
    if kind is Open:
        namespace, edition = given["namespace"], given["edition"]
        return Open(
            None if namespace is None else Namespace.from_dict(namespace),
            None if edition is None else checks.text(edition, "edition", longest=64),
        )
    if kind is Put:
        tenant = _tenants([given["tenant"]])[0]
        entry_id = checks.integer(given["entry_id"], 0, _MAX_ID, "an entry id")
        return Put(tenant, entry_id, shaped(given["feature"], np.float32, (None,), "feature"))
    deadline = given["deadline"]
    if not isinstance(deadline, float) or not math.isfinite(deadline):
        raise ValueError(f"deadline must be a finite float, got {deadline!r}")
    if kind is TokenIds or kind is Load:
        most = MAX_FILES if kind is Load else MAX_QUERIES
        ids = checks.items(given["ids"], None, "ids")
        checks.integer(len(ids), 0, most, "the number of ids")
        ids = [checks.integer(item, 0, _MAX_ID, "an entry id") for item in ids]
        return TokenIds(ids, deadline) if kind is TokenIds else Load(ids, deadline)
    tenants = _tenants(given["tenants"])
    neighbours = checks.integer(given["neighbours"], 0, MAX_NEIGHBOURS, "neighbours")
    if kind is Overlaps:
        items = checks.items(given["sketches"], len(tenants), "sketches")
        sketches = [values_of(item, np.uint64, MAX_SKETCH, "a sketch") for item in items]
        return Overlaps(tenants, sketches, neighbours, deadline)
    features = shaped(given["features"], np.float32, (len(tenants), None), "features")
    lengths = shaped(given["lengths"], np.int64, (len(tenants), 2), "lengths")
    return Lookup(tenants, features, lengths, neighbours, deadline)


def found_body(found: Found) -> list[bytes]:
    """What ``parse_found`` reads."""
    return [raw(part) for part in found]


def parse_found(body: object, queries: int, most: int, kind: Values) -> Found:
    """Ids, values of ``kind`` and lengths, each ``[queries, most]``; ``ValueError`` if they are
    not."""
    shape = [queries, most]
    given = checks.items(body, 3, "what was found")
    parts = [
        shaped([shape, part], dtype, (queries, most), name)
        for part, dtype, name in zip(
            given, (np.int64, kind, np.int64), ("ids", "values", "lengths"), strict=True
        )
    ]
    ids, values, lengths = parts
    if (ids < -1).any() or (lengths < 0).any() or (lengths > MAX_LENGTH).any():
        raise ValueError("ids must be -1 or more and lengths those of records")
    return ids, values, lengths


def token_ids_body(token_ids: list[NDArray[np.int32] | None]) -> list[bytes | None]:
    """What ``parse_token_ids`` reads."""
    return [None if ids is None else raw(ids) for ids in token_ids]


def parse_token_ids(body: object, count: int) -> list[NDArray[np.int32] | None]:
    """Token ids int32 of each of ``count`` entries, or None; ``ValueError`` for anything odd."""
    return [
        None if item is None else values_of(item, np.int32, MAX_LENGTH, "token ids")
        for item in checks.items(body, count, "token ids")
    ]


def parse_loaded(body: object, count: int, files: int) -> list[bool]:
    """Which of ``count`` entries are found, as many as there are files."""
    present = checks.items(body, count, "what was loaded")
    if not all(isinstance(item, bool) for item in present) or sum(present) != files:
        raise ValueError(f"each of {files} files must be of an entry, got {present!r}")
    return present


def parse_fault(body: object) -> tuple[str, str]:
    """Name of an error class and its message."""
    name, message = checks.items(body, 2, "a fault")
    return checks.text(name, "an error"), checks.text(message, "a message", longest=1 << 20)


def news_body(news: News) -> dict[str, Any]:
    """What ``parse_news`` reads."""
    return {**vars(news), "out": [[shard, why] for shard, why in news.out.items()]}


def parse_news(body: object) -> News:
    """The news in ``body``; ``ValueError`` for anything odd."""
    given = checks.fields(body, list(News.__dataclass_fields__), "news")
    names = ["entries", "bytes", "damaged"]
    figures = checks.fields(given["figures"], names, "figures")
    out = [checks.items(item, 2, "a shard") for item in checks.items(given["out"], None, "out")]
    faults = given["faults"]
    if not isinstance(faults, dict):
        raise ValueError(f"faults must be a mapping, got {faults!r:.100}")
    return News(
        {name: checks.integer(figures[name], 0, _MAX_ID, name) for name in names},
        checks.integer(given["rearmed_at"], 0, _MAX_ID, "rearmed_at"),
        {
            checks.integer(shard, 0, _MAX_ID, "shard"): checks.text(why, "why", longest=1 << 16)
            for shard, why in out
        },
        {
            checks.text(kind, "a fault"): checks.integer(count, 0, _MAX_ID, "faults")
            for kind, count in faults.items()
        },
    )


def _tenants(value: object) -> list[str]:
    tenants = checks.items(value, None, "tenants")
    checks.integer(len(tenants), 0, MAX_QUERIES, "the number of queries")
    for tenant in tenants:
        if not isinstance(tenant, str) or len(tenant) > MAX_TENANT:
            raise ValueError(
                f"a tenant must be a string of at most {MAX_TENANT} characters, got {tenant!r:.100}"
            )
    return tenants
