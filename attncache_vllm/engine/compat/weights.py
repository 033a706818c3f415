# SPDX-License-Identifier: Apache-2.0
"""Seam 3: the loaded model, before its weights are repacked."""

from __future__ import annotations

import functools
from typing import Any

import torch

from attncache_vllm.engine.compat.selection import is_selected

# --- Seam 3: the moment between loading and repacking of the weights ----------------------------
# Why:      the V rows of qkv_proj must be taken before CPU linear layers repack their weights and
#           drop the original, and attention modules must be hooked before the model is compiled.
# How:      the name that BaseModelLoader.load_model calls is wrapped, only in a process that
#           builds an attention layer with our backend selected.
# Upstream: vllm/model_executor/model_loader/base_loader.py, process_weights_after_loading
# When:     when vLLM offers a hook on the loaded model to plugins.


def hook_weight_processing() -> None:
    from vllm.model_executor.model_loader import base_loader

    original = base_loader.process_weights_after_loading
    if getattr(original, "_attncache", False):
        return

    @functools.wraps(original)
    def process(model: torch.nn.Module, model_config: Any, target_device: torch.device) -> None:
        from vllm.config import get_current_vllm_config

        vllm_config = get_current_vllm_config()
        if is_selected(vllm_config):
            from attncache_vllm.engine.startup import attach

            attach(model, vllm_config)
        original(model, model_config, target_device)

    process._attncache = True  # type: ignore[attr-defined]
    base_loader.process_weights_after_loading = process
