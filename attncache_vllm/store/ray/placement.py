# SPDX-License-Identifier: Apache-2.0
"""Which shards there are, and which of them hold an entry."""

from __future__ import annotations

from dataclasses import dataclass

import msgpack

from attncache_vllm.store import checks
from attncache_vllm.store.ray.ring import owners

MAX_SHARDS = 1 << 12


@dataclass(frozen=True)
class Placement:
    """What the shards of a store agree on; of two that differ, the later generation counts.

    Attributes:
        generation: counts the changes.
        shards: how many there are, numbered from 0.
        replicas: how many of them hold an entry, if as many are not drained.
        drained: those that hold nothing, ascending. To the ring they are not there.
    """

    generation: int
    shards: int
    replicas: int
    drained: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        checks.integer(self.generation, 0, 1 << 53, "generation")
        checks.integer(self.shards, 1, MAX_SHARDS, "shards")
        checks.integer(self.replicas, 1, self.shards, "replicas")
        for number in self.drained:
            checks.integer(number, 0, self.shards - 1, "a drained shard")
        if list(self.drained) != sorted(set(self.drained)):
            raise ValueError(f"drained shards must ascend, got {self.drained!r}")
        if len(self.drained) >= self.shards:
            raise ValueError(
                f"of {self.shards} shards one must remain, got {self.drained!r} drained"
            )

    @property
    def active(self) -> tuple[int, ...]:
        """The shards that hold entries."""
        return tuple(number for number in range(self.shards) if number not in self.drained)

    def owners(self, entry_id: int) -> tuple[int, ...]:
        """The shards that hold the entry, the one to be asked first first."""
        if not self.drained:
            return owners(entry_id, self.shards, self.replicas)
        # Going on around the ring past the drained is what a ring without them would answer.
        wanted = min(self.shards, self.replicas + len(self.drained))
        found = owners(entry_id, self.shards, wanted)
        return tuple(number for number in found if number not in self.drained)[: self.replicas]

    def to_dict(self) -> dict[str, object]:
        return {**vars(self), "drained": list(self.drained)}

    def to_bytes(self) -> bytes:
        data: bytes = msgpack.packb(self.to_dict())
        return data

    @classmethod
    def from_dict(cls, data: object) -> Placement:
        """The inverse of ``to_dict``; anything odd is a ``ValueError``."""
        given = checks.fields(data, ["generation", "shards", "replicas", "drained"], "a placement")
        drained = checks.items(given["drained"], None, "drained shards")
        return cls(given["generation"], given["shards"], given["replicas"], tuple(drained))
