# SPDX-License-Identifier: Apache-2.0
"""Steps whose decision is set by the test."""

from __future__ import annotations

import time
from concurrent.futures import Future
from types import SimpleNamespace

from attncache_vllm.engine.step import (
    Decision,
    Hit,
    Sequence,
    Served,
    Step,
)
from attncache_vllm.reuse.plan import Source


class Deciding:
    """Serves what was found, of odd rows as canaries; writes down what it was asked."""

    def __init__(self, *tripped: tuple[int, Source]) -> None:
        self.asked: list[SimpleNamespace] = []
        self.trips = set(tripped)

    def decide(
        self, sequences: list[Sequence], found: list[Hit | None], reason: str | None
    ) -> Decision:
        self.asked.append(SimpleNamespace(sequences=sequences, found=found, reason=reason))
        hits = {s.row: hit for s, hit in zip(sequences, found, strict=True) if hit is not None}
        return Decision(
            {row: hit for row, hit in hits.items() if row % 2 == 0},
            {row: hit for row, hit in hits.items() if row % 2},
        )

    def choose(self, layer: int, served: dict[int, Served]) -> dict[int, Served]:
        return {row: item for row, item in served.items() if (layer, item.source) not in self.trips}


def make_step(
    lookup: Future[list[Hit | None]] | None,
    rows: tuple[int, ...],
    *,
    seconds: float = 60,
    deciding: Deciding | None = None,
    reason: str | None = None,
) -> Step:
    sequences = [Sequence(row, 4 * row, 4) for row in rows]
    deadline, deciding = time.monotonic() + seconds, deciding or Deciding()
    return Step(sequences, lookup, deadline, deciding.decide, deciding.choose, reason)


def found(*hits: Hit | None) -> Future[list[Hit | None]]:
    future: Future[list[Hit | None]] = Future()
    future.set_result(list(hits))
    return future
