# SPDX-License-Identifier: Apache-2.0
"""Shards in this process behind the calls that would reach actors, with faults to order."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from store_samples import NAMESPACE, make_features, make_record

from attncache_vllm.errors import StoreError
from attncache_vllm.store import LocalStore
from attncache_vllm.store.ray import ring
from attncache_vllm.store.ray.calls import PROTOCOL
from attncache_vllm.store.ray.edition import Edition
from attncache_vllm.store.ray.placement import Placement
from attncache_vllm.store.ray.shard import Limits, Shard
from attncache_vllm.store.records import encode_record

LIMITS = Limits(max_bytes=64 << 20)


def encoded(number: int) -> np.ndarray:
    return np.frombuffer(b"".join(encode_record(make_record(number))), dtype=np.uint8)


def edition_of(path: Path) -> Edition:
    with LocalStore.open(path) as store:
        return Edition.of(store)


class FakeCalls:
    """``Calls`` of shards in this process. ``hung`` ones answer nothing, ``dead`` ones fail."""

    def __init__(
        self, folder: Path, placement: Placement, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.folder = folder
        self.clock = clock
        self.placements: dict[int, Placement] = {}
        self.shards: dict[int, Shard] = {}
        self.protocols: dict[int, int] = {}
        self.hung: set[int] = set()
        self.dead: set[int] = set()
        self.known: set[int] = set()
        self.asked: list[tuple[int, str]] = []
        for number in range(placement.shards):
            self.start(number, placement)

    def start(self, number: int, placement: Placement) -> None:
        self.shards[number] = Shard(self.folder / f"shard-{number}", LIMITS)
        self.placements[number] = placement

    def present(self) -> list[int]:
        return sorted(self.shards)

    def resolve(self, shard: int) -> None:
        if shard not in self.shards:
            raise StoreError(f"shard {shard} does not run")
        self.known.add(shard)

    def submit(self, shard: int, method: str, *args: Any) -> tuple[Any, ...]:
        if shard not in self.known:
            raise StoreError(f"shard {shard} is not known")
        self.asked.append((shard, method))
        return shard, method, *args

    def gather(self, pending: Mapping[Any, Any], deadline: float) -> dict[Any, Any]:
        answers = {}
        for key, (shard, method, *args) in pending.items():
            if shard in self.hung:
                continue
            try:
                answers[key] = self.answer(shard, method, *args)
            except Exception as error:
                answers[key] = error
        if len(answers) < len(pending):
            time.sleep(max(0.0, deadline - self.clock()))
        return answers

    def answer(self, shard: int, method: str, *args: Any) -> Any:
        if shard in self.dead:
            raise ConnectionError("the actor is dead")
        if method == "describe":
            return {
                "protocol": self.protocols.get(shard, PROTOCOL),
                "ring": ring.VERSION,
                "number": shard,
                "placement": self.placements[shard].to_dict(),
                "rearmed_at": self.shards[shard].rearmed_at(),
                "stats": self.shards[shard].stats(),
                "node": f"node-{shard}",
                "pid": 1,
            }
        if method == "place":
            placement = Placement.from_dict(*args)
            if placement.generation > self.placements[shard].generation:
                self.placements[shard] = placement
            return None
        return getattr(self.shards[shard], method)(*args)


def make_entries(count: int) -> list[tuple[int, np.ndarray, np.ndarray, float]]:
    """What ``Fanout.put`` takes, for the shared tenant; the features are those of build_store."""
    features = make_features(count)
    return [
        (ring.entry_id("", make_record(i).token_hash), features[i], encoded(i), 0.0)
        for i in range(count)
    ]


__all__ = ["NAMESPACE", "FakeCalls", "edition_of", "encoded", "make_entries"]
