# SPDX-License-Identifier: Apache-2.0
"""What of an engine, and of each layer, a hit can skip, and why not more.

What the shape of a module cannot tell is checked when maps are recorded: each layer must then give
its own answer from its own map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from attncache_vllm.engine import compat
from attncache_vllm.engine.modules import AttentionModule

if TYPE_CHECKING:
    from vllm.config import VllmConfig

NO_LAYER = "no attention layer with queries and keys of its own was found"


def why_engine_bypassed(
    vllm_config: VllmConfig, *, reuse_with_prefix_caching: bool = False
) -> str | None:
    """The reason why no layer of this engine can reuse maps; None when layers can."""
    parallel = vllm_config.parallel_config
    may_part_prompts = vllm_config.scheduler_config.enable_chunked_prefill
    if vllm_config.model_config.runner_type != "pooling":
        return "generation runner: start with --runner pooling"
    if vllm_config.model_config.use_mla:
        return "multi-head latent attention"
    if compat.captures_ops(vllm_config):
        return "CUDA graphs that are not split at the plugin's ops"
    if vllm_config.cache_config.enable_prefix_caching:
        may_part_prompts = True
        if not reuse_with_prefix_caching:
            return (
                "prefix caching: start with --no-enable-prefix-caching or set "
                "reuse_with_prefix_caching"
            )
    if may_part_prompts and vllm_config.use_v2_model_runner:
        return "model runner V2 with chunked prefill or prefix caching"
    if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
        return "tensor or pipeline parallelism"
    if vllm_config.lora_config is not None:
        return "LoRA adapters"
    if vllm_config.attention_config.backend_per_kind:
        return "another attention backend for some kinds of layers"
    if vllm_config.model_config.is_encoder_decoder:
        return "encoder-decoder model"
    return None


@dataclass(frozen=True)
class Reach:
    """How much of a layer a hit skips.

    Attributes:
        skips: "module" is everything but the V rows, the product with the map and the output
            projection; "scores" is QK^T and softmax; "nothing" is that it cannot reuse maps.
        reason: why it is not more; None for "module".
    """

    skips: Literal["module", "scores", "nothing"]
    reason: str | None = None


def reach_of(found: AttentionModule, vllm_config: VllmConfig) -> Reach:
    """How much of this layer a hit skips in this engine."""
    if (reason := _why_not(found, vllm_config)) is not None:
        return Reach("nothing", reason)
    if (reason := _why_scores_only(found, vllm_config)) is not None:
        return Reach("scores", reason)
    return Reach("module")


def reaches_of(
    modules: Sequence[AttentionModule], vllm_config: VllmConfig, num_layers: int
) -> list[Reach]:
    """How much of each layer of the model a hit skips, were the engine not bypassed."""
    by_index = {found.index: reach_of(found, vllm_config) for found in modules}
    return [by_index.get(index, Reach("nothing", NO_LAYER)) for index in range(num_layers)]


def _why_not(found: AttentionModule, vllm_config: VllmConfig) -> str | None:
    from vllm.model_executor.layers.attention import Attention, EncoderOnlyAttention
    from vllm.v1.attention.backend import AttentionType

    attention = found.attention
    if type(attention) not in (Attention, EncoderOnlyAttention):
        return f"attention of the kind {type(attention).__name__}"
    if attention.attn_type not in (AttentionType.DECODER, AttentionType.ENCODER_ONLY):
        return f"attention of the type {AttentionType(attention.attn_type).value}"
    # A model may choose a layer's backend itself. (Not selected: a diagnosis, nothing is hooked.)
    ours = getattr(attention.impl, "asks_treatment", False)
    if compat.is_selected(vllm_config) and not ours:
        return "another attention backend"
    if getattr(attention.impl, "alibi_slopes", None) is not None:
        return "ALiBi"
    if attention.has_sink:
        return "attention sinks"
    if attention.use_mm_prefix:
        return "bidirectional attention inside a causal sequence"
    if attention.query_quant is not None:
        return "quantized queries"
    if attention.kv_sharing_target_layer_name is not None:
        return "keys and values of another layer"
    if attention.head_size_v != attention.head_size:
        return "value heads of another size"
    writes = attention.attn_backend.forward_includes_kv_cache_update
    if writes and _who_reads(found, vllm_config) is not None:
        return "the backend writes keys and values in the same call as attention"
    return None


def _who_reads(found: AttentionModule, vllm_config: VllmConfig) -> str | None:
    """Why keys and values of this layer are needed beyond its own attention in this step."""
    from vllm.v1.attention.backend import AttentionType

    if found.attention.attn_type != AttentionType.DECODER:
        return None
    if vllm_config.cache_config.enable_prefix_caching:
        return "keys and values are kept for requests with the same prefix"
    if found.read_by_others:
        return "another layer reads these keys and values"
    return None


def _why_scores_only(found: AttentionModule, vllm_config: VllmConfig) -> str | None:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    attention, inputs = found.attention, found.inputs
    hidden_size = vllm_config.model_config.get_hidden_size()
    heads_size = attention.num_heads * attention.head_size
    if (reader := _who_reads(found, vllm_config)) is not None:
        return reader
    if inputs is None or inputs.others:
        return "attention module takes other inputs than hidden states and positions"
    if (unknown := found.unknown_children()) != []:
        return f"unknown part of the attention module: {', '.join(unknown)}"
    if found.qkv_proj is None:
        return "no common projection to queries, keys and values"
    if not isinstance(found.qkv_proj.quant_method, UnquantizedLinearMethod):
        return "quantized weights"
    rows = (attention.num_heads + 2 * attention.num_kv_heads) * attention.head_size
    if tuple(found.qkv_proj.weight.shape) != (rows, hidden_size):
        return "projection of another shape than queries, keys and values"
    output = found.output_proj
    answer = (heads_size, heads_size) if output is None else (output.input_size, output.output_size)
    if answer != (heads_size, hidden_size):
        return "attention module's output of another shape than its input"
    return None
