# SPDX-License-Identifier: Apache-2.0
"""Tiled maps as bytes of a record, and back: what a record holds is not trusted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attncache_vllm.reuse.codec import check_groups, check_map
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.tiles import (
    COLUMNS,
    ROWS,
    TiledMap,
    is_sound,
    panels_of,
    tile,
)


def encode_tiles(probs: Tensor, lse: Tensor, mask: Mask) -> Tensor:
    """Encode a map: log-sum-exps, panels, columns, scales and cells, in this order.

    Args:
        probs: `[H, N, N]` attention probabilities of any float dtype.
        lse: `[H, N]` float32, the log-sum-exp of each row's scores (see `exact_map`).
        mask: which columns a row sees; what it hides is dropped.

    Returns:
        uint8, on the CPU; how many bytes depends on the map.

    Raises:
        ValueError: a shape or dtype is not as above, a probability is not in [0, 1] or a
            log-sum-exp not finite.
    """
    check_map(probs, lse)
    probs = probs.detach().to("cpu", torch.float32)
    length = probs.shape[-1]
    if mask.cells(length) < length**2:
        probs = probs * mask.visible(length)
    low, high = (float(bound) for bound in probs.aminmax())
    if not (low >= 0 and high <= 1):  # also false for NaN, which aminmax passes on
        raise ValueError(
            f"probabilities must be in [0, 1], got values from {low!r} to {high!r}; "
            "do not record this sequence"
        )
    cells, scales, columns, panels = tile(probs)
    payload, parts = tile_payload(lse, panels)
    parts.cells.copy_(cells)
    parts.scales.copy_(scales)
    parts.columns.copy_(columns)
    return payload


@dataclass(frozen=True)
class PayloadParts:
    """Views of a payload, see `TiledMap`."""

    panels: Tensor
    columns: Tensor
    scales: Tensor
    cells: Tensor


def tile_payload(lse: Tensor, panels: Tensor) -> tuple[Tensor, PayloadParts]:
    """A payload with its log-sum-exps `[H, N]` and panels (see `TiledMap`), and room for the tiles
    that these say it has."""
    heads, length = lse.shape
    tiles = int(panels[-1])
    sizes = _sizes(heads, length, tiles)
    payload = torch.empty(sum(sizes), dtype=torch.uint8)
    first, ends, columns, scales, cells = torch.split(payload, sizes)
    first.view(torch.float32).view(heads, length).copy_(lse)
    ends.view(torch.uint32).copy_(panels)
    columns[2 * tiles :] = 0  # an even number of them: what follows stays aligned to four bytes
    return payload, PayloadParts(
        ends.view(torch.uint32),
        columns.view(torch.uint16)[:tiles],
        scales.view(torch.bfloat16).view(-1, ROWS),
        cells.view(-1, ROWS, COLUMNS),
    )


def decode_tiles(
    payload: Tensor, layout: MapLayout, length: int, groups: tuple[int, ...] | None = None
) -> TiledMap:
    """The map of some KV groups from what `encode_tiles` made; nothing about it is trusted.

    Args:
        payload: 1-D contiguous uint8 on the CPU, copied from and not kept.
        layout: heads and mask of the layer.
        length: tokens of the stored sequence.
        groups: the KV heads whose query heads are wanted, ascending; None is all.

    Raises:
        ValueError: the payload does not fit the numbers, or the layer has no such groups.
    """
    groups = check_groups(layout, length, groups)
    head = _sizes(layout.num_heads, length, 0)
    if payload.dtype != torch.uint8 or payload.ndim != 1 or len(payload) < head[0] + head[1]:
        raise ValueError(_damaged(layout, length, f"{payload.dtype!r} {tuple(payload.shape)!r}"))
    if not payload.is_contiguous() or payload.storage_offset() % 4:
        payload = payload.clone()
    panels = payload[head[0] : head[0] + head[1]].view(torch.uint32).to(torch.int64)
    tiles = int(panels[-1])
    sizes = _sizes(layout.num_heads, length, tiles)
    if panels[0] != 0 or (panels.diff() < 0).any() or sum(sizes) != len(payload):
        raise ValueError(_damaged(layout, length, f"{len(payload)} bytes and {tiles} tiles"))
    lse, _, columns, scales, cells = torch.split(payload, sizes)
    own = layout.group * panels_of(length)  # panels of a KV group
    picked = [slice(int(panels[g * own]), int(panels[(g + 1) * own])) for g in groups]

    def of(part: Tensor) -> Tensor:
        return torch.cat([part[span] for span in picked])

    own_columns = of(columns.view(torch.uint16)[:tiles])
    own_scales = of(scales.view(torch.bfloat16).view(-1, ROWS))
    counts = panels.diff().view(layout.num_kv_heads, own)[list(groups)].flatten()
    own_panels = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(torch.uint32)
    if not is_sound(own_columns, own_scales, own_panels, length, layout.mask.causal):
        problem = "a tile that its rows cannot see, or a scale of more than probabilities"
        raise ValueError(_damaged(layout, length, problem))
    own_lse = lse.view(torch.float32).view(layout.num_kv_heads, -1)[list(groups)]
    return TiledMap(
        layout,
        length,
        groups,
        of(cells.view(-1, ROWS, COLUMNS)),
        own_scales,
        own_columns,
        own_panels,
        own_lse.reshape(-1, length).clone(),
    )


def _sizes(heads: int, length: int, tiles: int) -> list[int]:
    """Bytes of log-sum-exps, panels, columns (an even number of them), scales and cells."""
    return [
        4 * heads * length,
        4 * (heads * panels_of(length) + 1),
        2 * (tiles + tiles % 2),
        2 * ROWS * tiles,
        ROWS * COLUMNS * tiles,
    ]


def _damaged(layout: MapLayout, length: int, got: str) -> str:
    return (
        f"a tiled {layout.mask} map of {layout.num_heads} heads x {length} tokens must hold what "
        f"its numbers say, got {got}; treat the record as damaged"
    )
