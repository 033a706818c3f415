# SPDX-License-Identifier: Apache-2.0
"""From the queries and keys of a sequence to its encoded map, as it is recorded."""

from __future__ import annotations

import torch
from torch import Tensor

from attncache_vllm.reuse.apply import check_scores, exact_map
from attncache_vllm.reuse.codec import check_lse
from attncache_vllm.reuse.codecs import CODECS
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.tile_codec import tile_payload
from attncache_vllm.reuse.tiles import COLUMNS, DROPPED, ROWS

try:
    import attncache_vllm.reuse._encode as _encode
except ImportError:  # not built: no compiler at installation
    _encode = None  # type: ignore[assignment]


def encode_attention(
    codec: str,
    query: Tensor,
    key: Tensor,
    scale: float,
    mask: Mask,
    soft_cap: float | None = None,
) -> Tensor:
    """The map of a sequence, `exact_map`, encoded as a record has it.

    Tiles of bfloat16 queries and keys are made in one pass where the CPU has the instructions. Its
    scores, float32 as those of `exact_map`, are summed in another order: cells differ by at most
    one and scales by a unit of bfloat16, save that a tile at the very edge of being dropped may be
    kept by the one and dropped by the other.

    Args:
        codec: the name of the encoding, see `CODECS`.
        query, key, scale, mask, soft_cap: see `exact_map`.

    Returns:
        uint8, on the CPU.

    Raises:
        ValueError: what `exact_map` refuses, or scores that are not finite.
    """
    check_scores(query, key, soft_cap)
    if codec == "tiles-u8-lse" and encodes(query, key):
        return _encode_natively(query, key, scale, mask, soft_cap)
    return CODECS[codec].encode(*exact_map(query, key, scale, mask, soft_cap), mask)


def encodes(query: Tensor, key: Tensor) -> bool:
    """Whether tiles are made of these `[L, H, d]` and `[L, KV, d]` in one pass."""
    return (
        _encode is not None
        and _encode.supported()
        and query.device.type == key.device.type == "cpu"
        and query.dtype == key.dtype == torch.bfloat16
        and query.shape[0] > 0
        and query.shape[2] % 2 == 0
        and query.stride(2) == key.stride(2) == 1
    )


def _encode_natively(
    query: Tensor, key: Tensor, scale: float, mask: Mask, soft_cap: float | None
) -> Tensor:
    assert _encode is not None
    length, heads, head_size = query.shape
    group = MapLayout(heads, key.shape[1], mask).group
    starts = _starts(mask, length)
    most, panels = heads * int(starts[-1]), len(starts) - 1
    packed = torch.empty(key.shape[1], -(-length // COLUMNS) * COLUMNS, head_size, dtype=key.dtype)
    cells = torch.empty(most, ROWS, COLUMNS, dtype=torch.uint8)
    scales = torch.empty(most, ROWS, dtype=torch.bfloat16)
    columns = torch.empty(most, dtype=torch.uint16)
    counts = torch.empty(heads, panels, dtype=torch.int64)
    lse = torch.empty(heads, length)
    before = length if mask.window is None else mask.window
    _encode.encode(
        query.data_ptr(),
        key.data_ptr(),
        packed.data_ptr(),
        starts.data_ptr(),
        cells.data_ptr(),
        scales.data_ptr(),
        columns.data_ptr(),
        counts.data_ptr(),
        lse.data_ptr(),
        heads,
        group,
        length,
        head_size // 2,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        before,
        1 if mask.causal else before,
        scale,
        soft_cap or 0.0,
        DROPPED,
    )
    check_lse(lse)
    ends = torch.zeros(heads * panels + 1, dtype=torch.int64)
    torch.cumsum(counts.flatten(), 0, out=ends[1:])
    payload, parts = tile_payload(lse, ends)
    _encode.join(
        cells.data_ptr(),
        scales.data_ptr(),
        columns.data_ptr(),
        starts.data_ptr(),
        parts.panels.data_ptr(),
        heads,
        panels,
        parts.cells.data_ptr(),
        parts.scales.data_ptr(),
        parts.columns.data_ptr(),
    )
    return payload


def _starts(mask: Mask, length: int) -> Tensor:
    """int64 `[panels + 1]`: how many tiles the panels of a head before each can see, then all."""
    first = torch.arange(0, length, ROWS)
    last = (first + ROWS - 1).clamp_max(length - 1)
    before = length if mask.window is None else mask.window
    after = 1 if mask.causal else before
    from_tile = (first - before + 1).clamp_min(0) // COLUMNS
    last_tile = ((last + after).clamp_max(length) - 1) // COLUMNS
    return torch.cat([first.new_zeros(1), (last_tile + 1 - from_tile).cumsum(0)])
