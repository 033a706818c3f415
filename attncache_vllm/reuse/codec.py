# SPDX-License-Identifier: Apache-2.0
"""How a map is stored: each row's log-sum-exp, then its visible columns.

An encoded map of `H` heads and `N` tokens is `[H, N]` float32 log-sum-exps, head after head, and
then `[H, cells]` bfloat16: per head the columns that the mask lets each row see, row by row. What
the mask hides takes no space, so a causal map is half its dense self, and the mask and the length
alone fix the place of every row.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.maps import RowBlock, RowBlocks, block_bounds, kv_index

CODEC = "visible-bf16-lse"
_LSE_BYTES, _CELL_BYTES = 4, 2


def encoded_bytes(layout: MapLayout, length: int) -> int:
    """Bytes of an encoded map of `length` tokens."""
    return layout.num_heads * (_LSE_BYTES * length + _CELL_BYTES * layout.mask.cells(length))


def encode_map(probs: Tensor, lse: Tensor, mask: Mask) -> Tensor:
    """Encode a map; what the mask hides is dropped.

    Args:
        probs: `[H, N, N]` attention probabilities of any float dtype.
        lse: `[H, N]` float32, the log-sum-exp of each row's scores (see `exact_map`).
        mask: which columns a row sees.

    Returns:
        `[encoded_bytes]` uint8, on the CPU.

    Raises:
        ValueError: a shape or dtype is not as above, a probability is not in [0, 1] or a
            log-sum-exp not finite: a stored NaN would spoil every answer that reuses it.
    """
    check_map(probs, lse)
    num_heads, length, _ = probs.shape
    lse_bytes = _LSE_BYTES * num_heads * length
    payload = torch.empty(
        lse_bytes + _CELL_BYTES * num_heads * mask.cells(length), dtype=torch.uint8
    )
    payload[:lse_bytes].view(torch.float32).view(num_heads, length).copy_(lse)
    encoded = payload[lse_bytes:].view(torch.bfloat16).view(num_heads, -1)
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
    return payload


def decode_map(
    payload: Tensor, layout: MapLayout, length: int, groups: tuple[int, ...] | None = None
) -> RowBlocks:
    """Decode what `encode_map` made into the row blocks that `apply_map` multiplies.

    Args:
        payload: 1-D contiguous uint8 on the CPU; may be a read-only view of a memory map. It is
            copied from, not kept, and only the bytes of `groups` are read.
        layout: heads and mask of the layer.
        length: tokens of the stored sequence.
        groups: the KV heads whose query heads are wanted, ascending; None is all.

    Raises:
        ValueError: the payload or its size does not fit the numbers, or the layer has no such
            groups. Checked before anything is allocated.
    """
    mask, heads, group = layout.mask, layout.num_heads, layout.group
    groups = check_groups(layout, length, groups)
    expected = encoded_bytes(layout, length)
    if (
        payload.dtype != torch.uint8
        or payload.shape != (expected,)
        or not payload.is_contiguous()
        or payload.storage_offset() % _LSE_BYTES
    ):
        raise ValueError(
            f"a {mask} map of {heads} heads x {length} tokens must be {expected} contiguous "
            f"uint8 bytes at an offset divisible by {_LSE_BYTES}, got {payload.dtype!r} "
            f"{tuple(payload.shape)!r}; treat the record as damaged"
        )
    kv_heads = kv_index(groups)
    lse_bytes = _LSE_BYTES * heads * length
    stored_lse = payload[:lse_bytes].view(torch.float32).view(-1, group, length)
    lse = stored_lse[kv_heads].reshape(-1, length).clone()
    source = _as_numpy(payload[lse_bytes:].view(torch.bfloat16).view(-1, group, mask.cells(length)))
    blocks = []
    for start, stop in block_bounds(mask, length):
        first, last = mask.columns(start, length)[0], mask.columns(stop - 1, length)[1]
        probs = torch.zeros(len(groups), group, stop - start, last - first, dtype=torch.bfloat16)
        target = _as_numpy(probs)
        if source.shape[2] == length**2:  # then this is the only block
            target[:] = source[kv_heads].reshape(target.shape)
        else:
            for row, (columns, cells) in enumerate(_places(mask, length)[start:stop]):
                seen = slice(columns.start - first, columns.stop - first)
                target[:, :, row, seen] = source[kv_heads, :, cells]
        blocks.append(RowBlock(start, stop, first, last, probs))
    return RowBlocks(layout, length, groups, tuple(blocks), lse)


def check_map(probs: Tensor, lse: Tensor) -> None:
    """Raise ValueError unless there is a map `[H, N, N]` with log-sum-exps `[H, N]` float32."""
    if probs.ndim != 3 or probs.shape[1] != probs.shape[2] or not probs.numel():
        raise ValueError(
            f"a map must be [heads, N, N] and not empty, got {tuple(probs.shape)!r}; "
            "encode one layer of one sequence at a time"
        )
    if not probs.is_floating_point():
        raise ValueError(f"a map must have a float dtype, got {probs.dtype!r}; pass probabilities")
    num_heads, length, _ = probs.shape
    if lse.shape != (num_heads, length) or lse.dtype != torch.float32:
        raise ValueError(
            f"lse must be [{num_heads}, {length}] float32, got {tuple(lse.shape)!r} "
            f"{lse.dtype!r}; pass what exact_map returned"
        )
    check_lse(lse)


def check_lse(lse: Tensor) -> None:
    """Raise ValueError unless every log-sum-exp is finite."""
    if not lse.isfinite().all():
        raise ValueError(
            "log-sum-exps must be finite, got "
            f"{lse[~lse.isfinite()][0].item()!r}; do not record this sequence"
        )


def check_groups(layout: MapLayout, length: int, groups: tuple[int, ...] | None) -> tuple[int, ...]:
    """`groups`, or all; ValueError unless there are some, ascending, of the layer."""
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length!r}; skip empty sequences")
    if groups is None:
        groups = tuple(range(layout.num_kv_heads))
    ascending = all(low < high for low, high in pairwise(groups))
    if not groups or not ascending or groups[0] < 0 or groups[-1] >= layout.num_kv_heads:
        raise ValueError(
            f"groups must be KV heads of 0 to {layout.num_kv_heads - 1}, ascending and at least "
            f"one, got {groups!r}; take them from a plan of this model"
        )
    return groups


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
