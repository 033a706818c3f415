# SPDX-License-Identifier: Apache-2.0
"""One question to all shards: what they answered in time, put together."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attncache_vllm.errors import StoreError, StoreTimeout
from attncache_vllm.store.index import Features, Ids
from attncache_vllm.store.ray import ring
from attncache_vllm.store.ray.breaker import Breaker
from attncache_vllm.store.ray.calls import PROTOCOL, Calls
from attncache_vllm.store.ray.placement import Placement
from attncache_vllm.store.ray.reading import Bytes
from attncache_vllm.store.sketches import Sketch

logger = logging.getLogger(__name__)

Found = tuple[Ids, NDArray[Any], Ids]

# A shard that has not said who it is within so many seconds has failed.
_DESCRIBE_SECONDS = 2.0
# How often shards are asked for their figures and the placement. Of a thousand servers each shard
# hears two hundred times a second.
_LOOK_SECONDS = 5.0


@dataclass(frozen=True)
class Description:
    """What a shard says of itself: its placement, when servers were told to rearm, its figures, the
    id of its node in Ray and its process."""

    placement: Placement
    rearmed_at: int
    stats: dict[str, int]
    node: str
    pid: int


class Fanout:
    """Asks shards, each at most once a question, and leaves out those whose breaker is open.

    ``tend`` is for a thread of its own: it tries shards that are out, and follows changes of the
    placement. The other methods may be called from several threads.
    """

    def __init__(
        self,
        calls: Calls,
        *,
        new_breaker: Callable[[], Breaker] = Breaker,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Find the shards; ``StoreError`` if none of this release answers."""
        self._calls = calls
        self._clock = clock
        self._new_breaker = new_breaker
        self._breakers: dict[int, Breaker] = {}
        self._reasons: dict[int, str] = {}
        self._described: dict[int, Description] = {}
        self._look_at = 0.0
        self._placement = self._first_placement()

    @property
    def placement(self) -> Placement:
        return self._placement

    def out(self) -> dict[int, str]:
        """The shards that are not asked at present, each with the reason."""
        return {
            shard: self.why(shard)
            for shard in self._placement.active
            if not self._breakers[shard].closed
        }

    def why(self, shard: int) -> str:
        """What was wrong with a shard last."""
        return self._reasons.get(shard, "it does not answer")

    def figures(self) -> dict[str, int]:
        """Entries, bytes and damaged of all shards, as they were when last asked."""
        described = dict(self._described).values()
        names = ("entries", "bytes", "damaged")
        return {name: sum(shard.stats[name] for shard in described) for name in names}

    def rearmed_at(self) -> int:
        """When servers were told last to try tripped layers again; 0 if never."""
        return max((shard.rearmed_at for shard in dict(self._described).values()), default=0)

    # -- reading ------------------------------------------------------------------------------

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

    # -- writing ------------------------------------------------------------------------------

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
        return said

    def control(
        self, method: str, *args: Any, deadline: float, shards: Sequence[int] | None = None
    ) -> dict[int, Any]:
        """What each of ``shards`` (all) that answered in time says to ``method``."""
        if shards is None:
            shards = range(self._placement.shards)
        asked = [shard for shard in shards if self._breakers[shard].closed]
        return self._ask({shard: (method, *args) for shard in asked}, deadline)

    def every(
        self, method: str, *args: Any, deadline: float, shards: Sequence[int] | None = None
    ) -> dict[int, Any]:
        """As ``control``; ``StoreError`` unless each of them answers."""
        asked = range(self._placement.shards) if shards is None else shards
        answers = self.control(method, *args, deadline=deadline, shards=asked)
        silent = {shard: self._reasons.get(shard) for shard in asked if shard not in answers}
        if silent:
            raise StoreError(
                f"each of {len(asked)} shards must answer {method!r}, got none of {silent!r}; "
                "see 'attncache store status'"
            )
        return answers

    def meet(self, shards: Sequence[int]) -> dict[int, Description]:
        """Find ``shards`` anew, also those that no placement has yet, and ask who they are."""
        self._breakers |= {s: self._new_breaker() for s in shards if s not in self._breakers}
        described = self._describe(shards, anew=shards)
        self._adopt(described)
        return described

    # -- tending ------------------------------------------------------------------------------

    def tend(self) -> None:
        """Probe the shards that are due, look at the others from time to time, and adopt the newest
        placement. To be called every second or so; may wait for seconds."""
        shards = range(self._placement.shards)
        probed = [shard for shard in shards if self._breakers[shard].probe_due()]
        asked = list(probed)
        if self._clock() >= self._look_at:
            self._look_at = self._clock() + _LOOK_SECONDS
            asked += [shard for shard in shards if self._breakers[shard].closed]
        described = self._describe(asked, anew=probed)
        for shard in probed:
            if shard not in described:
                self._breakers[shard].failed()
            elif self._breakers[shard].succeeded():
                self._reasons.pop(shard, None)
                logger.warning("shard %d answers again", shard)
        self._adopt(described)

    # -- inside -------------------------------------------------------------------------------

    def _first_placement(self) -> Placement:
        present = self._calls.present()
        self._breakers = {shard: self._new_breaker() for shard in present}
        described = self._describe(present, anew=present)
        if not described:
            reasons = "; ".join(f"shard {shard}: {why}" for shard, why in self._reasons.items())
            raise StoreError(
                "a store must have a shard that answers, got "
                f"{reasons or 'none at all'}; run 'attncache store up'"
            )
        self._placement = Placement(0, 1, 1)
        self._adopt(described)
        return self._placement

    def _adopt(self, described: Mapping[int, Description]) -> None:
        placements = [shard.placement for shard in described.values()]
        newest = max(placements, key=lambda p: p.generation, default=self._placement)
        if newest.generation > self._placement.generation:
            new = [shard for shard in range(newest.shards) if shard not in self._breakers]
            self._placement = newest
            self.meet(new)
            self._described = {s: d for s, d in self._described.items() if s < newest.shards}

    def _describe(self, shards: Sequence[int], anew: Sequence[int]) -> dict[int, Description]:
        """What shards of this release say of themselves; others have failed. Those in ``anew`` are
        looked for again."""
        reached = set(shards)
        for shard in anew:
            try:
                self._calls.resolve(shard)
            except Exception as error:
                self._failed(shard, error)
                reached.discard(shard)
        deadline = self._clock() + _DESCRIBE_SECONDS
        calls: dict[int, tuple[Any, ...]] = {shard: ("describe",) for shard in reached}
        described = {}
        for shard, answer in self._ask(calls, deadline, probing=True).items():
            try:
                described[shard] = _description_of(shard, answer)
            except ValueError as error:
                self._failed(shard, error)
        self._described |= described
        return described

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

    def _ask(
        self, calls: Mapping[int, tuple[Any, ...]], deadline: float, probing: bool = False
    ) -> dict[int, Any]:
        """The answers of shards in time. Everything else counts against the shard's breaker; that
        a shard refuses does not, as it answers."""
        pending, answers = {}, {}
        for shard, call in calls.items():
            try:
                pending[shard] = self._calls.submit(shard, *call)
            except Exception as error:
                self._failed(shard, error)
        gathered = self._calls.gather(pending, deadline)
        for shard in pending:
            answer = gathered.get(shard, StoreTimeout("it does not answer in time"))
            if isinstance(answer, StoreError) and not isinstance(answer, StoreTimeout):
                self._reasons[shard] = str(answer)
            elif isinstance(answer, Exception):
                self._failed(shard, answer)
            else:
                answers[shard] = answer
                if not probing:
                    self._breakers[shard].succeeded()
        return answers

    def _failed(self, shard: int, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        self._reasons[shard] = reason
        if self._breakers[shard].failed():
            logger.warning("shard %d is left out until it answers again: %s", shard, reason)


def merge(
    answers: Sequence[Found], queries: int, most: int, kind: type[np.float32] | type[np.int64]
) -> Found:
    """The best of several shards' answers, each entry once: least first for distances (float32),
    most first for what sketches have in common (int64), and by id where these are equal.

    Args:
        answers: of each shard the ids int64 ``[queries, k]``, -1 for no more; values; lengths.
        queries: how many were asked.
        most: how many entries a query wants at most.
    """
    ids = np.full((queries, most), -1, dtype=np.int64)
    values = np.zeros((queries, most), dtype=kind)
    lengths = np.zeros((queries, most), dtype=np.int64)
    every = [np.concatenate(parts, axis=1) for parts in zip(*answers, strict=True)]
    for query in range(queries):
        own, value, length = (part[query] for part in every)
        _, first = np.unique(own, return_index=True)
        first = first[own[first] >= 0]
        rank = value[first] if kind is np.float32 else -value[first]
        best = first[np.lexsort((own[first], rank))[:most]]
        ids[query, : len(best)] = own[best]
        values[query, : len(best)] = value[best]
        lengths[query, : len(best)] = length[best]
    return ids, values, lengths


def _description_of(shard: int, answer: object) -> Description:
    if not isinstance(answer, dict):
        raise ValueError(f"shard {shard} must describe itself, got {answer!r:.100}")
    for name, ours in (("protocol", PROTOCOL), ("ring", ring.VERSION), ("number", shard)):
        if answer.get(name) != ours:
            raise ValueError(
                f"shard {shard} must have {name} {ours}, got {answer.get(name)!r}; run servers and "
                "shards of one release"
            )
    own = {name: answer[name] for name in ("rearmed_at", "stats", "node", "pid")}
    return Description(Placement.from_dict(answer["placement"]), **own)
