# SPDX-License-Identifier: Apache-2.0
"""Seams 4, 5 and 11: the batch that a forward pass is for, and the moment from which on there can
be one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attncache_vllm.engine.compat.tenants import tenant_of_state

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import CommonAttentionMetadata


# --- Seam 4: what a forward pass knows ----------------------------------------------------------
# Why:      the op needs the batch's layout, and misses must run on a sub-batch with metadata that
#           the standard backend built for exactly these sequences.
# How:      our metadata builder leaves the CommonAttentionMetadata it was given on the metadata it
#           returns (attribute below); a sub-batch is built by the same builder from a selection of
#           its rows and put in force with override_forward_context.
# Upstream: vllm/forward_context.py, vllm/v1/attention/backend.py (CommonAttentionMetadata)
# When:     when attention metadata carries the common metadata or can be sliced by vLLM itself.

_SOURCE = "_attncache_source"


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """A whole prompt.

    Attributes:
        length: in tokens.
        token_ids: int32 ``[length]`` if they say all about it (they do not where embeddings or
            images stand behind some of them).
        tenant: of :func:`~attncache_vllm.tenants.tenant_of`; None if nobody said whose it is.
    """

    length: int
    token_ids: np.ndarray | None = None
    tenant: str | None = None


@dataclasses.dataclass(frozen=True)
class MetadataSource:
    """What attention metadata was built from, and by whom.

    ``prompts`` are those of the rows, however much of them this step holds; None where the model
    runner is not the one that seam 5 hooks. ``rows`` are the rows of the step's batch that a
    sub-batch was made of, None for the whole batch.
    """

    builder: Any
    common: CommonAttentionMetadata
    prompts: list[Prompt] | None = None
    rows: tuple[int, ...] | None = None

    def row_in_batch(self, row: int) -> int:
        """The row of the step's batch that is row ``row`` here."""
        return row if self.rows is None else self.rows[row]


def forward_context() -> ForwardContext:
    from vllm.forward_context import get_forward_context

    return get_forward_context()


def attention_layer(layer_name: str) -> Any:
    """vLLM's ``Attention`` layer of that name in the engine whose forward pass is running."""
    return forward_context().no_compile_layers[layer_name]


def layer_metadata(layer_name: str) -> Any | None:
    """Attention metadata of a layer; None while vLLM profiles or warms up."""
    raw = forward_context().attn_metadata
    return raw.get(layer_name) if isinstance(raw, dict) else None


def remember_source(attn_metadata: Any, source: MetadataSource) -> None:
    setattr(attn_metadata, _SOURCE, source)


def metadata_source(attn_metadata: Any) -> MetadataSource | None:
    return getattr(attn_metadata, _SOURCE, None)


def leave_bypass_counter(
    vllm_config: VllmConfig, counter: Callable[[MetadataSource], None]
) -> None:
    """Have ``counter`` called with every batch of an engine none of whose layers has reuse."""
    # Other entries (state space, mixture of experts, layers with a backend that the model chose)
    # have no metadata that our builder makes.
    layers = vllm_config.compilation_config.static_forward_context.values()
    ours = [
        layer for layer in layers if getattr(getattr(layer, "impl", None), "asks_treatment", False)
    ]
    for layer in ours[:1]:
        layer.attncache_bypass = counter


def bypass_counter(
    vllm_config: VllmConfig, layer_names: list[str]
) -> Callable[[MetadataSource], None] | None:
    """What was left on one of these layers to count the sequences of a bypassed engine."""
    layers = vllm_config.compilation_config.static_forward_context
    for name in layer_names:
        counter: Callable[[MetadataSource], None] | None
        counter = getattr(layers.get(name), "attncache_bypass", None)
        if counter is not None:
            return counter
    return None


def context_lengths(common: CommonAttentionMetadata) -> torch.Tensor:
    """Tokens of each row's sequence up to the end of this step ``[B]``, on the CPU."""
    known = common.seq_lens_cpu_upper_bound
    return known if known is not None else common.seq_lens.cpu()


def source_of_rows(
    source: MetadataSource, rows: Sequence[int], tokens: torch.Tensor
) -> MetadataSource:
    """What metadata of the sequences ``rows`` of a batch are built from.

    Args:
        source: the full batch.
        rows: indices of sequences in the batch, ascending.
        tokens: int64 ``[T']``, the positions of their tokens in the batch, in order.
    """
    common = source.common
    pick = torch.tensor(rows, dtype=torch.long, device=common.seq_lens.device)
    pick_cpu = torch.tensor(rows, dtype=torch.long)

    def of_rows(x: Any) -> Any:
        return x[pick.to(x.device)] if isinstance(x, torch.Tensor) else x

    starts = common.query_start_loc_cpu
    lengths = (starts[1:] - starts[:-1])[pick_cpu]
    contexts = context_lengths(common)[pick_cpu]
    start_loc = torch.zeros(len(rows) + 1, dtype=starts.dtype)
    torch.cumsum(lengths, 0, out=start_loc[1:])
    sub = common.replace(
        query_start_loc=start_loc.to(common.query_start_loc.device),
        query_start_loc_cpu=start_loc,
        seq_lens=common.seq_lens[pick],
        seq_lens_cpu_upper_bound=of_rows(common.seq_lens_cpu_upper_bound),
        is_prefilling=of_rows(common.is_prefilling),
        num_reqs=len(rows),
        num_actual_tokens=int(start_loc[-1]),
        max_query_len=int(lengths.max()),
        max_seq_len=int(contexts.max()),
        block_table_tensor=common.block_table_tensor[pick],
        slot_mapping=common.slot_mapping[tokens],
        positions=common.positions[tokens] if common.positions is not None else None,
        causal=of_rows(common.causal),
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
    in_batch = tuple(source.row_in_batch(row) for row in rows)
    return MetadataSource(source.builder, sub, rows=in_batch)


def build_metadata(source: MetadataSource) -> Any:
    """The standard backend's own metadata of a batch or a part of one."""
    built = source.builder.build(0, source.common)
    remember_source(built, source)
    return built


@contextmanager
def sub_batch(layer_name: str, attn_metadata: Any) -> Iterator[None]:
    """Run one attention layer on the sequences of ``attn_metadata`` only."""
    from vllm.forward_context import override_forward_context

    source = metadata_source(attn_metadata)
    assert source is not None
    context = dataclasses.replace(
        forward_context(),
        attn_metadata={layer_name: attn_metadata},
        slot_mapping={layer_name: source.common.slot_mapping},
    )
    with override_forward_context(context):
        yield


# --- Seam 5: the prompts of a batch -------------------------------------------------------------
# Why:      the first chunk of a long prompt looks like a whole short one, and attention metadata
#           carries no token ids, which alignment goes by.
# How:      while the runner builds metadata our builders may ask it for the prompts of its rows.
#           Hooked only in a process that builds an attention layer with our backend selected.
# Upstream: vllm/v1/worker/gpu_model_runner.py, GPUModelRunner._build_attention_metadata (the CPU
#           runner inherits it). Model runner V2 is another class and is not hooked.
# When:     when CommonAttentionMetadata carries prompt lengths and token ids.

_runner: Any = None


def hook_model_runner() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner._build_attention_metadata
    if getattr(original, "_attncache", False):
        return

    @functools.wraps(original)
    def build(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _runner
        _runner = self
        try:
            return original(self, *args, **kwargs)
        finally:
            _runner = None

    build._attncache = True  # type: ignore[attr-defined]
    GPUModelRunner._build_attention_metadata = build


def prompts(rows: int) -> list[Prompt] | None:
    """The prompts of the first ``rows`` rows of the batch that metadata is being built for."""
    if _runner is None:
        return None
    lengths = _runner.input_batch.num_prompt_tokens_cpu_tensor[:rows].tolist()
    return [_prompt(row, length) for row, length in enumerate(lengths)]


def _prompt(row: int, length: int) -> Prompt:
    batch = _runner.input_batch
    # Padding follows the requests.
    name = batch.req_ids[row] if row < len(batch.req_ids) else None
    request = _runner.requests.get(name)
    if request is None:
        return Prompt(length)
    token_ids = None
    if not request.mm_features and batch.is_token_ids[row, :length].all():
        # A copy: the lookup reads it beside the forward, and the runner reuses the memory.
        token_ids = batch.token_ids_cpu[row, :length].astype(np.int32)
    return Prompt(length, token_ids, tenant_of_state(request))


# --- Seam 11: the moment from which on layers can run -------------------------------------------
# Why:      what a layer costs is measured with the engine's own kernels, metadata and KV cache,
#           before the first request.
# How:      the runner's method that makes builders and cache is wrapped. What was left on a layer
#           is called with the builders; a prompt's metadata are made as the runner makes them.
#           Hooked only in a process that builds an attention layer with our backend selected.
# Upstream: vllm/v1/worker/gpu_model_runner.py, GPUModelRunner.initialize_kv_cache
# When:     when vLLM tells plugins that a worker is ready.

Builders = Mapping[str, Any]


def call_when_ready(attention: Any, callback: Callable[[Builders], None]) -> None:
    """Have ``callback`` called with the metadata builders by the names of their layers."""
    attention.attncache_ready = callback


def hook_cache_initialization() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner.initialize_kv_cache
    if getattr(original, "_attncache", False):
        return

    @functools.wraps(original)
    def initialize(
        self: Any, kv_cache_config: Any, is_profiling: bool = False, **kwargs: Any
    ) -> None:
        original(self, kv_cache_config, is_profiling, **kwargs)
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        waiting = [layer for layer in layers if hasattr(layer, "attncache_ready")]
        if is_profiling or not waiting:
            return
        builders = {
            name: group.metadata_builders[0]
            for groups in self.attn_groups
            for group in groups
            for name in group.layer_names
        }
        for layer in waiting:
            layer.attncache_ready(builders)

    initialize._attncache = True  # type: ignore[attr-defined]
    GPUModelRunner.initialize_kv_cache = initialize


def most_tokens(attention: Any, builder: Any) -> int | None:
    """Tokens of the longest prompt that fits the layer's KV cache; None if it needs none."""
    cache = attention.kv_cache
    # Block 0 stands for no block.
    return (len(cache) - 1) * int(builder.kv_cache_spec.block_size) if cache.ndim > 1 else None


def metadata_of_prompts(builder: Any, count: int, length: int, device: torch.device) -> Any:
    """Standard metadata of a batch of whole prompts of one length, in the first blocks of the
    cache."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    block = int(builder.kv_cache_spec.block_size)
    blocks = -(-length // block)
    starts = torch.arange(count + 1, dtype=torch.int32) * length
    lengths = torch.full((count,), length, dtype=torch.int32)
    positions = torch.arange(length, device=device).repeat(count)
    first = block * (1 + blocks * torch.arange(count, device=device)).repeat_interleave(length)
    common = CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=lengths.to(device),
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=count,
        num_actual_tokens=count * length,
        max_query_len=length,
        max_seq_len=length,
        block_table_tensor=torch.arange(1, 1 + count * blocks, device=device)
        .int()
        .view(count, blocks),
        slot_mapping=first + positions,
        positions=positions,
        is_prefilling=torch.tensor([True] * count),
    )
    return build_metadata(MetadataSource(builder, common))


@contextmanager
def forward_of_layer(
    vllm_config: VllmConfig, layer_name: str, attn_metadata: Any
) -> Iterator[None]:
    """Run one attention layer as in a forward pass of these metadata."""
    from vllm.forward_context import ForwardContext, override_forward_context

    source = metadata_source(attn_metadata)
    assert source is not None
    context = ForwardContext(
        no_compile_layers=vllm_config.compilation_config.static_forward_context,
        attn_metadata={layer_name: attn_metadata},
        slot_mapping={layer_name: source.common.slot_mapping},
    )
    with override_forward_context(context):
        yield
