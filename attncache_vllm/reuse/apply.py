# SPDX-License-Identifier: Apache-2.0
"""Attention maps as dense row blocks, and their product with the values of a sequence.

A causal map is a lower triangle. Cut into about four row blocks, each holding only the columns
its rows can see, 62.5 % of the square is multiplied; smaller tiles skip more zeros but cost more
in calls than they save. A window hides more, and is cut into blocks of about its size; where
everything is visible, one block is the whole map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attncache_vllm.reuse.layout import MapLayout, Mask

_CAUSAL_BLOCKS = 4
_MIN_ROWS = 64
_ROW_MULTIPLE = 32


def block_bounds(mask: Mask, length: int) -> list[tuple[int, int]]:
    """Cut `length` rows into half-open ranges that cover them in order.

    Every range starts at a multiple of 32 and has at least 64 rows, unless `length` is less.

    Raises:
        ValueError: `length` is below 1.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length!r}; skip empty sequences")
    count = 1 if mask.window is None else length // max(_MIN_ROWS, mask.window)
    if mask.causal:
        count = max(count, min(_CAUSAL_BLOCKS, length // _MIN_ROWS))
    count = max(1, count)
    edges = [i * length // (count * _ROW_MULTIPLE) * _ROW_MULTIPLE for i in range(count)]
    return list(zip(edges, [*edges[1:], length], strict=True))


@dataclass(frozen=True)
class RowBlock:
    """Rows `start:stop` of a map and the columns `first:last`, which hold all that they can see.

    Attributes:
        probs: `[KV, G, stop - start, last - first]` bfloat16, contiguous, zero where the mask
            hides.
    """

    start: int
    stop: int
    first: int
    last: int
    probs: Tensor


@dataclass(frozen=True)
class RowBlocks:
    """The map of one layer of one sequence of `length` tokens, blocks in row order."""

    layout: MapLayout
    length: int
    blocks: tuple[RowBlock, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held by the probabilities."""
        return sum(block.probs.nbytes for block in self.blocks)

    def to(self, device: torch.device) -> RowBlocks:
        """The same map on ``device``; itself where it is there already."""
        return replace(
            self, blocks=tuple(replace(b, probs=b.probs.to(device)) for b in self.blocks)
        )

    def to_dense(self) -> Tensor:
        """The map as `[num_heads, length, length]` bfloat16 (a copy; for tests and reports)."""
        dense = torch.zeros(self.layout.num_heads, self.length, self.length, dtype=torch.bfloat16)
        for block in self.blocks:
            rows, columns = slice(block.start, block.stop), slice(block.first, block.last)
            dense[:, rows, columns] = block.probs.flatten(0, 1)
        return dense


def apply_map(maps: RowBlocks, value: Tensor, out: Tensor) -> None:
    """Write `map @ value` of every head into `out`, as attention would.

    A query shorter than a causal map uses its leading block: row `i` depends on the tokens `0..i`
    only, so that block is the exact map of the prefix, with and without a window. A bidirectional
    map serves its own length only; `crop` makes a shorter one.

    Args:
        maps: map of a sequence of `L` tokens, or of at least `L` if it is causal.
        value: `[L, KV, d]`, any float dtype; the product is computed in this dtype.
        out: `[L, KV * G * d]`, overwritten; query head `h = kv * G + g` at `h * d:(h + 1) * d`.

    Raises:
        ValueError: a shape does not fit the map, or the map does not serve the length.
    """
    layout = maps.layout
    if value.ndim != 3 or value.shape[1] != layout.num_kv_heads:
        raise ValueError(
            f"value must be [L, {layout.num_kv_heads}, d] for this map, "
            f"got {tuple(value.shape)!r}; use maps recorded from the same model"
        )
    length, num_kv_heads, head_size = value.shape
    shortest = 1 if layout.mask.causal else maps.length
    if not shortest <= length <= maps.length:
        raise ValueError(
            f"a {layout.mask} map of {maps.length} tokens serves {shortest} to {maps.length} "
            f"tokens, got {length!r}; match only entries that are long enough, and crop a "
            "bidirectional one"
        )
    if out.shape != (length, layout.num_heads * head_size):
        raise ValueError(
            f"out must be [{length}, {layout.num_heads * head_size}], got {tuple(out.shape)!r}; "
            "allocate one row per token and head_size columns per query head"
        )
    out_heads = out.view(length, num_kv_heads, layout.group, head_size).permute(1, 2, 0, 3)
    value_heads = value.transpose(0, 1)
    for block in maps.blocks:
        if block.start >= length:
            break
        stop, last = min(block.stop, length), min(block.last, length)
        # A view, except in the one block that `length` cuts short.
        probs = block.probs[:, :, : stop - block.start, : last - block.first]
        # The heads of a KV group are rows of one product, so no value is repeated.
        product = torch.bmm(
            probs.reshape(num_kv_heads, -1, last - block.first).to(value.dtype),
            value_heads[:, block.first : last],
        )
        out_heads[:, :, block.start : stop] = product.view(
            num_kv_heads, layout.group, -1, head_size
        )


def crop(maps: RowBlocks, length: int) -> RowBlocks:
    """The leading `length` x `length` block of a bidirectional map, each row scaled to sum 1 again.

    That is the softmax over the columns that are left, an approximation of the map of the prefix,
    whose tokens never saw the rest. It is computed in float32 and rounded to bfloat16. A row of
    which nothing is left (less than 1.2e-38) is spread evenly over the columns it can see.

    A causal map is returned as it is: it holds the exact maps of its prefixes (see `apply_map`).
    So is any map that has the length already.

    Raises:
        ValueError: `length` is not in `1..maps.length`.
    """
    if not 1 <= length <= maps.length:
        raise ValueError(
            f"a map of {maps.length} tokens can be cropped to 1 to {maps.length}, got {length!r}; "
            "match only entries at least as long as the query"
        )
    mask = maps.layout.mask
    if mask.causal or length == maps.length:
        return maps
    blocks = []
    for block in maps.blocks:
        if block.start >= length:
            break
        stop, last = min(block.stop, length), min(block.last, length)
        probs = block.probs[:, :, : stop - block.start, : last - block.first].float()
        total = probs.sum(-1, keepdim=True)
        lost = total < torch.finfo(torch.float32).tiny
        probs /= total.masked_fill(lost, 1)
        for kv_head, member, row, _ in lost.nonzero().tolist():
            seen = slice(*(c - block.first for c in mask.columns(block.start + row, length)))
            probs[kv_head, member, row, seen] = 1 / (seen.stop - seen.start)
        blocks.append(RowBlock(block.start, stop, block.first, last, probs.bfloat16()))
    return RowBlocks(maps.layout, length, tuple(blocks))


def exact_probs(
    query: Tensor, key: Tensor, scale: float, mask: Mask, soft_cap: float | None = None
) -> Tensor:
    """Attention probabilities, `softmax(cap(scale * query @ key^T))`, for recording.

    Args:
        query: `[L, H, d]`, after the position encoding, any float dtype.
        key: `[L, KV, d]`, likewise; `H` is a multiple of `KV`.
        scale: factor on the scores, usually `d ** -0.5`.
        mask: which columns a row sees.
        soft_cap: bounds the scores before the mask as Gemma 2 does (arXiv 2408.00118),
            `cap(s) = soft_cap * tanh(s / soft_cap)`; None leaves them as they are.

    Returns:
        `[H, L, L]` float32, rows sum to 1, zero where the mask hides.

    Raises:
        ValueError: the shapes disagree, or the cap is not a finite number above 0.
    """
    if query.ndim != 3 or key.ndim != 3 or query.shape[::2] != key.shape[::2]:
        raise ValueError(
            "query and key must be [L, heads, d] with equal L and d, "
            f"got {tuple(query.shape)!r} and {tuple(key.shape)!r}; pass one whole sequence"
        )
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(
            f"soft_cap must be a finite number above 0, got {soft_cap!r}; None is no cap"
        )
    length, num_heads, head_size = query.shape
    group = MapLayout(num_heads, key.shape[1], mask).group
    # As in apply_map, the query heads of a KV group are rows of one product.
    rows = query.float().transpose(0, 1).reshape(-1, group * length, head_size)
    scores = torch.bmm(rows, key.float().permute(1, 2, 0)).view(num_heads, length, length)
    if soft_cap is None:
        scores.mul_(scale)
    else:
        scores.mul_(scale / soft_cap).tanh_().mul_(soft_cap)
    return scores.masked_fill_(~mask.visible(length, query.device), float("-inf")).softmax(-1)
