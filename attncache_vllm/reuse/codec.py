# SPDX-License-Identifier: Apache-2.0
"""How a map is stored: the visible columns of each row, row by row, per head, in bfloat16.

What the mask hides takes no space, so a causal map is half its dense self, and the mask and
`length` alone fix the place of every row.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from attncache_vllm.reuse.apply import RowBlock, RowBlocks, block_bounds
from attncache_vllm.reuse.layout import MapLayout, Mask

CODEC = "visible-bf16"


def encoded_bytes(layout: MapLayout, length: int) -> int:
    """Bytes of an encoded map of `length` tokens."""
    return layout.num_heads * layout.mask.cells(length) * 2


def encode_map(probs: Tensor, mask: Mask) -> Tensor:
    """Encode a map; what the mask hides is dropped.

    Args:
        probs: `[H, N, N]` attention probabilities of any float dtype.
        mask: which columns a row sees.

    Returns:
        `[H * mask.cells(N) * 2]` uint8, on the CPU; see `encoded_bytes`.

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
    encoded = torch.empty(num_heads, mask.cells(length), dtype=torch.bfloat16)
    source, target = _as_numpy(probs.detach().to("cpu", torch.bfloat16)), _as_numpy(encoded)
    if target.shape[1] == length**2:
        target[:] = source.reshape(num_heads, -1)
    else:
        for row, (columns, cells) in enumerate(_places(mask, length)):
            target[:, cells] = source[:, row, columns]
    low, high = (float(bound) for bound in encoded.aminmax())
    if not (low >= 0 and high <= 1):  # also false for NaN, which aminmax passes on
        raise ValueError(
            f"probabilities must be in [0, 1], got values from {low!r} to {high!r}; "
            "do not record this sequence"
        )
    return encoded.view(-1).view(torch.uint8)


def decode_map(payload: Tensor, layout: MapLayout, length: int) -> RowBlocks:
    """Decode what `encode_map` made into the row blocks that `apply_map` multiplies.

    Args:
        payload: 1-D contiguous uint8 on the CPU; may be a read-only view of a memory map. It is
            copied from, not kept.
        layout: heads and mask of the layer.
        length: tokens of the stored sequence.

    Raises:
        ValueError: the payload or its size does not fit the numbers. Checked before anything is
            allocated.
    """
    mask, heads = layout.mask, layout.num_heads
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length!r}; skip empty sequences")
    expected = encoded_bytes(layout, length)
    if (
        payload.dtype != torch.uint8
        or payload.shape != (expected,)
        or not payload.is_contiguous()
        or payload.storage_offset() % 2
    ):
        raise ValueError(
            f"a {mask} map of {heads} heads x {length} tokens must be {expected} contiguous "
            f"uint8 bytes at an even offset, got {payload.dtype!r} {tuple(payload.shape)!r}; "
            "treat the record as damaged"
        )
    source = _as_numpy(payload.view(torch.bfloat16).view(heads, -1))
    blocks = []
    for start, stop in block_bounds(mask, length):
        first, last = mask.columns(start, length)[0], mask.columns(stop - 1, length)[1]
        probs = torch.zeros(heads, stop - start, last - first, dtype=torch.bfloat16)
        target = _as_numpy(probs)
        if source.shape[1] == length**2:  # then this is the only block
            target[:] = source.reshape(target.shape)
        else:
            for row, (columns, cells) in enumerate(_places(mask, length)[start:stop]):
                seen = slice(columns.start - first, columns.stop - first)
                target[:, row, seen] = source[:, cells]
        probs = probs.view(layout.num_kv_heads, layout.group, stop - start, last - first)
        blocks.append(RowBlock(start, stop, first, last, probs))
    return RowBlocks(layout, length, tuple(blocks))


# The maps of an entry have one length and hardly more than two masks.
@lru_cache(maxsize=4)
def _places(mask: Mask, length: int) -> list[tuple[slice, slice]]:
    """For each row the columns it sees, and where an encoded head has them."""
    places, at = [], 0
    for row in range(length):
        first, last = mask.columns(row, length)
        places.append((slice(first, last), slice(at, at + last - first)))
        at += last - first
    return places


def _as_numpy(probs: Tensor) -> np.ndarray:
    """The same memory as 16-bit integers: numpy has no bfloat16.

    Copying one row of all heads at a time through numpy, whose calls cost a fraction of torch's,
    is several times faster than one masked copy per block (`masked_select`, `masked_scatter_`,
    `gather`): those read a mask or an index per element, this moves runs of memory.
    """
    array: np.ndarray = probs.view(torch.int16).numpy()
    return array
