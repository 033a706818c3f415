# SPDX-License-Identifier: Apache-2.0
"""Small models with random weights, one for each family of attention, made in about a second each.

Weights are seeded bf16. Matrices keep the variance of what they multiply; q and k are scaled so
that scores have a standard deviation of about :data:`SCORE_SPREAD`: attention is far from uniform,
differs clearly from text to text, and a wrong map changes the answer. The tokenizer is SmolLM2's.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import assets

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    Weights = dict[str, torch.Tensor]

SEED = 0
SCORE_SPREAD = 3.0
WINDOW = 32
# Columns of a 4-bit weight that share a scale.
GROUP = 32


@dataclass(frozen=True)
class SmallModel:
    """What a model is made from, and what of it matters to maps.

    Attributes:
        architecture: the name of its class in transformers.
        config: settings of its configuration, on top of common ones.
        causal: whether a token attends to earlier ones only.
        quantize: turns its weights into those of a quantized checkpoint, and gives the
            ``quantization_config`` of that.
        bypassed: the reason why none of its layers can reuse maps.
    """

    architecture: str
    config: dict[str, Any]
    causal: bool = True
    quantize: Callable[[Weights], tuple[Weights, dict[str, Any]]] | None = None
    bypassed: str | None = None


def make(name: str, folder: Path) -> Path:
    """Write the model ``name`` of :data:`MODELS` into ``folder``; returns ``folder``."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    kind = MODELS[name]
    model_class = getattr(transformers, kind.architecture)
    model = model_class(model_class.config_class(**{**_COMMON, **kind.config}))
    _fill(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    if kind.quantize is not None:
        weights, quantization = kind.quantize(load_file(folder / "model.safetensors"))
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({**config, "quantization_config": quantization})
        )
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(assets.ensure("smollm2") / file, folder)
    return folder


def _fill(model: PreTrainedModel) -> None:
    import torch

    generator = torch.Generator().manual_seed(SEED)
    for name, weight in model.named_parameters():
        values = torch.randn(weight.shape, generator=generator)
        if weight.dim() == 1:
            # Norms and biases are not trivial either; Gemma's norms multiply by 1 + weight.
            centre = weight.data.mean()
            if re.search(r"[qk]_norm", name):
                # q and k of unit variance give scores of unit variance.
                centre = SCORE_SPREAD**0.5 + centre - 1
            weight.data = centre + 0.1 * values
        elif "embed" in name:
            weight.data = values
            if re.search("position|token_type", name):
                weight.data *= 0.1  # texts share them
            if "gemma" in model.config.model_type:
                weight.data *= weight.shape[1] ** -0.5  # the model takes this out again
        else:
            weight.data = values * weight.shape[1] ** -0.5
            if "Wqkv" in name:
                weight.data[: 2 * len(weight) // 3] *= SCORE_SPREAD**0.5
            elif re.search(r"[qk]_proj|query|key", name):
                weight.data *= SCORE_SPREAD**0.5


def _quantized(
    method: str, weights: dict[str, Any], inputs: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": method,
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        },
    }


def _is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def _w8a8(weights: Weights) -> tuple[Weights, dict[str, Any]]:
    """int8 weights with a scale for each row, int8 inputs scaled for each token as they come."""
    import torch

    quantized = {}
    for name, weight in weights.items():
        if not _is_linear(name):
            quantized[name] = weight
            continue
        scale = weight.float().abs().amax(1, keepdim=True) / 127
        quantized[name] = (weight.float() / scale).round().to(torch.int8)
        quantized[f"{name}_scale"] = scale
    of_weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    of_inputs = {**of_weights, "strategy": "token", "dynamic": True}
    return quantized, _quantized("int-quantized", of_weights, of_inputs)


def _w4a16(weights: Weights) -> tuple[Weights, dict[str, Any]]:
    """4-bit weights, eight to an int32 along a row, with a scale for each :data:`GROUP` columns."""
    import torch

    quantized = {}
    for name, weight in weights.items():
        if not _is_linear(name):
            quantized[name] = weight
            continue
        rows, columns = weight.shape
        groups = weight.float().view(rows, -1, GROUP)
        scale = groups.abs().amax(2) / 7
        nibbles = (groups / scale[:, :, None]).round().long().view(rows, -1, 8) + 8
        packed = (nibbles << torch.arange(0, 32, 4)).sum(2)
        quantized[f"{name}_packed"] = packed.to(torch.int32)
        quantized[f"{name}_scale"] = scale.to(weight.dtype)
        quantized[f"{name}_shape"] = torch.tensor([rows, columns])
    of_weights = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": GROUP,
        "symmetric": True,
    }
    return quantized, _quantized("pack-quantized", of_weights, None)


_COMMON = {
    "vocab_size": 49152,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 2}
_TIED = {"tie_word_embeddings": True}
_GEMMA = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": WINDOW,
}
_GEMMA3 = {**_GEMMA, "num_hidden_layers": 6}  # a window in five of six

MODELS = {
    "llama": SmallModel("LlamaForCausalLM", {**_GROUPED, **_TIED}),
    "llama-w8a8": SmallModel("LlamaForCausalLM", {**_GROUPED, **_TIED}, quantize=_w8a8),
    "llama-w4a16": SmallModel("LlamaForCausalLM", {**_GROUPED, **_TIED}, quantize=_w4a16),
    "llama-bidirectional": SmallModel(
        "LlamaForCausalLM", {**_GROUPED, "is_causal": False}, causal=False
    ),
    "qwen2": SmallModel("Qwen2ForCausalLM", {**_GROUPED, "hidden_size": 256}),
    "qwen2-bidirectional": SmallModel(
        "Qwen2ForCausalLM", {"num_key_value_heads": 1, "is_causal": False}, causal=False
    ),
    "qwen3": SmallModel("Qwen3ForCausalLM", {**_GROUPED, **_TIED, "head_dim": 128}),
    "mistral": SmallModel(
        "MistralForCausalLM", {**_GROUPED, "head_dim": 64, "sliding_window": None}
    ),
    "mistral-window": SmallModel(
        "MistralForCausalLM", {**_GROUPED, "head_dim": 96, "sliding_window": WINDOW}
    ),
    # A cap as low as the spread of the scores; a window in every other layer.
    "gemma2": SmallModel("Gemma2ForCausalLM", {**_GEMMA, "attn_logit_softcapping": SCORE_SPREAD}),
    "gemma3": SmallModel("Gemma3ForCausalLM", _GEMMA3),
    "gemma3-bidirectional": SmallModel(
        "Gemma3TextModel", {**_GEMMA3, "use_bidirectional_attention": True}, causal=False
    ),
    "bert": SmallModel("BertModel", {}, causal=False),
    "gte": SmallModel("GteModel", {"position_embedding_type": "rope"}, causal=False),
    # A window in two of four layers.
    "modernbert": SmallModel(
        "ModernBertModel",
        {"local_attention": WINDOW, "cls_token_id": 1, "sep_token_id": 2},
        causal=False,
    ),
    "deepseek": SmallModel(
        "DeepseekV2ForCausalLM",
        {
            **_TIED,
            # The sizes that vLLM has a kernel for.
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "first_k_dense_replace": 4,
            "n_routed_experts": 4,
            "moe_intermediate_size": 64,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
        },
        bypassed="multi-head latent attention",
    ),
}
