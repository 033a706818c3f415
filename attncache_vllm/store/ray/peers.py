# SPDX-License-Identifier: Apache-2.0
"""The shards as those who ask them see them: which there are, and which are left out for now."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from attncache_vllm.errors import StoreError, StoreTimeout
from attncache_vllm.store.ray import ring
from attncache_vllm.store.ray.breaker import Breaker
from attncache_vllm.store.ray.calls import PROTOCOL, Calls
from attncache_vllm.store.ray.placement import Placement

logger = logging.getLogger(__name__)

# A shard that has not said who it is to a server within so many seconds has failed.
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


class Peers:
    """Asks shards, each at most once at a time, and leaves out those whose breaker is open.

    ``tend`` is for a thread of its own: it tries shards that are out, and follows changes of the
    placement. The other methods may be called from several threads.
    """

    def __init__(
        self,
        calls: Calls,
        *,
        new_breaker: Callable[[], Breaker] = Breaker,
        clock: Callable[[], float] = time.monotonic,
        describe_seconds: float = _DESCRIBE_SECONDS,
    ) -> None:
        """Find the shards; ``StoreError`` if none of this release says who it is in
        ``describe_seconds``."""
        self._calls = calls
        self._clock = clock
        self._describe_seconds = describe_seconds
        self._new_breaker = new_breaker
        self._breakers: dict[int, Breaker] = {}
        self._reasons: dict[int, str] = {}
        self._described: dict[int, Description] = {}
        self._faults: Counter[str] = Counter()
        self._counting = Lock()
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

    def faults(self) -> dict[str, int]:
        """How often what went wrong since the start, by kind.

        Of calls: ``late`` (no answer in time), ``dead`` (the shard does not run or cannot be
        reached), ``version`` (it is of another release) and ``refused`` (it answers that it will
        not, which for a ``put`` is counted for each entry). Of entries: ``full`` (a shard has no
        room for it) and ``damaged`` (a shard has found it so; every server counts it).
        """
        with self._counting:
            return dict(+self._faults)

    def figures(self) -> dict[str, int]:
        """Entries, bytes and damaged of all shards, as they were when last asked."""
        described = dict(self._described).values()
        names = ("entries", "bytes", "damaged")
        return {name: sum(shard.stats[name] for shard in described) for name in names}

    def rearmed_at(self) -> int:
        """When servers were told last to try tripped layers again; 0 if never."""
        return max((shard.rearmed_at for shard in dict(self._described).values()), default=0)

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
        deadline = self._clock() + self._describe_seconds
        calls: dict[int, tuple[Any, ...]] = {shard: ("describe",) for shard in reached}
        described = {}
        for shard, answer in self._ask(calls, deadline, probing=True).items():
            try:
                described[shard] = _description_of(shard, answer)
            except ValueError as error:
                self._failed(shard, error, "version")
        for shard, now in described.items():
            before = self._described.get(shard, now).stats["damaged"]
            # A shard that was restarted counts anew.
            found = now.stats["damaged"]
            self._count("damaged", found - before if found >= before else found)
        self._described |= described
        return described

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
                self._count("refused")
            elif isinstance(answer, Exception):
                self._failed(shard, answer, "late" if shard not in gathered else "dead")
            else:
                answers[shard] = answer
                if not probing:
                    self._breakers[shard].succeeded()
        return answers

    def _count(self, fault: str, times: int = 1) -> None:
        with self._counting:
            self._faults[fault] += times

    def _failed(self, shard: int, error: Exception, fault: str = "dead") -> None:
        self._count(fault)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        self._reasons[shard] = reason
        if self._breakers[shard].failed():
            logger.warning("shard %d is left out until it answers again: %s", shard, reason)


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
