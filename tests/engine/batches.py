# SPDX-License-Identifier: Apache-2.0
"""Batches as vLLM's runner describes them to a metadata builder."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from attncache_vllm.engine import compat

SLOT_OF_FIRST_TOKEN = 1000


class Builder:
    """A metadata builder that keeps what it was given, and is observed as ours is."""

    def build(self, common_prefix_len: int, common: CommonAttentionMetadata) -> Any:
        assert common_prefix_len == 0
        metadata = SimpleNamespace(common=common)
        compat.remember_source(metadata, compat.MetadataSource(self, common))
        return metadata


def batch(lengths: Sequence[int], context: Sequence[int] | None = None) -> Any:
    """Metadata of a step of these query lengths; ``context`` are the lengths with what came before.

    Row r has block table ``[r, r + 100]``, token t has slot ``SLOT_OF_FIRST_TOKEN + t``.
    """
    context = lengths if context is None else context
    starts = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
    rows, tokens = len(lengths), int(starts[-1])
    first = [whole - part for whole, part in zip(context, lengths, strict=True)]
    positions = [torch.arange(start, start + n) for start, n in zip(first, lengths, strict=True)]
    common = CommonAttentionMetadata(
        query_start_loc=starts.clone(),
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(context, dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor(context, dtype=torch.int32),
        num_reqs=rows,
        num_actual_tokens=tokens,
        max_query_len=max(lengths),
        max_seq_len=max(context),
        block_table_tensor=torch.tensor([[r, r + 100] for r in range(rows)], dtype=torch.int32),
        slot_mapping=torch.arange(tokens) + SLOT_OF_FIRST_TOKEN,
        positions=torch.cat(positions),
        is_prefilling=torch.tensor([n > 1 for n in lengths]),
        causal=True,
    )
    return Builder().build(0, common)


def source(lengths: Sequence[int], context: Sequence[int] | None = None) -> compat.MetadataSource:
    found = compat.metadata_source(batch(lengths, context))
    assert found is not None
    return found


def counted(name: str, **labels: str) -> float:
    """Value of a Prometheus counter in this process, 0 if it never counted."""
    from prometheus_client import REGISTRY

    return REGISTRY.get_sample_value(name, labels) or 0.0
