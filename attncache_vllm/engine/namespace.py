# SPDX-License-Identifier: Apache-2.0
"""What makes maps of two engines comparable."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch

from attncache_vllm.store.protocol import Namespace

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SAMPLES_PER_TENSOR = 1024


def namespace_of(vllm_config: VllmConfig, weights: str) -> Namespace:
    """The engine's namespace; ``weights`` is :func:`weights_fingerprint`, known once loaded."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    text_config = model.hf_text_config
    return Namespace(
        model=model.model,
        weights=weights,
        architecture=model.architecture,
        dtype=str(model.dtype).removeprefix("torch."),
        attention="causal",
        num_layers=text_config.num_hidden_layers,
        num_heads=model.get_num_attention_heads(parallel),
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_size=model.get_head_size(),
        rope=_canonical(getattr(text_config, "rope_parameters", None)),
        tensor_parallel=f"{parallel.rank}/{parallel.tensor_parallel_size}",
    )


def weights_fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over name, shape and dtype of every parameter and evenly spread samples of it.

    Up to 1,024 values per parameter are read: a fine-tuned or differently quantized copy of a
    model differs in nearly all of them, and a model of any size takes well under a second.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        flat = parameter.detach().reshape(-1)
        stride = max(1, flat.numel() // SAMPLES_PER_TENSOR)
        sample = flat[::stride][:SAMPLES_PER_TENSOR].contiguous().cpu()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
