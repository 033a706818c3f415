# SPDX-License-Identifier: Apache-2.0
"""One shard of a store: its entries in files, findable by tenant, within bounds of bytes and age."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic as _monotonic
from time import time as _wall
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attncache_vllm.store.index import Features, Ids
from attncache_vllm.store.sketches import Sketch

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Limits:
    """What a shard keeps.

    Attributes:
        max_bytes: of all its files.
        tenant_bytes: of the files of one tenant; None is ``max_bytes``.
        ttl_s: seconds after which an entry is forgotten; None is never.
    """

    max_bytes: int
    tenant_bytes: int | None = None
    ttl_s: float | None = None


class Exported(NamedTuple):
    """An entry as ``Shard.put`` of another shard takes it; ``age_s`` is its age in seconds."""

    tenant: str
    feature: Features
    record: Bytes
    age_s: float


class Shard:
    """Entries of any number of editions and tenants below ``folder``. Safe to share by threads.

    Errors are ``StoreError``s.
    """

    def __init__(
        self,
        folder: Path,
        limits: Limits,
        key: bytes | None = None,
        wall: Callable[[], float] = _wall,
        monotonic: Callable[[], float] = _monotonic,
    ) -> None:
        raise NotImplementedError

    def publish(self, edition: bytes) -> str:
        """Make ``edition`` (``Edition.to_bytes``) the current one of its namespace; its digest."""
        raise NotImplementedError

    def edition(self, digest: str) -> bytes | None:
        raise NotImplementedError

    def editions(self) -> dict[str, dict[str, Any]]:
        """Digest to ``{"namespace": Namespace.to_dict(), "current": bool, "entries": int}``."""
        raise NotImplementedError

    def current(self, namespace: str) -> str | None:
        """The digest of the current edition of the namespace with this digest."""
        raise NotImplementedError

    def rearm(self) -> None:
        raise NotImplementedError

    def rearmed_at(self) -> int:
        raise NotImplementedError

    def put(
        self,
        edition: str,
        tenant: str,
        features: Features,
        records: Sequence[Bytes],
        ages_s: Sequence[float] | None = None,
    ) -> list[str]:
        """``"kept"``, ``"known"`` or ``"refused: <why>"`` for each record."""
        raise NotImplementedError

    def lookup(
        self,
        edition: str,
        tenants: Sequence[str],
        features: Features,
        lengths: Ids,
        neighbours: int,
    ) -> tuple[Ids, Features, Ids]:
        """ids ``[B, neighbours]`` (-1: no more), distances, lengths; an unknown edition: nothing."""
        raise NotImplementedError

    def overlaps(
        self, edition: str, tenants: Sequence[str], sketches: Sequence[Sketch], neighbours: int
    ) -> tuple[Ids, Ids, Ids]:
        """ids ``[B, neighbours]`` (-1: no more), common, lengths."""
        raise NotImplementedError

    def token_ids(self, edition: str, ids: Sequence[int]) -> list[NDArray[np.int32] | None]:
        raise NotImplementedError

    def load(self, edition: str, ids: Sequence[int]) -> list[Bytes | None]:
        """Records, read-only memory maps; None for one that is damaged or gone."""
        raise NotImplementedError

    def ids(
        self, edition: str, tenant: str | None = None, after: int = -1, most: int = 65_536
    ) -> Ids:
        """A page of ids above ``after``, ascending: int64, fewer than ``most`` on the last one."""
        raise NotImplementedError

    def export(self, edition: str, ids: Sequence[int]) -> list[Exported | None]:
        raise NotImplementedError

    def remove(self, edition: str, ids: Sequence[int]) -> int:
        """Forget entries and their files; how many there were."""
        raise NotImplementedError

    def delete(self, tenant: str | None = None, edition: str | None = None) -> int:
        """Forget all entries of a tenant, of an edition (and the edition), or of one in the
        other."""
        raise NotImplementedError

    def expire(self) -> int:
        """Forget what is older than ``ttl_s``, and make room in memory; how many there were."""
        raise NotImplementedError

    def stats(self) -> dict[str, int]:
        """entries, bytes, max_bytes, tenants, evicted, expired, damaged, refused, lookups."""
        raise NotImplementedError
