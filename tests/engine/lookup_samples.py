# SPDX-License-Identifier: Apache-2.0
"""A store whose every answer is set by the test, and lookups in it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from batches import counted

from attncache_vllm.engine import step
from attncache_vllm.engine.lookups import Lookups
from attncache_vllm.engine.step import Hit
from attncache_vllm.reuse.codec import CODEC, encode_map
from attncache_vllm.reuse.feature import Projector
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.plan import Plan, Source, SourcePlan
from attncache_vllm.reuse.sketch import sketch
from attncache_vllm.store import (
    Neighbour,
    Overlap,
    Record,
    StoreHealth,
    StoreStats,
    token_hash,
)
from attncache_vllm.tenants import SHARED_TENANT

CAUSAL, BIDIRECTIONAL = MapLayout(4, 2, Mask()), MapLayout(4, 2, Mask(causal=False))

WINDOWED = MapLayout(4, 1, Mask(window=16))
GATE = 0.5
NUM_LAYERS = 4

# KV groups of all layers together, that of the windowed one included.
GROUPS = 7
Groups = tuple[tuple[int, ...], ...]
EVERY: Groups = ((), (), (0, 1), (0,))
EVERY_CAUSAL: Groups = ((), (), (0, 1), (0, 1))
PLAN = Plan(0, NUM_LAYERS, {"neighbour": SourcePlan(EVERY, GATE)})
LAYERS = PLAN.reused_layers
Layouts = dict[int, MapLayout]
LAYOUTS: Layouts = dict(zip(LAYERS, (CAUSAL, WINDOWED), strict=True))

with torch.random.fork_rng():  # the same weights, whatever ran before
    torch.manual_seed(0)
    PROJECTOR = Projector(hidden_size=6, slots=2, width=8, dim=3)

LENGTHS = {0: 20, 1: 24, 2: 24, 3: 40, 4: 64}


def make_probs(entry_id: int, layer: int, layout: MapLayout) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * entry_id + layer)
    length = LENGTHS[entry_id]
    scores = torch.randn(layout.num_heads, length, length, generator=generator)
    return scores.masked_fill(~layout.mask.visible(length), float("-inf")).softmax(-1).bfloat16()


def tokens_of(entry_id: int) -> np.ndarray:
    """Token ids of an entry, none of which another entry has."""
    return np.arange(1000 * entry_id, 1000 * entry_id + LENGTHS[entry_id], dtype=np.int32)


def make_lse(entry_id: int, layout: MapLayout) -> torch.Tensor:
    return torch.full((layout.num_heads, LENGTHS[entry_id]), float(entry_id))


def make_record(entry_id: int, layouts: Layouts) -> Record:
    return Record(
        token_hash=token_hash(tokens_of(entry_id)),
        length=LENGTHS[entry_id],
        codec=CODEC,
        pooled=np.zeros((2, 6), dtype=np.float32),
        maps={
            layer: encode_map(
                make_probs(entry_id, layer, layout),
                make_lse(entry_id, layout),
                layout.mask,
            ).numpy()
            for layer, layout in layouts.items()
        },
        token_ids=tokens_of(entry_id),
        sketch=sketch(tokens_of(entry_id)),
    )


def make_records(layouts: Layouts) -> dict[int, Record]:
    return {entry_id: make_record(entry_id, layouts) for entry_id in LENGTHS}


RECORDS = make_records(LAYOUTS)


class FakeStore:
    """A ``MapStore`` that answers ``answers``, ``overlapping`` and ``records``, and writes down how
    it was asked.

    ``fail`` names calls and what they raise; ``lookup`` waits until ``may_answer`` is set.
    """

    def __init__(self, answers: list[list[Neighbour]]) -> None:
        self.answers = answers
        self.overlapping: list[list[Overlap]] = []
        self.records: dict[int, Record | None] = dict(RECORDS)
        self.asked: list[dict[str, Any]] = []
        self.asked_overlaps: list[dict[str, Any]] = []
        self.read: list[list[int]] = []
        self.loaded: list[list[int]] = []
        self.fail: dict[str, Exception] = {}
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.troubles = StoreHealth({}, 0)

    def lookup(
        self,
        features: np.ndarray,
        lengths: Sequence[tuple[int, int]],
        *,
        tenants: Sequence[str],
        neighbours: int,
        deadline: float,
    ) -> list[list[Neighbour]]:
        self.asked.append(
            {
                "features": features,
                "lengths": list(lengths),
                "tenants": list(tenants),
                "neighbours": neighbours,
                "deadline": deadline,
            }
        )
        assert self.may_answer.wait(60)
        self._fail("lookup")
        return self.answers

    def overlaps(
        self,
        sketches: Sequence[np.ndarray],
        *,
        tenants: Sequence[str],
        neighbours: int,
        deadline: float,
    ) -> list[list[Overlap]]:
        self.asked_overlaps.append(
            {
                "sketches": list(sketches),
                "tenants": list(tenants),
                "neighbours": neighbours,
                "deadline": deadline,
            }
        )
        self._fail("overlaps")
        return self.overlapping

    def token_ids(self, entry_ids: Sequence[int], *, deadline: float) -> list[np.ndarray | None]:
        self.read.append(list(entry_ids))
        self._fail("token_ids")
        records = [self.records[entry_id] for entry_id in entry_ids]
        return [None if record is None else record.token_ids for record in records]

    def load(self, entry_ids: Sequence[int], *, deadline: float) -> list[Record | None]:
        self.loaded.append(list(entry_ids))
        self._fail("load")
        return [self.records[entry_id] for entry_id in entry_ids]

    def _fail(self, call: str) -> None:
        if call in self.fail:
            raise self.fail[call]

    def put(self, record: Record) -> int:
        raise AssertionError("serving does not write")

    def health(self) -> StoreHealth:
        return self.troubles

    def stats(self) -> StoreStats:
        raise AssertionError("not asked for by lookups")

    def close(self) -> None:
        raise AssertionError("not asked for by lookups")


def near(*entries: int, distance: float = 0.1) -> list[Neighbour]:
    return [Neighbour(entry_id, distance, LENGTHS[entry_id]) for entry_id in entries]


def make_lookups(
    store: FakeStore, plan: Plan = PLAN, layouts: Layouts = LAYOUTS, resident: int = 2**30
) -> Lookups:
    cpu = torch.device("cpu")
    return Lookups(store, PROJECTOR, plan, resident, layouts, GROUPS, cpu, lambda stored: stored)


def pooled(rows: int) -> torch.Tensor:
    return torch.randn(rows, 2, 6, generator=torch.Generator().manual_seed(rows))


def unknown(lengths: Sequence[int]) -> list[step.Sequence]:
    """Sequences of which only the lengths are known, and whose they are."""
    return [
        step.Sequence(row, 100 * row, length, None, SHARED_TENANT)
        for row, length in enumerate(lengths)
    ]


def known(*ids: np.ndarray) -> list[step.Sequence]:
    """Sequences with their token ids."""
    return [
        step.Sequence(row, 100 * row, len(own), own, SHARED_TENANT) for row, own in enumerate(ids)
    ]


def begin(lookups: Lookups, sequences: Sequence[int] | list[step.Sequence]) -> Future[Any]:
    asked = [s if isinstance(s, step.Sequence) else unknown([s])[0] for s in sequences]
    inputs = pooled(len(asked)) if lookups.uses_features else None
    future = lookups.start(asked, inputs, deadline=float("inf"))
    assert future is not None
    return future


def look_up(lookups: Lookups, sequences: Sequence[int] | list[step.Sequence]) -> list[Hit | None]:
    found: list[Hit | None] = begin(lookups, sequences).result(timeout=60)
    return found


def faults(kind: str) -> float:
    return counted("attncache_store_faults_total", kind=kind)


def assert_maps_of(
    hit: Hit | None,
    entry_id: int,
    layouts: Layouts = LAYOUTS,
    source: Source = "neighbour",
) -> None:
    assert hit is not None
    assert hit.source == source
    assert hit.served.keys() == layouts.keys()
    for layer, served in hit.served.items():
        layout, maps = layouts[layer], served.maps
        assert (served.source, maps.layout) == (source, layout)
        probs = make_probs(entry_id, layer, layout)
        probs.view(layout.num_kv_heads, -1, *probs.shape[1:])[
            [group for group in range(layout.num_kv_heads) if group not in maps.groups]
        ] = 0
        assert torch.equal(maps.to_dense(), probs)


ENCODER: Layouts = dict.fromkeys(LAYERS, BIDIRECTIONAL)
ENCODER_RECORDS = make_records(ENCODER)

# Novelty up to which edits are tolerated here.
NOVELTY = 0.3


def shared(sources: dict[Source, Groups], gate: float = NOVELTY) -> Plan:
    parts = {
        source: SourcePlan(groups, {"neighbour": GATE, "aligned": gate}.get(source, 0.0))
        for source, groups in sources.items()
    }
    return Plan(0, NUM_LAYERS, parts)


def edit(entry_id: int, *places: int) -> np.ndarray:
    """The tokens of an entry, other ones at these places."""
    ids = tokens_of(entry_id).copy()
    ids[list(places)] = 90_000 + np.arange(len(places))
    return ids


def overlap(*entries: int) -> list[Overlap]:
    return [Overlap(entry_id, 5, LENGTHS[entry_id]) for entry_id in entries]


def other_model(record: Record, layer: int | None = None) -> Record:
    """Whose maps, or that of one layer, have another size."""
    maps = {i: m[:-2] if layer in (None, i) else m for i, m in record.maps.items()}
    return replace(record, maps=maps)
