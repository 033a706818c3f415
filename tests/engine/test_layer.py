# SPDX-License-Identifier: Apache-2.0
"""One attention module with reuse, without an engine: the module, its vLLM-like ``Attention`` and
the batches are stand-ins; forward context, metadata and everything of ours are the real ones.

Tolerance: map, values, heads and output are each rounded to bfloat16, by at most 2^-9 of their
size. A wrong row, map or position is off by the order of 1.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from concurrent.futures import Future
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batches import SLOT_OF_FIRST_TOKEN, batch
from torch import Tensor, nn
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.v1.attention.backend import AttentionType

from attncache_vllm.engine import compat
from attncache_vllm.engine.layer import (
    AttentionModule,
    ReuseAttention,
    ValueProjection,
    why_not_reusable,
)
from attncache_vllm.engine.metrics import Outcomes
from attncache_vllm.engine.step import Hit, Sequence, Step
from attncache_vllm.reuse.apply import RowBlocks, exact_causal_probs
from attncache_vllm.reuse.codec import decode_causal, encode_causal
from attncache_vllm.reuse.match import Match
from attncache_vllm.reuse.plan import Plan

NAME = "model.layers.1.self_attn.attn"
HEADS, KV_HEADS, HEAD_SIZE, HIDDEN = 6, 2, 16, 48
SCALE = HEAD_SIZE**-0.5
PLAN = Plan.reusing(2, (1,), max_distance=0.5)
TOLERANCE = 4 * 2**-9


# -- a model of one attention module -----------------------------------------------------------


class Projection(nn.Module):
    """A linear layer as vLLM's are called: the output comes with a bias that is not used."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.randn(height, width) / width**0.5).bfloat16())
        self.bias = nn.Parameter((torch.randn(height) / 4).bfloat16())
        self.output_size = height
        self.quant_method = UnquantizedLinearMethod()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight, self.bias), None


class Attention(nn.Module):
    """Exact causal attention over the sequences of the metadata that is in force."""

    num_heads, num_kv_heads, head_size, head_size_v = HEADS, KV_HEADS, HEAD_SIZE, HEAD_SIZE
    layer_name = NAME
    attn_type = AttentionType.DECODER
    sliding_window = kv_sharing_target_layer_name = None
    has_sink = False

    def __init__(self) -> None:
        super().__init__()
        self.impl = SimpleNamespace(alibi_slopes=None, logits_soft_cap=0.0)
        self.slots_written: list[int] = []

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        common = compat.layer_metadata(NAME).common
        self.slots_written = compat.forward_context().slot_mapping[NAME].tolist()
        out = torch.zeros_like(query)
        starts = common.query_start_loc_cpu.tolist()
        for start, stop in pairwise(starts):
            if stop > start:
                own = slice(start, stop)
                probs = exact_causal_probs(query[own], key[own], SCALE)
                shared = value[own].float().repeat_interleave(HEADS // KV_HEADS, dim=1)
                out[own] = torch.einsum("hij,jhd->ihd", probs, shared).to(out.dtype)
        return out


class LlamaAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = Projection(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_SIZE)
        self.o_proj = Projection(HEADS * HEAD_SIZE, HIDDEN)
        self.attn = Attention()
        self.tokens_computed = 0

    def qkv(self, positions: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv_proj(hidden_states)[0].view(-1, HEADS + 2 * KV_HEADS, HEAD_SIZE)
        query, key, value = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        return 3 * rotated(query, positions), rotated(key, positions), value

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        self.tokens_computed += len(hidden_states)
        heads = self.attn(*self.qkv(positions, hidden_states))
        output: Tensor = self.o_proj(heads.flatten(1))[0]
        return output


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    half = HEAD_SIZE // 2
    angle = positions[:, None, None] * 10.0 ** -torch.linspace(0, 3, half)
    a, b = x.float().split(half, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


@pytest.fixture
def module() -> LlamaAttention:
    torch.manual_seed(0)
    return LlamaAttention().requires_grad_(False)


def found_as(module: nn.Module) -> AttentionModule:
    return AttentionModule(1, NAME, module)


# -- texts, their maps, and steps of them ------------------------------------------------------


def text(seed: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, HIDDEN, generator=generator).bfloat16()


def own_maps(module: LlamaAttention, hidden_states: Tensor) -> RowBlocks:
    length = len(hidden_states)
    query, key, _ = module.qkv(torch.arange(length), hidden_states)
    payload = encode_causal(exact_causal_probs(query, key, SCALE))
    return decode_causal(payload, HEADS, KV_HEADS, length)


def run(forward: Callable[..., Tensor], texts: list[Tensor], padding: int = 0) -> Tensor:
    """``forward`` of the whole batch in a forward context as vLLM sets one up."""
    metadata = batch([len(rows) for rows in texts])
    common = metadata.common
    context = ForwardContext(
        no_compile_layers={},
        attn_metadata={NAME: metadata},
        slot_mapping={NAME: common.slot_mapping},
    )
    hidden_states = torch.cat([*texts, torch.full((padding, HIDDEN), 7.0).bfloat16()])
    positions = torch.cat([common.positions, torch.zeros(padding, dtype=torch.long)])
    with override_forward_context(context):
        return forward(positions=positions, hidden_states=hidden_states)


def reusing(module: LlamaAttention, texts: list[Tensor], maps: dict[int, RowBlocks]) -> Any:
    """Reuse around ``module`` in a step in which the rows of ``maps`` are hits."""
    lookup: Future[list[Hit | None]] = Future()
    hits: list[Hit | None] = [None] * len(texts)
    for row, own in maps.items():
        hits[row] = Hit(Match(row, 0.0, len(texts[row]), own.length), {1: own})
    lookup.set_result(hits)
    sequences = [Sequence(row, 0, len(rows)) for row, rows in enumerate(texts)]
    step = Step(PLAN, sequences, lookup, math.inf, Outcomes(math.inf))
    return ReuseAttention(found_as(module), SimpleNamespace(current=lambda: step))


def exact_alone(module: LlamaAttention, rows: Tensor) -> Tensor:
    return run(module.forward, [rows])


def assert_same_answer(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert difference <= TOLERANCE


# -- answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 33, 64, 65, 128, 131])
def test_a_sequences_own_map_gives_its_own_answer(module: LlamaAttention, length: int) -> None:
    rows = text(length, length)
    expected = exact_alone(module, rows)
    reuse = reusing(module, [rows], {0: own_maps(module, rows)})
    module.tokens_computed = 0
    assert_same_answer(run(reuse.forward, [rows]), expected)
    assert module.tokens_computed == 0


def test_another_texts_map_gives_another_answer(module: LlamaAttention) -> None:
    # Guards the tests here: the map decides, and the tolerance tells.
    rows, other = text(1, 65), text(2, 65)
    reuse = reusing(module, [rows], {0: own_maps(module, other)})
    expected = exact_alone(module, rows)
    with pytest.raises(AssertionError):
        assert_same_answer(run(reuse.forward, [rows]), expected)


def test_the_map_of_a_longer_text_serves_its_beginning(module: LlamaAttention) -> None:
    longer = text(3, 140)
    for length in (1, 50, 70, 139):
        rows = longer[:length]
        reuse = reusing(module, [rows], {0: own_maps(module, longer)})
        assert_same_answer(run(reuse.forward, [rows]), exact_alone(module, rows))


@pytest.mark.parametrize("seed", range(8))
def test_hits_and_misses_of_a_step_answer_as_each_alone_in_any_order(
    module: LlamaAttention, seed: int
) -> None:
    draw = random.Random(seed)
    lengths = [1, 1, 2, 17, 40, 64, 65, 130]
    draw.shuffle(lengths)
    texts = [text(100 * seed + row, length) for row, length in enumerate(lengths)]
    hit_rows = sorted(draw.sample(range(len(texts)), draw.randint(1, len(texts) - 1)))
    maps = {row: own_maps(module, texts[row]) for row in hit_rows}
    expected = [exact_alone(module, rows) for rows in texts]
    module.tokens_computed = 0
    together = run(reusing(module, texts, maps).forward, texts)
    for answer, alone in zip(together.split(lengths), expected, strict=True):
        assert_same_answer(answer, alone)
    missed = [row for row in range(len(texts)) if row not in hit_rows]
    assert module.tokens_computed == sum(lengths[row] for row in missed)
    # Misses write to the slots of their own tokens, in their places of the batch.
    starts = [sum(lengths[:row]) for row in range(len(texts))]
    assert module.attn.slots_written == [
        SLOT_OF_FIRST_TOKEN + starts[row] + token for row in missed for token in range(lengths[row])
    ]


def test_tokens_behind_the_batch_are_answered_with_zeros(module: LlamaAttention) -> None:
    texts = [text(1, 20), text(2, 30)]
    for hit_rows in ([0], [1], [0, 1]):
        maps = {row: own_maps(module, texts[row]) for row in hit_rows}
        together = run(reusing(module, texts, maps).forward, texts, padding=6)
        assert len(together) == 56
        assert not together[50:].any()
        for answer, rows in zip(together[:50].split([20, 30]), texts, strict=True):
            assert_same_answer(answer, exact_alone(module, rows))


def test_without_hits_the_module_runs_on_the_whole_batch_untouched(module: LlamaAttention) -> None:
    texts = [text(1, 20), text(2, 30)]
    expected = run(module.forward, texts)
    assert torch.equal(run(reusing(module, texts, {}).forward, texts), expected)
    no_step = ReuseAttention(found_as(module), SimpleNamespace(current=lambda: None))
    assert torch.equal(run(no_step.forward, texts), expected)


def test_value_rows_outlive_the_repacking_of_the_weights(module: LlamaAttention) -> None:
    rows = text(1, 20)
    expected = module.qkv(torch.arange(20), rows)[2]
    projection = ValueProjection(found_as(module))
    module.qkv_proj.weight.data.zero_()
    module.qkv_proj.bias.data.zero_()
    torch.testing.assert_close(projection(rows), expected)


def test_value_rows_of_a_projection_without_bias(module: LlamaAttention) -> None:
    module.qkv_proj.bias = None
    rows = text(1, 20)
    expected = module.qkv(torch.arange(20), rows)[2]
    torch.testing.assert_close(ValueProjection(found_as(module))(rows), expected)


# -- which modules can be answered for ---------------------------------------------------------


def test_a_module_of_the_known_shape_is_reusable(module: LlamaAttention) -> None:
    module.rotary_emb, module.q_norm, module.k_norm = (nn.Identity() for _ in range(3))
    assert why_not_reusable(found_as(module), HIDDEN) is None


def set_on(path: str, value: object) -> Callable[[LlamaAttention], None]:
    *owners, name = path.split(".")

    def change(module: LlamaAttention) -> None:
        owner: Any = module
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, name, value)

    return change


def take_mask(module: LlamaAttention) -> None:
    def forward(positions: Tensor, hidden_states: Tensor, mask: Tensor) -> Tensor:
        return hidden_states

    module.forward = forward  # type: ignore[method-assign]


def without_output_projection(module: LlamaAttention) -> None:
    del module.o_proj


def with_gate_in_qkv(module: LlamaAttention) -> None:
    module.qkv_proj = Projection(HIDDEN, (2 * HEADS + 2 * KV_HEADS) * HEAD_SIZE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_on("gate", nn.Identity()), "unknown part of the attention module: gate"),
        (take_mask, "other inputs than positions and hidden_states"),
        (without_output_projection, "no output projection"),
        (set_on("attn.attn_type", AttentionType.ENCODER_ONLY), "bidirectional attention"),
        (set_on("attn.sliding_window", 128), "sliding window"),
        (set_on("attn.impl.alibi_slopes", [0.5]), "ALiBi"),
        (set_on("attn.impl.logits_soft_cap", 50.0), "logits soft cap"),
        (set_on("attn.has_sink", True), "attention sinks"),
        (set_on("attn.kv_sharing_target_layer_name", "model.layers.0"), "KV cache shared"),
        (set_on("attn.head_size_v", HEAD_SIZE // 2), "value heads of another size"),
        (set_on("qkv_proj.quant_method", object()), "quantized weights"),
        (with_gate_in_qkv, "qkv_proj of another shape"),
        (set_on("o_proj.output_size", HIDDEN // 2), "output projection of another size"),
    ],
)
def test_a_module_that_does_more_is_bypassed_with_the_reason(
    module: LlamaAttention, change: Callable[[LlamaAttention], None], reason: str
) -> None:
    change(module)
    found = why_not_reusable(found_as(module), HIDDEN)
    assert found is not None
    assert reason in found


def test_a_module_of_another_width_than_the_model_is_bypassed(module: LlamaAttention) -> None:
    assert why_not_reusable(found_as(module), 2 * HIDDEN) == (
        "qkv_proj of another shape than q, k and v"
    )
