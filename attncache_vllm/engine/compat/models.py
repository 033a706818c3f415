# SPDX-License-Identifier: Apache-2.0
"""Seams 6 and 7: a model without its weights, and linear layers of the plugin's own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm.config import VllmConfig


# --- Seam 6: a model without its weights --------------------------------------------------------
# Why:      what a hit can skip is decided by the model's modules, and a diagnosis should not load
#           gigabytes or start an engine to see them.
# How:      vLLM's own constructor under torch's meta device, in a process group of one.
# Upstream: vllm/model_executor/model_loader/utils.py, initialize_model
# When:     when vLLM can describe a model's layers without building them.


def build_without_weights(vllm_config: VllmConfig) -> torch.nn.Module:
    """The model of ``vllm_config`` on the meta device: shapes, no memory. Takes about a second."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.network_utils import get_distributed_init_method, get_open_port
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_current_vllm_config(vllm_config):
        method = get_distributed_init_method("127.0.0.1", get_open_port())
        init_distributed_environment(1, 0, method, 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        dtype = vllm_config.model_config.dtype
        with set_default_torch_dtype(dtype), torch.device("meta"):
            model: torch.nn.Module = initialize_model(vllm_config=vllm_config)
            return model


# --- Seam 7: a linear layer of our own -----------------------------------------------------------
# Why:      the V rows of a projection are not vLLM's layer any more, but are multiplied as often;
#           on CPUs vLLM's layers multiply with repacked weights, which torch's do not.
# How:      a module with nothing but a weight, handed to vLLM's choice of a CPU kernel.
# Upstream: vllm/model_executor/layers/utils.py, dispatch_cpu_unquantized_gemm
# When:     when vLLM can project to values alone.

Linear = Callable[[torch.Tensor], torch.Tensor]


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """``x @ weight.T + bias`` as vLLM would compute it; ``weight`` ``[out, in]`` may be taken."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    if weight.device.type != "cpu":
        return functools.partial(torch.nn.functional.linear, weight=weight, bias=bias)
    layer: Any = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return lambda x: layer.cpu_linear(x, layer.weight, layer.bias)
