# SPDX-License-Identifier: Apache-2.0
"""What a shard can be asked, and how it is reached."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Protocol, TypeVar

K = TypeVar("K", bound=Hashable)

PROTOCOL = 1
"""Of the methods below, with their arguments and answers."""

# Concurrency groups of the actor and the methods in each: those of `Shard`, `describe` and `place`.
# Lookups never wait for what is put, moved or deleted.
GROUPS = {
    "read": frozenset({"lookup", "overlaps", "token_ids", "load", "describe"}),
    "write": frozenset({"put", "remove"}),
    "control": frozenset(
        {"publish", "edition", "editions", "rearm", "ids", "export", "delete", "place"}
    ),
}
GROUP_OF = {method: group for group, methods in GROUPS.items() for method in methods}

FULL = "refused: the shard is full of what is worth more"
"""What ``put`` says of an entry for which nothing else was given up."""


class Calls(Protocol):
    """Calls of shards by their numbers; ``attncache_vllm.store.ray.actor`` has Ray's."""

    def present(self) -> list[int]:
        """The numbers of the shards that run, ascending. May wait."""

    def resolve(self, shard: int) -> None:
        """Find a shard anew. May wait; ``StoreError`` if it does not run."""

    def submit(self, shard: int, method: str, *args: Any) -> Any:
        """Start a call without waiting; it may raise whatever it likes."""

    def gather(self, pending: Mapping[K, Any], deadline: float) -> dict[K, Any]:
        """The answer, or the exception in its place, of each call that is done by ``deadline``."""
