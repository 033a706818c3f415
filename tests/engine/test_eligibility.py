# SPDX-License-Identifier: Apache-2.0
"""What a hit can skip in an engine and in a layer: one reason for each thing in its way."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_samples import (
    QKV,
    BertAttention,
    Decoder,
    LlamaAttention,
    ModernAttention,
    Shape,
    make_config,
    make_model,
    make_module,
)
from batches import StandardBackend, StandardImpl
from torch import Tensor, nn
from vllm.config import CUDAGraphMode
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention
from vllm.v1.attention.backend import AttentionType

from attncache_vllm.engine.compat.selection import OPS
from attncache_vllm.engine.eligibility import (
    NO_LAYER,
    Reach,
    reach_of,
    reaches_of,
    why_engine_bypassed,
)
from attncache_vllm.engine.modules import AttentionModule, find_attention_modules

PREFIXES = {"cache_config__enable_prefix_caching": True}
CHUNKS = {"scheduler_config__enable_chunked_prefill": True}
V2 = {"use_v2_model_runner": True}
GRAPHS = {"compilation_config__cudagraph_mode": CUDAGraphMode.PIECEWISE}


# -- engines -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, CHUNKS, V2, GRAPHS | {"compilation_config__splitting_ops": ["vllm::attention", *OPS]}],
    ids=["plain", "chunked prefill", "V2", "split graphs"],
)
def test_an_engine_that_only_prefills_is_not_bypassed(changes: dict[str, Any]) -> None:
    assert why_engine_bypassed(make_config(**changes)) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"model_config__runner_type": "generate"},
            "generation runner: start with --runner pooling",
        ),
        ({"model_config__use_mla": True}, "multi-head latent attention"),
        (GRAPHS, "CUDA graphs that are not split at the plugin's ops"),
        (
            GRAPHS | {"compilation_config__splitting_ops": ["vllm::attncache_attention"]},
            "CUDA graphs that are not split at the plugin's ops",
        ),
        (
            PREFIXES,
            "prefix caching: start with --no-enable-prefix-caching or set "
            "reuse_with_prefix_caching",
        ),
        (CHUNKS | V2, "model runner V2 with chunked prefill or prefix caching"),
        (
            {"parallel_config__tensor_parallel_size": 2},
            "tensor or pipeline parallelism",
        ),
        (
            {"parallel_config__pipeline_parallel_size": 2},
            "tensor or pipeline parallelism",
        ),
        ({"lora_config": object()}, "LoRA adapters"),
        (
            {"attention_config__backend_per_kind": {"sliding_window": "CPU_ATTN"}},
            "another attention backend for some kinds of layers",
        ),
        ({"model_config__is_encoder_decoder": True}, "encoder-decoder model"),
    ],
)
def test_an_engine_is_bypassed_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    assert why_engine_bypassed(make_config(**changes)) == reason


def test_an_engine_that_caches_prefixes_reuses_maps_where_the_user_asks_for_it() -> None:
    assert why_engine_bypassed(make_config(**PREFIXES), reuse_with_prefix_caching=True) is None
    # Unless nobody tells how long the prompts are.
    assert why_engine_bypassed(make_config(**PREFIXES, **V2), reuse_with_prefix_caching=True) == (
        "model runner V2 with chunked prefill or prefix caching"
    )


# -- layers ------------------------------------------------------------------------------------


def reach(module: nn.Module, **changes: Any) -> Reach:
    (found,) = find_attention_modules(Decoder([module]))
    return reach_of(found, make_config(**changes))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (LlamaAttention, Shape()),
        (LlamaAttention, Shape(kv_heads=1, window=8)),
        (LlamaAttention, Shape(causal=False)),
        (ModernAttention, Shape(causal=False, window=8)),
        (BertAttention, Shape(heads=3, kv_heads=3, causal=False, output_proj=False)),
    ],
)
def test_of_a_plain_module_a_hit_skips_all_it_can(kind: type[LlamaAttention], shape: Shape) -> None:
    assert reach(make_module(kind, shape)) == Reach("module")


def test_norms_of_queries_and_keys_do_not_stand_in_the_way() -> None:
    module = make_module()
    module.rotary_emb, module.q_norm, module.k_norm = (nn.Identity() for _ in range(3))
    assert reach(module) == Reach("module")


def test_soft_capped_scores_do_not_stand_in_the_way() -> None:
    module = make_module()
    module.attn.impl.logits_soft_cap = 50.0
    assert reach(module) == Reach("module")


def set_on(path: str, value: object) -> Callable[[Any], None]:
    *owners, name = path.split(".")

    def change(module: Any) -> None:
        for part in owners:
            module = getattr(module, part)
        setattr(module, name, value)

    return change


class OtherAttention(Attention):
    """One of another kind, as vLLM's for static sinks or prefix language models."""


def of_class(kind: type[Attention]) -> Callable[[Any], None]:
    def change(module: Any) -> None:
        module.attn.__class__ = kind

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (of_class(ChunkedLocalAttention), "attention of the kind ChunkedLocalAttention"),
        (of_class(OtherAttention), "attention of the kind OtherAttention"),
        (set_on("attn.attn_type", AttentionType.ENCODER), "attention of the type encoder"),
        (
            set_on("attn.attn_type", AttentionType.ENCODER_DECODER),
            "attention of the type encoder_decoder",
        ),
        (set_on("attn.attn_type", "encoder_decoder"), "attention of the type encoder_decoder"),
        (set_on("attn.impl.alibi_slopes", torch.ones(6)), "ALiBi"),
        (set_on("attn.has_sink", True), "attention sinks"),
        (set_on("attn.use_mm_prefix", True), "bidirectional attention inside a causal sequence"),
        (set_on("attn.query_quant", nn.Identity()), "quantized queries"),
        (
            set_on("attn.kv_sharing_target_layer_name", "model.layers.0.self_attn.attn"),
            "keys and values of another layer",
        ),
        (set_on("attn.head_size_v", Shape.head_size // 2), "value heads of another size"),
    ],
)
def test_a_layer_whose_map_is_not_its_own_or_not_all_of_it_cannot_reuse(
    change: Callable[[Any], None], reason: str
) -> None:
    module = make_module()
    change(module)
    assert reach(module) == Reach("nothing", reason)


def test_a_layer_that_another_backend_attends_to_cannot_reuse() -> None:
    module = make_module()
    module.attn.impl = StandardImpl(Shape.head_size**-0.5, module.attn.attn_type, None)
    assert reach(module) == Reach("nothing", "another attention backend")
    # Where ours is not selected all layers have another: what is told is how ours would treat them.
    for selected in (None, SimpleNamespace(name="CPU_ATTN")):
        assert reach(module, attention_config__backend=selected) == Reach("module")


def take_mask(module: Any) -> None:
    def forward(positions: Tensor, hidden_states: Tensor, mask: Tensor) -> Tensor:
        return hidden_states

    module.forward = forward


def take_states(module: Any) -> None:
    module.forward = lambda states: states


def split_projection(module: Any) -> None:
    del module.qkv_proj
    module.k_norm = QKV(48, 16, torch.float32)
    module.q_norm = QKV(48, 16, torch.float32)


def pack_weights(module: Any) -> None:
    # Formats with packed weights have no `weight` at all.
    module.qkv_proj.quant_method = object()
    del module.qkv_proj.weight


def widen_projection(module: Any) -> None:
    module.qkv_proj = QKV(Shape.hidden, 2 * 6 * 16 + 2 * 2 * 16, torch.float32)


def drop_projection(module: Any) -> None:
    del module.o_proj


OTHER_INPUTS = "attention module takes other inputs than hidden states and positions"
OTHER_OUTPUT = "attention module's output of another shape than its input"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (take_mask, OTHER_INPUTS),
        (take_states, OTHER_INPUTS),
        (set_on("gate", nn.Identity()), "unknown part of the attention module: gate"),
        (split_projection, "no common projection to queries, keys and values"),
        (set_on("qkv_proj.quant_method", object()), "quantized weights"),
        (pack_weights, "quantized weights"),
        (widen_projection, "projection of another shape than queries, keys and values"),
        (set_on("o_proj.output_size", Shape.hidden // 2), OTHER_OUTPUT),
        (set_on("o_proj.input_size", Shape.hidden), OTHER_OUTPUT),
        (drop_projection, OTHER_OUTPUT),
    ],
)
def test_a_module_that_does_more_is_computed_but_for_its_scores(
    change: Callable[[Any], None], reason: str
) -> None:
    module = make_module()
    change(module)
    assert reach(module) == Reach("scores", reason)


def test_a_model_of_another_width_than_the_projection_is_computed_but_for_the_scores() -> None:
    assert reach(make_module(), model_config__get_hidden_size=lambda: 2 * Shape.hidden) == Reach(
        "scores", "projection of another shape than queries, keys and values"
    )


def test_keys_and_values_that_others_will_read_are_computed() -> None:
    assert reach(make_module(), **PREFIXES) == Reach(
        "scores", "keys and values are kept for requests with the same prefix"
    )
    model = make_model(2)
    model.model.layers[
        1
    ].self_attn.attn.kv_sharing_target_layer_name = "model.layers.0.self_attn.attn"
    assert reaches_of(find_attention_modules(model), make_config(), 2) == [
        Reach("scores", "another layer reads these keys and values"),
        Reach("nothing", "keys and values of another layer"),
    ]


def test_a_bidirectional_layer_keeps_no_keys_and_values() -> None:
    assert reach(make_module(shape=Shape(causal=False)), **PREFIXES) == Reach("module")


class WritingBackend(StandardBackend):
    """Writes keys and values while it attends: what skips its call does not write them."""

    forward_includes_kv_cache_update = True


WRITES = Reach("nothing", "the backend writes keys and values in the same call as attention")


def test_keys_and_values_that_only_attention_writes_keep_it_from_being_skipped() -> None:
    module = make_module()
    module.attn.attn_backend = WritingBackend
    assert reach(module, **PREFIXES) == WRITES
    model = make_model(2)
    first, second = (layer.self_attn.attn for layer in model.model.layers)
    first.attn_backend = WritingBackend
    second.kv_sharing_target_layer_name = first.layer_name
    assert reaches_of(find_attention_modules(model), make_config(), 2)[0] == WRITES


@pytest.mark.parametrize(
    ("shape", "changes"), [(Shape(), {}), (Shape(), CHUNKS), (Shape(causal=False), PREFIXES)]
)
def test_keys_and_values_that_nobody_will_read_need_not_be_written(
    shape: Shape, changes: dict[str, Any]
) -> None:
    module = make_module(shape=shape)
    module.attn.attn_backend = WritingBackend
    assert reach(module, **changes) == Reach("module")
    module.gate = nn.Identity()
    assert reach(module, **changes).skips == "scores"


def test_layers_without_attention_of_their_own_reach_nothing() -> None:
    found: list[AttentionModule] = find_attention_modules(make_model(3))
    assert reaches_of([found[2], found[0]], make_config(), 4) == [
        Reach("module"),
        Reach("nothing", NO_LAYER),
        Reach("module"),
        Reach("nothing", NO_LAYER),
    ]
