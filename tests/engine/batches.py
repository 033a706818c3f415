# SPDX-License-Identifier: Apache-2.0
"""Batches as vLLM's runner describes them, built and attended to by a backend of a few lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionBackend, AttentionType, CommonAttentionMetadata

from attncache_vllm.engine import compat
from attncache_vllm.engine.backend import wrap_backend

# A row's tokens lie in one block of the KV cache, that of its number and one.
BLOCK_SIZE = 256
PADDING_SLOT = -1


class StandardBuilder:
    """Keeps what it was given."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        self.given = (kv_cache_spec, layer_names, vllm_config, device)
        self.kv_cache_spec = kv_cache_spec

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        assert common_prefix_len == 0
        return SimpleNamespace(common=common_attn_metadata, fast=fast_build)


class StandardImpl:
    """Exact attention in float32, row by row of its metadata.

    Keys and values of a decoder are those of the paged ``kv_cache`` ``[blocks, KV, BLOCK_SIZE,
    2 * d]``, as on CPUs, so that a wrong slot, block, length or position gives a wrong answer.
    """

    logits_soft_cap = 0.0
    alibi_slopes = None
    supports_quant_query_input = False

    def __init__(self, scale: float, attn_type: str, window: int | None) -> None:
        self.scale, self.attn_type, self.window = scale, attn_type, window
        self.slots_written: list[int] = []
        self.calls: list[SimpleNamespace] = []

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor
    ) -> None:
        if self.attn_type == AttentionType.ENCODER_ONLY:
            return
        written = slots != PADDING_SLOT
        blocks, places = slots[written] // BLOCK_SIZE, slots[written] % BLOCK_SIZE
        kv_cache[blocks, :, places] = torch.cat([key, value], dim=-1)[written]
        self.slots_written += slots[written].tolist()

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Any = None,
        output_block_scale: Any = None,
    ) -> Tensor:
        scales = (output_scale, output_block_scale)
        self.calls.append(
            SimpleNamespace(
                tokens=len(query), heads=query.shape[1], metadata=attn_metadata, scales=scales
            )
        )
        if attn_metadata is None:
            return output
        common = attn_metadata.common
        starts = common.query_start_loc.tolist()
        for row, (start, stop) in enumerate(pairwise(starts)):
            if start == stop:
                continue
            seen = int(common.seq_lens[row])
            if self.attn_type == AttentionType.ENCODER_ONLY:
                keys, values = key[start:stop], value[start:stop]
            else:
                block = kv_cache[common.block_table_tensor[row, 0], :, :seen]
                keys, values = block.transpose(0, 1).chunk(2, dim=-1)
            output[start:stop] = self._row(query[start:stop], keys, values).to(output.dtype)
        return output

    def _row(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The last ``len(query)`` tokens of a sequence attend to what they may see of it."""
        group = query.shape[1] // key.shape[1]
        key, value = (x.float().repeat_interleave(group, dim=1) for x in (key, value))
        scores = torch.einsum("ihd,jhd->hij", query.float(), key) * self.scale
        column = torch.arange(len(key))
        row = column[-len(query) :, None]
        hidden = torch.zeros(len(query), len(key), dtype=torch.bool)
        if self.attn_type == AttentionType.DECODER:
            hidden |= column > row
        if self.window is not None:
            hidden |= (row - column).abs() >= self.window
        probs = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("hij,jhd->ihd", probs, value)


class StandardBackend(AttentionBackend):
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @staticmethod
    def get_builder_cls() -> Any:
        return StandardBuilder

    @staticmethod
    def get_impl_cls() -> Any:
        return StandardImpl


Backend: Any = resolve_obj_by_qualname(wrap_backend(f"{__name__}.StandardBackend"))
"""The standard backend as an engine with ``--attention-backend attncache`` has it."""


def make_builder(layers: dict[str, Any] | None = None, names: Sequence[str] = ("layer",)) -> Any:
    """A builder of the wrapped backend in an engine of these layers."""
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=layers or {})
    )
    return Backend.get_builder_cls()("spec", list(names), config, torch.device("cpu"))


def describe(lengths: Sequence[int], context: Sequence[int] | None = None, padding: int = 0) -> Any:
    """A step of these query lengths; ``context`` are the lengths with what came before, ``padding``
    tokens follow the batch.

    Row r has block table ``[r + 1, r + 100]``, position p of it the slot ``slot(r, p)``.
    """
    context = lengths if context is None else context
    starts = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
    rows = list(zip(context, lengths, strict=True))
    positions = [p for seen, n in rows for p in range(seen - n, seen)]
    slots = [slot(r, p) for r, (seen, n) in enumerate(rows) for p in range(seen - n, seen)]
    return CommonAttentionMetadata(
        query_start_loc=starts.clone(),
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(context, dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor(context, dtype=torch.int32),
        num_reqs=len(lengths),
        num_actual_tokens=len(slots),
        max_query_len=max(lengths),
        max_seq_len=max(context),
        block_table_tensor=torch.tensor([[r + 1, r + 100] for r in range(len(rows))]).int(),
        slot_mapping=torch.tensor(slots + [PADDING_SLOT] * padding),
        positions=torch.tensor(positions + [0] * padding),
        is_prefilling=torch.tensor([n > 1 for n in lengths]),
        causal=True,
    )


def slot(row: int, position: int) -> int:
    return BLOCK_SIZE * (row + 1) + position


def batch(
    lengths: Sequence[int],
    context: Sequence[int] | None = None,
    prompts: Sequence[int | compat.Prompt] | None = None,
    padding: int = 0,
) -> Any:
    """Metadata of a step; ``prompts`` are its rows' prompts, or the whole lengths of them."""
    metadata = make_builder().build(0, describe(lengths, context, padding))
    source = compat.metadata_source(metadata)
    assert source is not None
    if prompts is not None:
        known = [compat.Prompt(prompt) if isinstance(prompt, int) else prompt for prompt in prompts]
        compat.remember_source(metadata, replace(source, prompts=known))
    return metadata


def source(
    lengths: Sequence[int],
    context: Sequence[int] | None = None,
    prompts: Sequence[int | compat.Prompt] | None = None,
) -> compat.MetadataSource:
    found = compat.metadata_source(batch(lengths, context, prompts))
    assert found is not None
    return found


def spans(lengths: Sequence[int]) -> Iterator[range]:
    """Positions in the batch of each row's tokens."""
    return (range(*edges) for edges in pairwise(accumulate(lengths, initial=0)))


def counted(name: str, **labels: str) -> float:
    """Value of a Prometheus counter in this process, 0 if it never counted."""
    from prometheus_client import REGISTRY

    return REGISTRY.get_sample_value(name, labels) or 0.0
