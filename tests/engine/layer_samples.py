# SPDX-License-Identifier: Apache-2.0
"""One attention module with reuse, without an engine, and steps of its texts.

Projections and the standard backend are stand-ins; vLLM's ``Attention`` and forward context and
everything of ours are the real ones. Tolerance: maps, and in the bfloat16 family values, heads and
answers, are each rounded to bfloat16, by at most 2^-9 of their size. A wrong row, map or position
is off by the order of 1.
"""

from __future__ import annotations

import math
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_samples import (
    BertAttention,
    Decoder,
    LlamaAttention,
    ModernAttention,
    Row,
    Shape,
    run,
    whole,
)
from torch import Tensor

from attncache_vllm.engine import ops
from attncache_vllm.engine.layer import ReuseModule, ReuseScores
from attncache_vllm.engine.modules import AttentionModule, find_attention_modules
from attncache_vllm.engine.step import Decision, Hit, Sequence, Served, Step
from attncache_vllm.reuse.apply import exact_map
from attncache_vllm.reuse.codec import decode_map, encode_map
from attncache_vllm.reuse.correct import Correction
from attncache_vllm.reuse.maps import RowBlocks
from attncache_vllm.reuse.plan import Source

LAYER = 1
TOLERANCE = 4 * 2**-9
TREATMENTS = ("module", "scores")
CAUSAL = {
    "causal": (LlamaAttention, Shape()),
    "bfloat16": (LlamaAttention, Shape(dtype=torch.bfloat16)),
    "multi-query, window": (ModernAttention, Shape(heads=3, kv_heads=1, head_size=32, window=24)),
    "no output projection": (BertAttention, Shape(heads=3, kv_heads=3, output_proj=False)),
}

BIDIRECTIONAL = {
    "bidirectional": (LlamaAttention, Shape(causal=False)),
    "bidirectional, window": (ModernAttention, Shape(causal=False, kv_heads=6, window=9)),
    "BERT": (BertAttention, Shape(heads=3, kv_heads=3, causal=False, output_proj=False)),
}

FAMILIES = CAUSAL | BIDIRECTIONAL
each_family = pytest.mark.parametrize("family", FAMILIES)
each_treatment = pytest.mark.parametrize("treatment", TREATMENTS)


class Steps:
    """Where the layer looks for its step, none until there is one, and reports canaries."""

    step: Step | None = None

    def __init__(self) -> None:
        self.compared: list[SimpleNamespace] = []

    def current(self) -> Step | None:
        return self.step

    def compare(self, layer: int, served: Served, reused: Tensor, exact: Tensor) -> None:
        assert layer == LAYER
        self.compared.append(SimpleNamespace(served=served, reused=reused, exact=exact.clone()))


Corrections = dict[Source, Correction]


def found_in(module: Any) -> AttentionModule:
    model = Decoder([torch.nn.Identity(), module], hidden=module.shape.hidden)
    (found,) = find_attention_modules(model)
    return found


Groups = dict[Source, tuple[int, ...]]


def treated(
    module: Any,
    treatment: str,
    corrections: Corrections | None = None,
    groups: Groups | None = None,
) -> Steps:
    """Put the treatment in its place, as at start: always inside, if wanted around as well."""
    found, steps = found_in(module), Steps()
    found.attention.attncache_scores = ReuseScores(found, steps, corrections or {})
    every = tuple(range(module.shape.kv_heads))
    groups = {"neighbour": every, "template": every, **(groups or {})}
    if treatment == "module":
        ops.replace_forward(found, ReuseModule(found, steps, corrections or {}, groups))
    return steps


def heads_of(module: Any, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    positions = None if isinstance(module, BertAttention) else torch.arange(len(rows))
    return module.heads(rows, positions)  # type: ignore[no-any-return]


def own_map(module: Any, rows: Tensor, groups: tuple[int, ...] | None = None) -> RowBlocks:
    query, key, _ = heads_of(module, rows)
    layout = found_in(module).layout
    probs, lse = exact_map(query, key, module.attn.impl.scale, layout.mask)
    return decode_map(encode_map(probs, lse, layout.mask), layout, len(rows), groups)


def step_with(
    rows: list[Row],
    maps: dict[int, RowBlocks | Served],
    canaries: tuple[int, ...] = (),
) -> Step:
    """A step in which the rows of ``maps`` are hits, those in ``canaries`` canaries, and all others
    were looked up in vain."""
    hits = {
        index: Hit(item.source, {LAYER: item})
        for index, item in (
            (index, item if isinstance(item, Served) else Served("neighbour", item))
            for index, item in maps.items()
        )
    }
    decision = Decision(
        {index: hit for index, hit in hits.items() if index not in canaries},
        {index: hit for index, hit in hits.items() if index in canaries},
    )
    lookup: Future[list[Hit | None]] = Future()
    lookup.set_result([hits.get(index) for index in range(len(rows))])
    sequences = [Sequence(index, 0, row.stop) for index, row in enumerate(rows)]
    return Step(sequences, lookup, math.inf, lambda *asked: decision, lambda layer, served: served)


def alone(module: Any, rows: Tensor) -> Tensor:
    return run(module, [whole(rows)])


def forget(module: Any) -> None:
    """Everything computed so far, keys and values included."""
    module.qkv.tokens_computed = 0
    module.attn.kv_cache.zero_()
    module.attn.impl.slots_written.clear()
    module.attn.impl.calls.clear()


def difference(actual: Tensor, expected: Tensor) -> float:
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
