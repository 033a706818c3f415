# SPDX-License-Identifier: Apache-2.0
"""What makes maps of two engines comparable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch

from attncache_vllm.engine.modules import AttentionModule
from attncache_vllm.store.protocol import Namespace

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SAMPLES_PER_TENSOR = 1024
# Keys of a model's configuration that change its maps without changing its weights.
ATTENTION_KEYS = (
    "is_causal",
    "use_bidirectional_attention",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "attention_multiplier",
)


def namespace_of(vllm_config: VllmConfig, weights: str) -> Namespace:
    """The engine's namespace; ``weights`` is :func:`weights_fingerprint`, known once loaded."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    text_config = model.hf_text_config
    return Namespace(
        model=model.model,
        weights=weights,
        architecture=model.architecture,
        dtype=str(model.dtype).removeprefix("torch."),
        attention=_canonical(
            {
                "type": str(model.attn_type),
                **{key: getattr(text_config, key, None) for key in ATTENTION_KEYS},
            }
        ),
        num_layers=text_config.num_hidden_layers,
        num_heads=model.get_num_attention_heads(parallel),
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_size=model.get_head_size(),
        rope=_canonical(getattr(text_config, "rope_parameters", None)),
        tensor_parallel=f"{parallel.rank}/{parallel.tensor_parallel_size}",
    )


def weights_fingerprint(model: torch.nn.Module, modules: Sequence[AttentionModule]) -> str:
    """SHA-256 over name, shape and dtype of every parameter that maps depend on, and evenly spread
    samples of it.

    Those are the layers and the embeddings, but no heads or poolers: one store serves a model
    whether it embeds or classifies. Up to 1,024 values per parameter are read: a fine-tuned or
    differently quantized copy of a model differs in nearly all of them, and a model of any size
    takes well under a second.
    """
    digest = hashlib.sha256()
    for part in (_layers(model, modules), *_embeddings(model)):
        for name, parameter in part.named_parameters():
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            flat = parameter.detach().reshape(-1)
            stride = max(1, -(-flat.numel() // SAMPLES_PER_TENSOR))
            sample = flat[::stride].contiguous().cpu()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _layers(model: torch.nn.Module, modules: Sequence[AttentionModule]) -> torch.nn.Module:
    """The list that holds the layers of all attention modules; the model if it is not one list."""
    paths = {id(module): path for path, module in model.named_modules()}
    lists = set()
    for found in modules:
        parts = paths[id(found.module)].split(".")
        # "model.layers.3.self_attn" lies in the list "model.layers".
        lists.add(".".join(takewhile(lambda part: not part.isdecimal(), parts)))
    return model.get_submodule(lists.pop()) if len(lists) == 1 else model


def _embeddings(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding | torch.nn.Embedding) and not isinstance(
            module, ParallelLMHead
        ):
            yield module


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
