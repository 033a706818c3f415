# SPDX-License-Identifier: Apache-2.0
"""Measuring the costs of an engine's own layers, with maps of the kind that its plan serves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attncache_vllm.engine import compat
from attncache_vllm.engine.costs import Cost, Costs, Manner
from attncache_vllm.engine.modules import AttentionModule
from attncache_vllm.engine.step import Decision, Hit, Served, Step
from attncache_vllm.engine.step import Sequence as Prompt
from attncache_vllm.reuse.align import align
from attncache_vllm.reuse.codecs import CODECS, pruned
from attncache_vllm.reuse.encode import encode_attention
from attncache_vllm.reuse.maps import AttentionMap, RowBlocks
from attncache_vllm.reuse.plan import Plan, Source, SourcePlan
from attncache_vllm.reuse.template import Templates
from attncache_vllm.reuse.tiles import TiledMap

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# How often a text is timed at most, and the time after which it has been timed enough.
REPEATS, ENOUGH_SECONDS = 5, 0.25
# A text that shares tokens with an entry has so many between two edits, and one that shares its
# beginning has so many of the entry's tokens in each of its own.
EDIT_EVERY = 20
PREFIX_SHARE = 0.5

# Puts a step in force for the layers.
Pretending = Callable[[Step], AbstractContextManager[None]]


@dataclass(frozen=True, eq=False)
class Meter:
    """Measures layers that serve.

    Attributes:
        layers: those that reuse maps here.
        plan: which KV groups of them each source serves.
        templates: as they are served.
        codec: how maps are stored.
        form: of a stored map, as it is served.
        pretending: puts a step in force.
        vllm_config: of the engine.
    """

    layers: Sequence[AttentionModule]
    plan: Plan
    templates: Templates
    codec: str
    form: Callable[[RowBlocks | TiledMap], AttentionMap]
    pretending: Pretending
    vllm_config: VllmConfig

    def measure(
        self,
        builders: Mapping[str, Any],
        lengths: Sequence[int],
        most_tokens: int,
        look_up: Callable[[int], object] | None,
    ) -> Costs:
        """Costs at some lengths, ascending.

        Layers of one kind cost the same, so one of each is measured.

        Args:
            builders: of attention metadata, by the name of the layer.
            lengths: in tokens.
            most_tokens: of a batch, whose keys and values must fit the cache.
            look_up: looks up a text of so many tokens that nothing is like; None without lookups.
        """
        known: dict[tuple[Any, ...], list[Cost]] = {}
        measured: dict[tuple[int, Manner], list[Cost]] = {}
        for source, part in self.plan.sources.items():
            manners: list[Manner] = [source]
            if source in ("aligned", "prefix"):
                manners.append("own")
            for found in self.layers:
                groups = part.groups[found.index]
                if not groups:
                    continue
                around = hasattr(found.attention, "attncache_module")
                treated = found.index in part.corrected, part.dropped_in(found.index)
                for manner in manners:
                    kind = source, manner, found.layout, len(groups), around, treated
                    if kind not in known:
                        builder = builders[found.name]
                        known[kind] = self._costs(
                            source, manner, found, builder, lengths, most_tokens
                        )
                    if known[kind]:
                        measured[found.index, manner] = known[kind]
        lookup = 0.0
        if look_up is not None and lengths:
            lookup = _seconds(lambda: look_up(lengths[len(lengths) // 2]), _nothing)
        return Costs(measured, lookup)

    def _costs(
        self,
        source: Source,
        manner: Manner,
        found: AttentionModule,
        builder: Any,
        lengths: Sequence[int],
        most_tokens: int,
    ) -> list[Cost]:
        costs: list[Cost] = []
        for length in lengths:
            served = self._served(source, manner, found, length)
            if served is None:
                continue
            hits = {0: Hit(source, {found.index: served})}
            run = partial(self._run, found, builder, length)
            exact, reused = run(1, {}), run(1, hits)
            if 2 * length <= most_tokens:
                parting = run(2, hits) - run(2, {}) + exact - reused
            else:
                parting = 2 * costs[-1].parting if costs else 0.0
            costs.append(Cost(length, exact, reused, max(0.0, parting)))
        return costs

    def _served(
        self, source: Source, manner: Manner, found: AttentionModule, length: int
    ) -> Served | None:
        """Maps like those that would serve a text of this length."""
        if source == "template":
            maps = self.templates.get(found.index, length)
            return None if maps is None else Served("template", maps)
        stored = self._map(found, length, self.plan.sources[source])
        if manner in ("neighbour", "own"):
            return Served(source, stored)
        window = found.layout.mask.window
        if window is not None and window < length:
            return None
        entry, tokens = np.arange(length, dtype=np.int32), np.arange(length, dtype=np.int32)
        if source == "prefix":
            tokens[int(length * PREFIX_SHARE) :] += length
        else:
            tokens[EDIT_EVERY // 2 :: EDIT_EVERY] += length
        return Served(source, stored, align(tokens, entry))

    def _map(self, found: AttentionModule, length: int, part: SourcePlan) -> AttentionMap:
        """A map of queries and keys that were drawn: about as peaked as real ones."""
        layout, size = found.layout, found.attention.head_size
        draw = torch.Generator().manual_seed(0)
        query = torch.randn(length, layout.num_heads, size, generator=draw)
        key = torch.randn(length, layout.num_kv_heads, size, generator=draw)
        drawn = (2 * query).bfloat16(), key.bfloat16()
        encoded = encode_attention(self.codec, *drawn, size**-0.5, layout.mask)
        stored = CODECS[self.codec].decode(encoded, layout, length, part.groups[found.index])
        return self.form(pruned(stored, part.dropped_in(found.index)))

    def _run(
        self,
        found: AttentionModule,
        builder: Any,
        length: int,
        count: int,
        hits: Mapping[int, Hit],
    ) -> float:
        """Seconds of the layer for ``count`` sequences, of which ``hits`` are served."""
        assert found.inputs is not None
        parameter: torch.Tensor = next(found.module.parameters())
        device, config = parameter.device, self.vllm_config.model_config
        hidden = torch.randn(count * length, config.get_hidden_size(), device=device).to(
            config.dtype
        )
        given = {found.inputs.hidden: hidden}
        if found.inputs.positions is not None:
            given[found.inputs.positions] = torch.arange(length, device=device).repeat(count)
        metadata = compat.metadata_of_prompts(builder, count, length, device)
        step = Step(
            [Prompt(row, row * length, length) for row in range(count)],
            None,
            math.inf,
            lambda *asked: Decision(hits, {}),
            lambda layer, served: served,
        )
        with (
            compat.forward_of_layer(self.vllm_config, found.name, metadata),
            self.pretending(step),
        ):
            return _seconds(lambda: found.module.forward(**given), _synchronize(device))


def _seconds(run: Callable[[], object], synchronize: Callable[[], None]) -> float:
    run()
    taken = []
    for _ in range(REPEATS):
        synchronize()
        started = time.perf_counter()
        run()
        synchronize()
        taken.append(time.perf_counter() - started)
        if sum(taken) > ENOUGH_SECONDS:
            break
    return median(taken)


def _nothing() -> None:
    return None


def _synchronize(device: torch.device) -> Callable[[], None]:
    return torch.cuda.synchronize if device.type == "cuda" else _nothing
