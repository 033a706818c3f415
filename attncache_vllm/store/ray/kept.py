# SPDX-License-Identifier: Apache-2.0
"""Which entries a shard keeps and which must go: bounds of bytes, in all and a tenant, and age."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from attncache_vllm.store.resident import ResidentSet

Key = tuple[str, int]
"""Digest of the edition, and entry id."""


@dataclass(frozen=True)
class Limits:
    """What a shard keeps.

    Attributes:
        max_bytes: of the files of all entries together.
        tenant_bytes: of those of one tenant; None is ``max_bytes``.
        ttl_s: seconds after which an entry is forgotten; None is never.

    Raises:
        ValueError: one is negative.
    """

    max_bytes: int
    tenant_bytes: int | None = None
    ttl_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be >= 0, got {value!r}")

    @property
    def largest(self) -> int:
        """Bytes that an entry may have at most."""
        return (
            self.max_bytes if self.tenant_bytes is None else min(self.max_bytes, self.tenant_bytes)
        )


@dataclass(eq=False)
class Entry:
    """What is known of an entry without opening its file.

    Attributes:
        tenant: whose it is.
        token_hash: which sequence it is.
        size: bytes of its file.
        cost: what a hit saves: tokens of its maps.
        born: the instant of the monotonic clock at which it was first kept.
        sound: whether every byte was checked since the start.
    """

    tenant: str
    token_hash: bytes
    size: int
    cost: float
    born: float
    sound: bool


class KeptEntries:
    """Entries by edition and id. Not to be shared between threads without a lock.

    Where there is no room, a tenant beyond its quota gives up its least valuable entry, else the
    tenant that takes most: nobody's entries go because another stores much.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._by_edition: dict[str, dict[int, Entry]] = {}
        self._by_tenant: dict[str, ResidentSet[Key, Entry]] = {}
        self._oldest: list[tuple[float, Key]] = []
        self.bytes = 0

    def __len__(self) -> int:
        return sum(map(len, self._by_edition.values()))

    @property
    def tenants(self) -> int:
        return len(self._by_tenant)

    def of(self, edition: str) -> dict[int, Entry]:
        """Entries by id. Not to be changed."""
        return self._by_edition.get(edition, {})

    def keys_of(self, edition: str | None = None, tenant: str | None = None) -> list[Key]:
        """Of all editions and tenants, unless one is given."""
        editions = list(self._by_edition) if edition is None else [edition]
        return [
            (name, entry_id)
            for name in editions
            for entry_id, entry in self.of(name).items()
            if tenant is None or entry.tenant == tenant
        ]

    def use(self, key: Key) -> None:
        """What is used often goes late."""
        edition, entry_id = key
        if (entry := self.of(edition).get(entry_id)) is not None:
            self._by_tenant[entry.tenant].get(key)

    def add(self, key: Key, entry: Entry) -> list[tuple[Key, Entry]]:
        """Keep an entry that is not here; returns what was given up for it, itself perhaps."""
        edition, entry_id = key
        limits = self._limits
        if entry.size > limits.largest:
            return [(key, entry)]
        quota = limits.max_bytes if limits.tenant_bytes is None else limits.tenant_bytes
        of_tenant = self._by_tenant.setdefault(entry.tenant, ResidentSet(quota))
        self._by_edition.setdefault(edition, {})[entry_id] = entry
        self.bytes += entry.size
        evicted = self.remove(of_tenant.put(key, entry, entry.size, entry.cost))
        while self.bytes > limits.max_bytes:
            most = max(self._by_tenant.values(), key=lambda held: held.bytes)
            evicted += self.remove([most.evict()])
        if limits.ttl_s is not None:
            heapq.heappush(self._oldest, (entry.born, key))
            # Those of entries that went otherwise are dropped when they are most of the heap.
            if len(self._oldest) > 64 + 4 * len(self):
                self._oldest = [item for item in self._oldest if self._counts(item)]
                heapq.heapify(self._oldest)
        return evicted

    def remove(self, keys: Iterable[Key]) -> list[tuple[Key, Entry]]:
        """Keep ``keys`` no longer; those that were here, with their entries."""
        removed = []
        for edition, entry_id in keys:
            entry = self.of(edition).get(entry_id)
            if entry is None:
                continue
            del self._by_edition[edition][entry_id]
            if not self._by_edition[edition]:
                del self._by_edition[edition]
            held = self._by_tenant[entry.tenant]
            held.remove((edition, entry_id))
            if not held.bytes:
                del self._by_tenant[entry.tenant]
            self.bytes -= entry.size
            removed.append(((edition, entry_id), entry))
        return removed

    def expired(self, now: float) -> list[Key]:
        """What is older than ``Limits.ttl_s`` at the instant ``now``, each once."""
        found = []
        ttl = self._limits.ttl_s
        while ttl is not None and self._oldest and self._oldest[0][0] + ttl <= now:
            item = heapq.heappop(self._oldest)
            if self._counts(item):
                found.append(item[1])
        return found

    def _counts(self, item: tuple[float, Key]) -> bool:
        born, (edition, entry_id) = item
        entry = self.of(edition).get(entry_id)
        return entry is not None and entry.born == born
