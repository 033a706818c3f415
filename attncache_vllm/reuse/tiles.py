# SPDX-License-Identifier: Apache-2.0
"""Attention maps in tiles of 8-bit numbers, as they are stored and as they are multiplied.

A tile is 4 rows of a head by 32 columns. A cell is the square root of a probability, in 255ths of
the largest root of its row in the tile: a row of attention has a few large probabilities, that of
the text's first token above all, whose value is often near zero, and the many small ones make the
answer. Tiles that hide everything from their rows are not there, nor are those that together hold
next to nothing of what their rows have beside their largest probability; what is left of a row is
scaled to its old sum.

With ``m`` the largest probability of a tile's row, the error of a probability ``p`` is at most
``sqrt(p m) / 255 + m / 255**2 / 4`` from rounding, of both signs, and 1/128 of it from the scale.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from attncache_vllm.reuse.layout import MapLayout
from attncache_vllm.reuse.maps import RowBlock, RowBlocks, block_bounds, kv_index

try:
    import attncache_vllm.reuse._tiles as _tiles
except ImportError:  # not built: no compiler at installation
    _tiles = None  # type: ignore[assignment]

ROWS, COLUMNS = 4, 32
# Of what a row has beside its largest probability, the share that dropped tiles may hold.
DROPPED = 0.005
_LEAST = 1e-6
# That of a probability of 1, rounded up, in a row that was scaled up for what was dropped of it.
_LARGEST_SCALE = 1.02 / 255**2
# Values are multiplied in vectors of so many numbers.
WIDTH_MULTIPLE = 16


def why_not_native() -> str | None:
    """Why tiles cannot be multiplied as they are on this machine; None if they can."""
    if _tiles is None:
        return "the extension was not compiled; install again where there is a C compiler"
    if not _tiles.supported():
        return "the CPU has no AVX-512 BF16"
    return None


def multiplies(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether tiles are multiplied as they are with values of this device, dtype and width."""
    return (
        why_not_native() is None
        and device.type == "cpu"
        and dtype == torch.bfloat16
        and width % WIDTH_MULTIPLE == 0
    )


def panels_of(length: int) -> int:
    """Panels, of 4 rows, of a head of `length` tokens."""
    return -(-length // ROWS)


@dataclass(frozen=True, eq=False)
class TiledMap:
    """The map of some KV groups of one layer of one sequence.

    Attributes:
        layout: heads and mask of the layer.
        length: tokens of the sequence.
        groups: the KV heads whose query heads it holds, ascending.
        cells: `[T, 4, 32]` uint8.
        scales: `[T, 4]` bfloat16; a probability is its cell's square times its row's scale.
        columns: `[T]` uint16, the first column of a tile in units of 32.
        panels: `[len(groups) * G * panels + 1]` uint32; the tiles of panel p, head after head, are
            those from `panels[p]` to `panels[p + 1]`.
        lse: `[len(groups) * G, length]` float32, the log-sum-exp of each row's scores; None for a
            map that comes from no single sequence.
    """

    layout: MapLayout
    length: int
    groups: tuple[int, ...]
    cells: Tensor
    scales: Tensor
    columns: Tensor
    panels: Tensor
    lse: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        parts = [self.cells, self.scales, self.columns, self.panels, self.lse]
        return sum(part.nbytes for part in parts if part is not None)

    def to_dense(self) -> Tensor:
        """See `AttentionMap`."""
        dense = torch.zeros(
            self.layout.num_kv_heads,
            self.layout.group,
            self.length,
            self.length,
            dtype=torch.bfloat16,
        )
        dense[kv_index(self.groups)] = self._held().view(-1, *dense.shape[1:]).to(dense.dtype)
        return dense.flatten(0, 1)

    def to_blocks(self) -> RowBlocks:
        """The same map for devices and dtypes that tiles are not multiplied on."""
        held, mask = self._held().to(torch.bfloat16), self.layout.mask
        held = held.view(len(self.groups), self.layout.group, self.length, self.length)
        blocks = []
        for start, stop in block_bounds(mask, self.length):
            first = mask.columns(start, self.length)[0]
            last = mask.columns(stop - 1, self.length)[1]
            probs = held[:, :, start:stop, first:last].contiguous()
            blocks.append(RowBlock(start, stop, first, last, probs))
        return RowBlocks(self.layout, self.length, self.groups, tuple(blocks), self.lse)

    def pruned(self, dropped: float) -> TiledMap:
        """The same map without the tiles that together hold least: at most the share `dropped`, 0
        to 1, of what any of their rows has beside its largest probability. What is left of a row is
        scaled to its old sum."""
        if not dropped:
            return self
        prune = _prune if _tiles is None else _prune_natively
        cells, scales, columns, panels = prune(self, dropped)
        return replace(self, cells=cells, scales=scales, columns=columns, panels=panels)

    def _held(self) -> Tensor:
        """`[len(groups) * G, length, length]` float32."""
        heads = len(self.groups) * self.layout.group
        panels, wide = panels_of(self.length), -(-self.length // COLUMNS)
        counts = self.panels.to(torch.int64).diff()
        panel = torch.repeat_interleave(torch.arange(len(counts)), counts)
        tiles = torch.zeros(heads * panels, wide, ROWS, COLUMNS)
        probs = self.cells.float().square() * self.scales.float()[..., None]
        tiles[panel, self.columns.to(torch.int64)] = probs
        dense = tiles.view(heads, panels, wide, ROWS, COLUMNS).transpose(2, 3)
        dense = dense.reshape(heads, panels * ROWS, wide * COLUMNS)
        return dense[:, : self.length, : self.length]

    def multiply(self, value: Tensor, out: Tensor, rows: int) -> None:
        """See `AttentionMap`; `multiplies` says for which values.

        Sums are float32; a probability is rounded to bfloat16 before.
        """
        groups, length, width = value.shape
        assert _tiles is not None and multiplies(value.device, value.dtype, width)
        assert value.stride(2) == out.stride(3) == 1
        # Of a causal map no row that is wanted sees a tile beyond the values' last.
        padded = -(-length // COLUMNS) * COLUMNS
        scratch = _scratch(groups * padded * width)
        _tiles.multiply(
            self.cells.data_ptr(),
            self.scales.data_ptr(),
            self.columns.data_ptr(),
            self.panels.data_ptr(),
            value.data_ptr(),
            scratch.data_ptr(),
            out.data_ptr(),
            groups,
            self.layout.group,
            panels_of(self.length),
            rows,
            length,
            width,
            value.stride(0),
            value.stride(1),
            out.stride(0),
            out.stride(1),
            out.stride(2),
        )


_local = threading.local()


def _scratch(size: int) -> Tensor:
    """Room for so many bfloat16 numbers, one for each thread: fresh memory costs a page fault for
    every 4 KiB."""
    held: Tensor | None = getattr(_local, "scratch", None)
    if held is None or len(held) < size:
        held = _local.scratch = torch.empty(size, dtype=torch.bfloat16)
    return held


def tiled(blocks: RowBlocks) -> TiledMap:
    """The same map in tiles, as far as they keep it."""
    dense = blocks.to_dense().view(-1, blocks.layout.group, blocks.length, blocks.length)
    parts = tile(dense[kv_index(blocks.groups)].flatten(0, 1).float())
    return TiledMap(blocks.layout, blocks.length, blocks.groups, *parts, blocks.lse)


def tile(probs: Tensor, dropped: float = DROPPED) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cells, scales, columns and panels (see `TiledMap`) of probabilities `[H, N, N]` float32."""
    parts = _tile_natively(probs, dropped) if _tiles else [_tile_head(h, dropped) for h in probs]
    counts = torch.cat([counts for *_, counts in parts])
    panels = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    cells, scales, columns = (torch.cat([part[n] for part in parts]) for n in range(3))
    return cells, scales, columns, panels.to(torch.uint32)


def _tile_natively(probs: Tensor, dropped: float) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    assert _tiles is not None
    probs = probs.contiguous()
    heads, length, _ = probs.shape
    panels = panels_of(length)
    most = panels * -(-length // COLUMNS)
    cells = torch.empty(heads, most, ROWS, COLUMNS, dtype=torch.uint8)
    scales = torch.empty(heads, most, ROWS, dtype=torch.bfloat16)
    columns = torch.empty(heads, most, dtype=torch.uint16)
    counts = torch.empty(heads, panels, dtype=torch.int64)
    found = torch.empty(heads, dtype=torch.int64)
    _tiles.tile(
        probs.data_ptr(),
        heads,
        length,
        dropped,
        *(part.data_ptr() for part in (cells, scales, columns, counts, found)),
    )
    if (found < 0).any():
        raise MemoryError(f"no memory to tile a map of {length} tokens")
    return [
        (cells[head, :n], scales[head, :n], columns[head, :n], counts[head])
        for head, n in enumerate(found.tolist())
    ]


def _tile_head(probs: Tensor, dropped: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    length = len(probs)
    panels, wide = panels_of(length), -(-length // COLUMNS)
    padded = torch.zeros(panels * ROWS, wide * COLUMNS)
    padded[:length, :length] = probs
    tiles = padded.view(panels, ROWS, wide, COLUMNS).transpose(1, 2)
    mass = tiles.sum(-1)  # [panels, wide, 4]
    # The smallest tiles of a panel, as long as no row loses more than it may.
    beside = mass.sum(1) - tiles.amax((1, 3)) + _LEAST  # [panels, 4]
    worst = (mass / beside[:, None]).amax(-1)
    ordered, order = worst.sort(-1)
    kept = torch.empty_like(worst, dtype=torch.bool)
    kept.scatter_(1, order, ordered.cumsum(-1) > dropped)
    whole = mass.sum(1)  # [panels, 4]
    left = (mass * kept[..., None]).sum(1)
    grown = torch.where(left > 0, whole / left.clamp_min(1e-30), 1.0)
    largest = tiles.amax(-1)
    # Rounded up, so that the largest cell is at most 255.
    bits = (largest / 255**2).view(torch.int32)
    scales = (((bits + 0xFFFF) >> 16) << 16).view(torch.float32)
    roots = (tiles / scales.clamp_min(1e-38)[..., None]).sqrt()
    cells = roots.round().clamp(0, 255).to(torch.uint8)
    kept_scales = (scales * grown[:, None])[kept].to(torch.bfloat16)
    columns = torch.arange(wide).expand(panels, wide)[kept].to(torch.uint16)
    return cells[kept], kept_scales, columns, kept.sum(-1)


def _prune_natively(tiles: TiledMap, dropped: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert _tiles is not None
    cells, scales, columns = tiles.cells.clone(), tiles.scales.clone(), tiles.columns.clone()
    panels = tiles.panels.clone()
    left = _tiles.prune(
        cells.data_ptr(),
        scales.data_ptr(),
        columns.data_ptr(),
        panels.data_ptr(),
        len(panels) - 1,
        -(-tiles.length // COLUMNS),
        dropped,
    )
    # Copies again: a part of a tensor would keep the memory of all of it.
    return cells[:left].clone(), scales[:left].clone(), columns[:left].clone(), panels


def _prune(tiles: TiledMap, dropped: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scales = tiles.scales.float()
    probs = tiles.cells.float().square() * scales[..., None]
    mass, largest = probs.sum(-1), probs.amax(-1)  # [T, 4]
    counts = tiles.panels.to(torch.int64).diff()
    panel = torch.repeat_interleave(torch.arange(len(counts)), counts)
    whole = torch.zeros(len(counts), ROWS).index_add_(0, panel, mass)
    top = torch.zeros(len(counts), ROWS)
    np.maximum.at(top.numpy(), panel.numpy(), largest.numpy())
    worst = (mass / (whole - top + _LEAST)[panel]).amax(-1)
    order = worst.argsort(stable=True)
    order = order[panel[order].argsort(stable=True)]  # panel by panel, the smallest first
    reached = worst[order].double().cumsum(0)
    before = torch.cat([reached.new_zeros(1), reached])[(counts.cumsum(0) - counts)[panel]]
    kept = torch.empty_like(worst, dtype=torch.bool)
    kept[order] = reached - before > dropped
    left = torch.zeros_like(whole).index_add_(0, panel[kept], mass[kept])
    grown = torch.where(left > 0, whole / left.clamp_min(1e-30), 1.0)
    ends = torch.zeros_like(counts).index_add_(0, panel[kept], torch.ones_like(panel[kept]))
    panels = torch.cat([torch.zeros(1, dtype=torch.int64), ends.cumsum(0)]).to(torch.uint32)
    scales = (scales * grown[panel])[kept].to(torch.bfloat16)
    columns = tiles.columns.to(torch.int64)[kept].to(torch.uint16)
    return tiles.cells[kept], scales, columns, panels


def is_sound(columns: Tensor, scales: Tensor, panels: Tensor, length: int, causal: bool) -> bool:
    """Whether no panel has more tiles than its rows see, the product reads no further than the
    values go, and every scale is one of probabilities."""
    check = _is_sound if _tiles is None else _is_sound_natively
    return check(columns, scales, panels, length, causal)


def _is_sound(columns: Tensor, scales: Tensor, panels: Tensor, length: int, causal: bool) -> bool:
    last_row = torch.arange(panels_of(length)) * ROWS + ROWS - 1
    seen = last_row.clamp(max=length - 1) if causal else last_row * 0 + length - 1
    counts = panels.to(torch.int64).diff()
    last = seen.repeat(len(counts) // len(seen))
    return bool(
        (counts <= last // COLUMNS + 1).all()
        and (columns.to(torch.int64) * COLUMNS <= last.repeat_interleave(counts)).all()
        and ((scales >= 0) & (scales <= _LARGEST_SCALE)).all()
    )


def _is_sound_natively(
    columns: Tensor, scales: Tensor, panels: Tensor, length: int, causal: bool
) -> bool:
    assert _tiles is not None
    largest = int(torch.tensor(_LARGEST_SCALE, dtype=torch.bfloat16).view(torch.int16))
    return _tiles.sound(
        columns.data_ptr(),
        scales.data_ptr(),
        panels.data_ptr(),
        len(panels) - 1,
        panels_of(length),
        length,
        causal,
        largest,
    )
