# SPDX-License-Identifier: Apache-2.0
"""How a causal map is stored: the lower triangle of every head, row by row, in bfloat16.

Half the bytes of the dense map, and `length` alone fixes the place of every row. A row holds its
`r + 1` visible columns, so the rows of one head lie at the triangular numbers `r * (r + 1) / 2`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from attncache_vllm.reuse.apply import (
    RowBlock,
    RowBlocks,
    block_bounds,
    query_heads_per_kv_head,
)

CODEC = "tril-bf16"


def encoded_bytes(num_heads: int, length: int) -> int:
    """Bytes of an encoded map of `num_heads` query heads over `length` tokens."""
    return num_heads * _triangle(length) * 2


def encode_causal(probs: Tensor) -> Tensor:
    """Encode a causal map; what lies above the diagonal is dropped.

    Args:
        probs: `[H, N, N]` attention probabilities of any float dtype.

    Returns:
        `[encoded_bytes(H, N)]` uint8, on the CPU.

    Raises:
        ValueError: the shape is not `[H, N, N]`, the dtype is not a float, or a probability is
            not in [0, 1]: a stored NaN would spoil every answer that reuses it.
    """
    if probs.ndim != 3 or probs.shape[1] != probs.shape[2] or not probs.numel():
        raise ValueError(
            f"a map must be [heads, N, N] and not empty, got {tuple(probs.shape)!r}; "
            "encode one layer of one sequence at a time"
        )
    if not probs.is_floating_point():
        raise ValueError(f"a map must have a float dtype, got {probs.dtype!r}; pass probabilities")
    num_heads, length, _ = probs.shape
    encoded = torch.empty(num_heads, _triangle(length), dtype=torch.bfloat16)
    source, target = _as_numpy(probs.detach().to("cpu", torch.bfloat16)), _as_numpy(encoded)
    for row in range(length):
        target[:, _triangle(row) : _triangle(row + 1)] = source[:, row, : row + 1]
    low, high = (float(bound) for bound in encoded.aminmax())
    if not (low >= 0 and high <= 1):  # also false for NaN, which aminmax passes on
        raise ValueError(
            f"probabilities must be in [0, 1], got values from {low!r} to {high!r}; "
            "do not record this sequence"
        )
    return encoded.view(-1).view(torch.uint8)


def decode_causal(payload: Tensor, num_heads: int, num_kv_heads: int, length: int) -> RowBlocks:
    """Decode what `encode_causal` made into the row blocks that `apply_map` multiplies.

    Args:
        payload: 1-D contiguous uint8 on the CPU; may be a read-only view of a memory map. It is
            copied from, not kept.
        num_heads: query heads.
        num_kv_heads: KV heads; divides `num_heads`.
        length: tokens of the stored sequence.

    Raises:
        ValueError: the payload or its size does not fit the numbers. Checked before anything is
            allocated.
    """
    group = query_heads_per_kv_head(num_heads, num_kv_heads)
    bounds = block_bounds(length)
    expected = encoded_bytes(num_heads, length)
    if (
        payload.dtype != torch.uint8
        or payload.shape != (expected,)
        or not payload.is_contiguous()
        or payload.storage_offset() % 2
    ):
        raise ValueError(
            f"a {CODEC} map of {num_heads} heads x {length} tokens must be {expected} contiguous "
            f"uint8 bytes at an even offset, got {payload.dtype!r} {tuple(payload.shape)!r}; "
            "treat the record as damaged"
        )
    source = _as_numpy(payload.view(torch.bfloat16).view(num_heads, -1))
    blocks = []
    for start, stop in bounds:
        probs = torch.zeros(num_heads, stop - start, stop, dtype=torch.bfloat16)
        target = _as_numpy(probs)
        for row in range(start, stop):
            target[:, row - start, : row + 1] = source[:, _triangle(row) : _triangle(row + 1)]
        blocks.append(RowBlock(start, stop, probs.view(num_kv_heads, group, stop - start, stop)))
    return RowBlocks(length, num_heads, num_kv_heads, tuple(blocks))


def _triangle(rows: int) -> int:
    """Elements in the first `rows` rows of a lower triangle."""
    return rows * (rows + 1) // 2


def _as_numpy(probs: Tensor) -> np.ndarray:
    """The same memory as 16-bit integers: numpy has no bfloat16.

    Copying one row of all heads at a time through numpy, whose calls cost a fraction of torch's,
    is several times faster than one masked copy per block (`masked_select`, `masked_scatter_`,
    `gather`): those read a mask or an index per element, this moves runs of memory.
    """
    array: np.ndarray = probs.view(torch.int16).numpy()
    return array
