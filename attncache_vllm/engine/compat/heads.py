# SPDX-License-Identifier: Apache-2.0
"""Seams 8 and 9: an attention layer of some of its heads, its module and its kernel."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from attncache_vllm.engine.compat.batches import MetadataSource, metadata_source, remember_source

# --- Seam 8: an attention module of some of its heads -------------------------------------------
# Why:      where maps serve some heads of a layer, the model's own forward (with its norms and
#           rotary embedding) must make queries and keys of the others alone.
# How:      a shallow copy of the module: projections and attention are other children, and the
#           attributes that vLLM's models keep sizes in say how many heads there are. Whoever uses
#           it compares what it computes with what the module does.
# Upstream: vllm/model_executor/models/llama.py, LlamaAttention (num_heads, q_size, ...)
# When:     when an Attention layer can leave out heads of a batch.

Forward = Callable[..., Any]


class _Child(torch.nn.Module):
    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.forward = function


def copy_of(
    module: torch.nn.Module,
    children: Sequence[tuple[torch.nn.Module | None, Forward]],
    sizes: Mapping[str, tuple[int, int]],
) -> torch.nn.Module:
    """A copy of ``module`` with functions in place of some of its children, and the second number
    of ``sizes`` in those of its attributes that are the first. All else is shared."""
    made = copy.copy(module)
    made.__dict__.pop("forward", None)  # the class's, not that of an instance that is hooked
    made._modules = {
        name: next((_Child(function) for old, function in children if old is child), child)
        for name, child in module._modules.items()
    }
    for name, (whole, part) in sizes.items():
        if getattr(made, name, None) == whole:
            setattr(made, name, part)
    return made


# --- Seam 9: the standard backend on some heads of a layer --------------------------------------
# Why:      the heads that maps do not serve are worth vLLM's own kernel: on CPUs torch's takes
#           twice as long for them.
# How:      metadata come from a copy of the layer's builder that counts fewer heads. Keys and
#           values are put where the cache keeps those of the first heads: nobody reads the cache of
#           such a sequence after its step, or the layer would not be served around its module.
# Upstream: vllm/v1/attention/backends/cpu_attn.py, CPUAttentionMetadataBuilder.build and
#           CPUAttentionBackendImpl.forward; the cache is [blocks, KV heads, block size, 2 d].
# When:     when an Attention layer can leave out heads of a batch.


def can_leave_out_heads(attention: Any) -> bool:
    """Whether the layer's backend is one of which the cache is known."""
    return bool(attention.attn_backend.get_name() == "CPU_ATTN")


def metadata_of_heads(source: MetadataSource, num_heads: int, num_kv_heads: int) -> Any:
    """Standard metadata for a layer with so many heads, of the batch that ``source`` describes."""
    builder = copy.copy(source.builder)
    builder.num_heads, builder.num_kv_heads = num_heads, num_kv_heads
    built = builder.build(0, source.common)
    remember_source(built, source)
    return built


def attend_some_heads(
    attention: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_metadata: Any,
) -> torch.Tensor:
    """What the standard backend of a layer answers for some of its heads, ``[T, h, d]``.

    Args:
        attention: vLLM's ``Attention`` layer.
        query: ``[T, h, d]``, of any h heads that share n KV heads evenly.
        key: ``[T, n, d]``.
        value: ``[T, n, d]``.
        attn_metadata: of :func:`metadata_of_heads`, for as many heads, or those of the whole layer.
    """
    source = metadata_source(attn_metadata)
    assert source is not None
    impl = attention.impl
    standard: Any = super(type(impl), impl)
    cache = attention.kv_cache
    if cache.ndim > 1:  # an encoder's has no blocks
        cache = cache[:, : key.shape[1]]
    if not attention.attn_backend.forward_includes_kv_cache_update:
        slots = source.common.slot_mapping[: len(key)]
        standard.do_kv_cache_update(attention, key, value, cache, slots)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    standard.forward(attention, query, key, value, cache, attn_metadata, output)
    return output
