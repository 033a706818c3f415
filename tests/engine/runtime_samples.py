# SPDX-License-Identifier: Apache-2.0
"""A worker's serving state with lookups that answer what the test says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from batches import batch, counted
from hypothesis import strategies as st
from vllm.forward_context import ForwardContext, override_forward_context

from attncache_vllm.config import Settings
from attncache_vllm.engine import step
from attncache_vllm.engine.canary import Canaries
from attncache_vllm.engine.runtime import Serving
from attncache_vllm.engine.step import Hit, Recording, Served, Step
from attncache_vllm.reuse.align import Alignment
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.maps import RowBlocks
from attncache_vllm.reuse.plan import Plan, Source, SourcePlan
from attncache_vllm.reuse.template import Templates

FEATURE_LAYER = "model.layers.0.self_attn.attn"
SLOTS = 2

NUM_LAYERS, KV_HEADS = 5, 2

GROUPS = NUM_LAYERS * KV_HEADS
LAYOUT = MapLayout(4, KV_HEADS, Mask())

# Layers 1 and 3 have templates, of up to 12 tokens.
TEMPLATE_GROUPS = {1: (0,), 3: (0, 1)}
LONGEST = 12


def make_maps(length: int, groups: tuple[int, ...] = (0, 1)) -> RowBlocks:
    return RowBlocks(LAYOUT, length, groups, ())


TEMPLATES = Templates({i: {LONGEST: make_maps(LONGEST, g)} for i, g in TEMPLATE_GROUPS.items()})
NO_TEMPLATES = Templates({})


def served_by(source: Source, groups: Mapping[int, tuple[int, ...]]) -> Hit:
    return Hit(source, {i: Served(source, make_maps(64, own)) for i, own in groups.items()})


def neighbour() -> Hit:
    return served_by("neighbour", {2: (0, 1), 4: (1,)})


class FakeLookups:
    """Answers ``answer``, a list of hits, an exception, None while busy, or a future."""

    def __init__(self, answer: Any = None, uses_features: bool = True) -> None:
        self.answer = answer
        self.uses_features = uses_features
        self.asked: list[SimpleNamespace] = []

    def start(
        self, sequences: list[step.Sequence], pooled: torch.Tensor | None, deadline: float
    ) -> Future[list[Hit | None]] | None:
        self.asked.append(SimpleNamespace(sequences=sequences, pooled=pooled, deadline=deadline))
        if self.answer is None or isinstance(self.answer, Future):
            return self.answer
        future: Future[list[Hit | None]] = Future()
        if isinstance(self.answer, Exception):
            future.set_exception(self.answer)
        else:
            future.set_result(self.answer)
        return future


class FakeAdmissions:
    """Records what has token ids, if it is ``willing``."""

    def __init__(self, willing: bool = True) -> None:
        self.willing = willing
        self.begun: list[Recording] = []

    def ready(self) -> bool:
        return self.willing

    def begin(self, sequence: step.Sequence, pooled: torch.Tensor) -> Recording | None:
        if sequence.token_ids is None:
            return None
        self.begun.append(Recording(sequence, pooled))
        return self.begun[-1]


def make_canaries(share: float = 0.0) -> Canaries:
    every = tuple((0, 1) for _ in range(NUM_LAYERS))
    sources: tuple[Source, ...] = ("aligned", "neighbour", "template")
    plan = Plan(0, NUM_LAYERS, {source: SourcePlan(every) for source in sources})
    return Canaries(plan, share, lambda: 0, "attncache rearm")


def make_serving(
    lookups: FakeLookups | None,
    templates: Templates = NO_TEMPLATES,
    canaries: Canaries | None = None,
    admissions: FakeAdmissions | None = None,
    **changes: Any,
) -> Serving:
    # The deadline is not what these tests are about, whatever else the machine does.
    update = {"min_tokens": 4, "lookup_deadline_ms": 60_000.0, **changes}
    given = Settings(store=Path("maps")).model_copy(update=update)
    any_lookups: Any = lookups
    any_admissions: Any = admissions
    sources: tuple[Source, ...] = ("aligned", "neighbour", "template")
    return Serving(
        any_lookups,
        templates,
        canaries or make_canaries(),
        given,
        SLOTS,
        FEATURE_LAYER,
        GROUPS,
        sources,
        any_admissions,
    )


def observe(serving: Serving, metadata: Any, hidden_states: torch.Tensor) -> Step:
    context = ForwardContext(
        no_compile_layers={}, attn_metadata={FEATURE_LAYER: metadata}, slot_mapping={}
    )
    with override_forward_context(context):
        serving.observe(hidden_states)
        current = serving.current()
        assert current is not None
        return current


def hidden(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, 6, generator=torch.Generator().manual_seed(tokens)).bfloat16()


def begin(serving: Serving, lengths: Sequence[int]) -> Step:
    return observe(serving, batch(lengths), hidden(sum(lengths)))


def sources_of(found: Step) -> list[dict[int, Source]]:
    """For each layer who is served from where, by row."""
    return [
        {row: item.source for row, item in found.served(layer).items()}
        for layer in range(NUM_LAYERS)
    ]


class Rows:
    """What the counters of map rows grow by."""

    def __init__(self) -> None:
        self._before = self._now()

    @property
    def since(self) -> tuple[float, float]:
        """Reused and computed."""
        reused, computed = (b - a for a, b in zip(self._before, self._now(), strict=True))
        return reused, computed

    def _now(self) -> list[float]:
        return [counted("attncache_map_rows_total", kind=kind) for kind in ("reused", "computed")]


@st.composite
def hits(draw: st.DrawFn, length: int) -> tuple[Hit | None, int]:
    """What was found for a text, and how many rows of maps it spares."""
    layers = draw(st.sets(st.integers(0, NUM_LAYERS - 1)))
    served, spared = {}, 0
    source = draw(st.sampled_from(["aligned", "neighbour"]))
    for layer in layers:
        groups = draw(st.sampled_from([(0,), (1,), (0, 1)]))
        alignment, rows = None, length
        if source == "aligned":
            kept = np.array(sorted(draw(st.sets(st.integers(0, length - 1)))), dtype=np.int64)
            alignment, rows = Alignment(length, length, kept, kept), len(kept)
        served[layer] = Served(source, make_maps(length, groups), alignment)
        spared += rows * len(groups)
    return (Hit(source, served), spared) if served else (None, 0)
