# SPDX-License-Identifier: Apache-2.0
"""The store of a fleet, as a server uses it. Nothing here imports Ray: a gateway does."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from attncache_vllm.errors import StoreDamaged, StoreError, StoreTimeout
from attncache_vllm.store.found import Values, answers_of
from attncache_vllm.store.index import Features, raise_if_late
from attncache_vllm.store.protocol import (
    Namespace,
    Neighbour,
    Overlap,
    Record,
    StoreHealth,
    StoreStats,
)
from attncache_vllm.store.ray import messages
from attncache_vllm.store.ray.admission import Admission, Admitted
from attncache_vllm.store.ray.channel import close_all, mapped, sealed
from attncache_vllm.store.ray.connection import Answer
from attncache_vllm.store.ray.link import Link
from attncache_vllm.store.ray.ring import entry_id
from attncache_vllm.store.records import decode_record, encode_record
from attncache_vllm.store.sketches import Sketch

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A caller without a deadline.
_LONGEST_SECONDS = 600.0
# Of entries on their way to the shards: what they may take of memory, and of a core's time.
_ADMISSION_BYTES = 256 << 20
_ADMISSION_BYTES_PER_SECOND = float(64 << 20)


class RayStore:
    """A ``GrowingStore`` whose entries are in the shards of a Ray cluster.

    Once connected, no fault raises anything but ``StoreError``: a gateway that has ended is started
    again in the background, and until then every call fails at once. Safe between threads.
    """

    def __init__(self, link: Link) -> None:
        """Not for callers: use ``connect``."""
        self._link = link
        self._lock = Lock()
        self._lookups = self._late = self._damaged = 0
        self._admission = Admission(self._send, _ADMISSION_BYTES, _ADMISSION_BYTES_PER_SECOND)

    @classmethod
    def connect(cls, address: str | os.PathLike[str], namespace: Namespace | None) -> RayStore:
        """The store behind ``ray:auto``, ``ray:HOST:PORT`` or ``ray://HOST:PORT``.

        The first two join the cluster that this machine is a node of; the last is Ray Client.

        Args:
            address: the cluster.
            namespace: what the maps must be comparable with; None takes the only edition there is.

        Raises:
            StoreError: it cannot be reached, or holds no edition.
            NamespaceMismatch: it has none of this namespace; the message lists the differences.
        """
        return cls(Link(_cluster_of(os.fspath(address)), namespace))

    # -- what was published -------------------------------------------------------------------

    @property
    def namespace(self) -> Namespace:
        return self._link.edition.namespace

    @property
    def build(self) -> dict[str, Any]:
        return self._link.edition.build

    @property
    def plan(self) -> dict[str, Any]:
        return self._link.edition.plan

    @property
    def projector_bytes(self) -> bytes:
        return self._link.edition.projector

    def artifact(self, name: str) -> bytes | None:
        """What was published under ``name``, None if nothing was."""
        return self._link.edition.artifacts.get(name)

    # -- reading ------------------------------------------------------------------------------

    def lookup(
        self,
        features: Features,
        lengths: Sequence[tuple[int, int]],
        *,
        tenants: Sequence[str],
        neighbours: int,
        deadline: float,
    ) -> list[list[Neighbour]]:
        """See ``MapStore``."""
        if features.ndim != 2 or not len(features) == len(lengths) == len(tenants):
            raise StoreError(
                "features must be one row for each of the lengths and tenants, got shape "
                f"{features.shape!r}, {len(lengths)} and {len(tenants)}"
            )
        request = messages.Lookup(
            list(tenants),
            features.astype(np.float32, copy=False),
            np.asarray(lengths, dtype=np.int64).reshape(len(lengths), 2),
            neighbours,
            _finite(deadline),
        )
        with self._lock:
            self._lookups += 1
        return [[Neighbour(*found) for found in row] for row in self._search(request, np.float32)]

    def overlaps(
        self,
        sketches: Sequence[Sketch],
        *,
        tenants: Sequence[str],
        neighbours: int,
        deadline: float,
    ) -> list[list[Overlap]]:
        """See ``MapStore``."""
        if len(sketches) != len(tenants):
            raise StoreError(
                f"there must be a tenant for each sketch, got {len(tenants)} and {len(sketches)}"
            )
        request = messages.Overlaps(list(tenants), list(sketches), neighbours, _finite(deadline))
        return [[Overlap(*found) for found in row] for row in self._search(request, np.int64)]

    def token_ids(
        self, entry_ids: Sequence[int], *, deadline: float
    ) -> list[NDArray[np.int32] | None]:
        """See ``MapStore``."""
        request = messages.TokenIds(list(entry_ids), _finite(deadline))
        return self._ask(
            request, lambda answer: messages.parse_token_ids(answer.body, len(entry_ids))
        )

    def load(self, entry_ids: Sequence[int], *, deadline: float) -> list[Record | None]:
        """See ``MapStore``. Records are views of memory that is theirs alone."""
        records: list[Record | None] = []
        for start in range(0, len(entry_ids), messages.MAX_FILES):
            chosen = list(entry_ids[start : start + messages.MAX_FILES])
            records += self._ask(
                messages.Load(chosen, _finite(deadline)),
                functools.partial(self._records, len(chosen)),
            )
        return records

    # -- writing ------------------------------------------------------------------------------

    def wants(self, token_hash: bytes, tenant: str) -> bool:
        """See ``GrowingStore``: what was admitted lately is not admitted again."""
        return not self._admission.knows(entry_id(tenant, token_hash))

    def admit(self, record: Record, feature: Features, tenant: str) -> bool:
        """See ``GrowingStore``."""
        number = entry_id(tenant, record.token_hash)
        return self._admission.offer(Admitted(number, tenant, feature, record))

    def put(self, record: Record, *, tenant: str = "", feature: Features | None = None) -> int:
        """See ``MapStore``; as ``admit``, and whether the shards keep it is not waited for.

        Raises:
            StoreError: there is no feature, without which an entry is not found.
        """
        if feature is None:
            raise StoreError("an entry of a shard must have its feature, got None")
        self.admit(record, feature, tenant)
        return entry_id(tenant, record.token_hash)

    # -- state --------------------------------------------------------------------------------

    def rearmed_at(self) -> int:
        """When servers were told last to try tripped layers again; 0 if never."""
        news = self._link.connection.news
        return 0 if news is None else news.rearmed_at

    def out(self) -> dict[int, str]:
        """The shards that are not asked at present, each with the reason."""
        news = self._link.connection.news
        return {} if news is None else dict(news.out)

    def health(self) -> StoreHealth:
        """See ``ServedStore``; a second old.

        Kinds are those of ``Peers.faults``; ``dropped`` for admitted entries that no shard keeps;
        and ``gateway`` for every time that the gateway had to be replaced.
        """
        faults = self._link.connection.faults()
        with self._lock:
            faults["damaged"] += self._damaged
        faults["dropped"] += self._admission.dropped
        return StoreHealth(faults, len(self.out()))

    def stats(self) -> StoreStats:
        """See ``MapStore``. What the shards hold is some seconds old."""
        news = self._link.connection.news
        figures = {"entries": 0, "bytes": 0, "damaged": 0} if news is None else news.figures
        with self._lock:
            return StoreStats(
                entries=figures["entries"],
                bytes=figures["bytes"],
                damaged=figures["damaged"] + self._damaged,
                lookups=self._lookups,
                late=self._late,
            )

    def close(self) -> None:
        """See ``MapStore``."""
        self._admission.close()
        self._link.close()

    # -- inside -------------------------------------------------------------------------------

    def _search(
        self, request: messages.Lookup | messages.Overlaps, kind: Values
    ) -> list[list[tuple[Any, ...]]]:
        """Id, value and length of all that each query found."""
        queries, most = len(request.tenants), request.neighbours
        return answers_of(
            self._ask(
                request, lambda answer: messages.parse_found(answer.body, queries, most, kind)
            )
        )

    def _ask(self, request: Any, parse: Callable[[Answer], T]) -> T:
        try:
            raise_if_late(request.deadline)
            answer = self._link.connection.ask(request, request.deadline)
            try:
                parsed = parse(answer)
            except ValueError as error:
                raise StoreError(f"the gateway's answer must be well-formed: {error}") from error
            finally:
                close_all(answer.files)
            raise_if_late(request.deadline)
            return parsed
        except StoreTimeout:
            with self._lock:
                self._late += 1
            raise

    def _records(self, count: int, answer: Answer) -> list[Record | None]:
        files = iter(answer.files)
        records: list[Record | None] = []
        for present in messages.parse_loaded(answer.body, count, len(answer.files)):
            record = None
            if present:
                try:
                    record = decode_record(mapped(next(files), messages.MAX_RECORD_BYTES))
                except StoreDamaged as error:
                    with self._lock:
                        self._damaged += 1
                    logger.warning("a record is skipped: %s", error)
            records.append(record)
        return records

    def _send(self, entry: Admitted) -> None:
        file = sealed(b"".join(encode_record(entry.record)))
        try:
            feature = np.asarray(entry.feature, dtype=np.float32)
            self._link.connection.tell(messages.Put(entry.tenant, entry.entry_id, feature), [file])
        finally:
            close_all([file])


def _finite(deadline: float) -> float:
    """What a wait can be bounded by."""
    return min(deadline, time.monotonic() + _LONGEST_SECONDS)


def _cluster_of(address: str) -> str:
    """What Ray calls the cluster: ``auto``, ``HOST:PORT`` or ``ray://HOST:PORT``."""
    kind, _, rest = address.partition(":")
    host, _, port = rest.lstrip("/").rpartition(":")
    if kind != "ray" or not (rest == "auto" or (host and port.isdecimal())):
        raise StoreError(
            "the address of a store must be ray:auto, ray:HOST:PORT or ray://HOST:PORT, "
            f"got {address!r}"
        )
    return f"ray://{host}:{port}" if rest.startswith("/") else rest
