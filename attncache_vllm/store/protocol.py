# SPDX-License-Identifier: Apache-2.0
"""What the engine and the calibration ask of a store, whatever its home."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, Protocol, runtime_checkable

import msgpack
import numpy as np
from numpy.typing import NDArray

from attncache_vllm.store import checks


@dataclass(frozen=True)
class Namespace:
    """Everything that must agree before a stored map may stand in for a computed one.

    ``model`` is for people and is not compared; the weights' hash decides. ``tensor_parallel`` is
    ``"rank/size"``: a rank stores and reuses only the heads it owns.
    """

    model: str
    weights: str
    architecture: str
    dtype: str
    attention: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    rope: str
    tensor_parallel: str

    def to_dict(self) -> dict[str, str | int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> "Namespace":
        """The inverse of ``to_dict``; a missing, unknown or ill-typed field is a ``ValueError``."""
        given = checks.fields(data, [field.name for field in fields(cls)], "a namespace")
        for field in fields(cls):
            if field.type is int:
                checks.integer(given[field.name], 1, 1 << 20, f"namespace {field.name}")
            else:
                checks.text(given[field.name], f"namespace {field.name}", longest=4096)
        return cls(**given)

    def differences(self, server: "Namespace") -> list[str]:
        """One line for each field in which this (the store's) namespace is not the server's."""
        ours, theirs = self._compared(), server._compared()
        return [
            f"{name}: store has {value!r}, server has {theirs[name]!r}"
            for name, value in ours.items()
            if value != theirs[name]
        ]

    def digest(self) -> str:
        """Hex SHA-256 of the compared fields: equal exactly when there are no differences."""
        return hashlib.sha256(msgpack.packb(list(self._compared().items()))).hexdigest()

    def _compared(self) -> dict[str, str | int]:
        return {name: value for name, value in self.to_dict().items() if name != "model"}


class Neighbour(NamedTuple):
    """An entry near a query: its L2 distance (not squared) and its length in tokens."""

    entry_id: int
    distance: float
    length: int


@dataclass(frozen=True)
class Overlap:
    """An entry that shares tokens with a query: how many values their sketches have in common, and
    its length in tokens."""

    entry_id: int
    common: int
    length: int


def token_hash(token_ids: Sequence[int] | NDArray[np.int32]) -> bytes:
    """SHA-256 of the token ids as little-endian int32: the identity of a sequence in a store."""
    return hashlib.sha256(np.asarray(token_ids, dtype="<i4").tobytes()).digest()


@dataclass(frozen=True, eq=False)
class Record:
    """The stored maps of one sequence.

    Attributes:
        token_hash: 32 bytes that identify the sequence: ``token_hash`` of its token ids.
        length: tokens of the sequence. Which other lengths its maps serve is for the asker to say.
        codec: name of the encoding of ``maps``, which a store neither knows nor needs to know.
        pooled: float32 ``[slots, hidden]``, the pooled feature-layer input; kept as float16.
        maps: layer number to its encoded map, uint8 ``[bytes]``. Loaded maps are read-only views
            of the store's memory map: copy what must outlive a truncation of the file.
        token_ids: int32 ``[length]``, what an alignment with another sequence goes by.
        sketch: uint64 ``[at most 256]``, ascending and distinct: hashes of parts of the sequence.
            Sequences with many of them in common overlap; a store knows no more about them.
    """

    token_hash: bytes
    length: int
    codec: str
    pooled: NDArray[np.float32]
    maps: dict[int, NDArray[np.uint8]]
    token_ids: NDArray[np.int32]
    sketch: NDArray[np.uint64]


@dataclass(frozen=True)
class StoreStats:
    """Counters since the store was opened, and its size now.

    ``damaged`` counts entries and files found damaged or gone; ``lookups`` counts calls of
    ``lookup``; ``late`` counts calls that missed their deadline.
    """

    entries: int
    bytes: int
    damaged: int
    lookups: int
    late: int


@dataclass(frozen=True)
class StoreHealth:
    """What keeps a store from answering in full.

    ``faults`` counts, by kind, what went wrong since it was opened and never goes back; ``out`` is
    how many of its shards are not asked at present.
    """

    faults: Mapping[str, int]
    out: int


@dataclass(frozen=True)
class VerifyReport:
    """What ``verify`` found: entries looked at, (entry id, reason) of bad ones, other problems.

    ``unpublished`` entries are sound but not findable: put after the store was published last, as
    by a build that was cut off. That is no damage.
    """

    entries: int
    damaged: list[tuple[int, str]]
    problems: list[str]
    unpublished: int = 0

    @property
    def ok(self) -> bool:
        return not self.damaged and not self.problems


class MapStore(Protocol):
    """A home for attention maps. Every method may raise ``StoreError``: the caller then computes.

    A ``deadline`` is an instant of ``time.monotonic()``. A call that returns, returned in time;
    a late one raises ``StoreTimeout``.

    An entry is of one tenant, and a query sees the entries of its own only: the tenant is part of
    the key, never a filter after the search. So an entry id that was found says whose it is, and
    what is kept by entry id is kept apart by tenant.
    """

    def lookup(
        self,
        features: NDArray[np.float32],
        lengths: Sequence[tuple[int, int]],
        *,
        tenants: Sequence[str],
        neighbours: int,
        deadline: float,
    ) -> list[list[Neighbour]]:
        """The nearest entries of each of B queries, nearest first.

        Args:
            features: float32 ``[B, F]``, one row per query.
            lengths: for each query the shortest and the longest entry, in tokens, both inclusive,
                that is an answer. ``MAX_LENGTH`` is no bound.
            tenants: for each query whose entries are looked at; see `attncache_vllm.tenants`.
            neighbours: how many entries a query wants at most.
            deadline: instant after which the answer is of no use.
        """

    def overlaps(
        self,
        sketches: Sequence[NDArray[np.uint64]],
        *,
        tenants: Sequence[str],
        neighbours: int,
        deadline: float,
    ) -> list[list[Overlap]]:
        """The entries that have most of a sketch in common with each of B queries, most first.

        Args:
            sketches: one per query, uint64 ``[at most 256]``, distinct values.
            tenants: for each query whose entries are looked at; see `attncache_vllm.tenants`.
            neighbours: how many entries a query wants at most.
            deadline: instant after which the answer is of no use.
        """

    def token_ids(
        self, entry_ids: Sequence[int], *, deadline: float
    ) -> list[NDArray[np.int32] | None]:
        """The token ids of ``entry_ids``, without their maps; ``None`` for one damaged or gone."""

    def load(self, entry_ids: Sequence[int], *, deadline: float) -> list[Record | None]:
        """The records of ``entry_ids``, in that order; ``None`` for one damaged or gone."""

    def put(self, record: Record) -> int:
        """Keep ``record`` and return its entry id, or the id it has if it is kept already."""

    def stats(self) -> StoreStats:
        """What the store holds and has seen."""

    def close(self) -> None:
        """Give back files and locks. Records already loaded stay readable."""


class ServedStore(MapStore, Protocol):
    """A store that a server can be started on: a ``MapStore`` with what was published for it."""

    @property
    def namespace(self) -> Namespace:
        """What its maps are comparable with."""

    @property
    def build(self) -> dict[str, Any]:
        """The settings that its maps were recorded with."""

    @property
    def plan(self) -> dict[str, Any]:
        """The published plan."""

    @property
    def projector_bytes(self) -> bytes:
        """The published projector, which features are made with."""

    def artifact(self, name: str) -> bytes | None:
        """What was published under ``name``, ``None`` if nothing was."""

    def rearmed_at(self) -> int:
        """When servers were last told to try tripped layers again, in any unit; 0 if never, or if
        nobody can tell. Asked in the forward pass: answers at once, from what is known."""

    def health(self) -> StoreHealth:
        """What is wrong between this process and the store, beyond what calls raise. Asked after
        every lookup: answers at once, from what is known."""


@runtime_checkable
class GrowingStore(ServedStore, Protocol):
    """A store that takes new entries while it is served from."""

    def wants(self, token_hash: bytes, tenant: str) -> bool:
        """Whether it is of use to record a sequence of a tenant. Asked in the forward pass: answers
        at once, from what is known."""

    def admit(self, record: Record, feature: NDArray[np.float32], tenant: str) -> bool:
        """Have the store keep an entry, in the background.

        Args:
            record: all that is known of it; it may be found as soon as it is kept.
            feature: float32 ``[F]``, of the published projector.
            tenant: whose it is.

        Returns:
            False if it is not wanted, or too much waits already: it is then dropped.
        """
