# SPDX-License-Identifier: Apache-2.0
"""One question to all shards: what they answered in time, put together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attncache_vllm.errors import StoreError, StoreTimeout
from attncache_vllm.store.found import Found, merge
from attncache_vllm.store.index import Features, Ids
from attncache_vllm.store.ray.calls import FULL
from attncache_vllm.store.ray.peers import Peers
from attncache_vllm.store.ray.reading import Bytes
from attncache_vllm.store.sketches import Sketch


class Fanout(Peers):
    """Reads from the shards and writes to them. Methods may be called from several threads."""

    def lookup(
        self,
        edition: str,
        tenants: Sequence[str],
        features: Features,
        lengths: Ids,
        neighbours: int,
        deadline: float,
    ) -> Found:
        """As ``Shard.lookup``, over all shards: ids, distances and lengths, nearest first.

        Raises:
            StoreTimeout: no shard answered in time.
            StoreError: no shard can be asked, or none could answer.
        """
        answers = self._ask_all("lookup", deadline, edition, tenants, features, lengths, neighbours)
        return merge(answers, len(tenants), neighbours, np.float32)

    def overlaps(
        self,
        edition: str,
        tenants: Sequence[str],
        sketches: Sequence[Sketch],
        neighbours: int,
        deadline: float,
    ) -> Found:
        """As ``Shard.overlaps``, over all shards: ids, common and lengths, most first; errors as
        for ``lookup``."""
        answers = self._ask_all("overlaps", deadline, edition, tenants, sketches, neighbours)
        return merge(answers, len(tenants), neighbours, np.int64)

    def token_ids(
        self, edition: str, ids: Sequence[int], deadline: float
    ) -> list[NDArray[np.int32] | None]:
        """As ``Shard.token_ids``, from the owners; None where no owner could tell in time."""
        return self._from_owners("token_ids", edition, ids, deadline)

    def load(self, edition: str, ids: Sequence[int], deadline: float) -> list[Bytes | None]:
        """As ``Shard.load``, from the owners; None where no owner could give it in time."""
        return self._from_owners("load", edition, ids, deadline)

    def put(
        self,
        edition: str,
        tenant: str,
        entries: Sequence[tuple[int, Features, Bytes, float]],
        deadline: float,
    ) -> list[list[str]]:
        """Have the owners of each entry keep it: what each of them that answered said.

        Args:
            entries: id, feature float32 ``[F]``, record, age in seconds.
        """
        batches: dict[int, list[int]] = defaultdict(list)
        for place, (entry_id, *_) in enumerate(entries):
            for shard in self._placement.owners(entry_id):
                if self._breakers[shard].closed:
                    batches[shard].append(place)
        calls = {}
        for shard, places in batches.items():
            chosen = [entries[place] for place in places]
            features = np.stack([feature for _, feature, _, _ in chosen])
            records, ages = [e[2] for e in chosen], [e[3] for e in chosen]
            calls[shard] = ("put", edition, tenant, features, records, ages)
        said: list[list[str]] = [[] for _ in entries]
        for shard, answer in self._ask(calls, deadline).items():
            for place, outcome in zip(batches[shard], answer, strict=True):
                said[place].append(outcome)
                if outcome.startswith("refused"):
                    self._count("full" if outcome == FULL else "refused")
        return said

    # -- inside -------------------------------------------------------------------------------

    def _ask_all(self, method: str, deadline: float, *args: Any) -> list[Any]:
        shards = [shard for shard in self._placement.active if self._breakers[shard].closed]
        if not shards:
            raise StoreError(
                f"one of {len(self._placement.active)} shards must answer, got {self.out()!r}; "
                "run 'attncache store status'"
            )
        answers = self._ask({shard: (method, *args) for shard in shards}, deadline)
        if not answers:
            if self._clock() >= deadline:
                raise StoreTimeout(f"none of {len(shards)} shards answered before the deadline")
            reasons = {shard: self._reasons.get(shard) for shard in shards}
            raise StoreError(f"none of {len(shards)} shards could answer, got {reasons!r}")
        return list(answers.values())

    def _from_owners(
        self, method: str, edition: str, ids: Sequence[int], deadline: float
    ) -> list[Any]:
        found: dict[int, Any] = {}
        left = {entry_id: list(self._placement.owners(entry_id)) for entry_id in ids}
        while left:
            batches: dict[int, list[int]] = defaultdict(list)
            for entry_id, shards in left.items():
                while shards and not self._breakers[shards[0]].closed:
                    del shards[0]
                if shards:
                    batches[shards.pop(0)].append(entry_id)
            calls = {shard: (method, edition, batch) for shard, batch in batches.items()}
            for shard, answer in self._ask(calls, deadline).items():
                for entry_id, value in zip(batches[shard], answer, strict=True):
                    if value is not None:
                        found[entry_id] = value
            late = self._clock() >= deadline
            left = {} if late else {i: s for i, s in left.items() if i not in found and s}
        return [found.get(entry_id) for entry_id in ids]
