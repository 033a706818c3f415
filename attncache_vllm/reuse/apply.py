# SPDX-License-Identifier: Apache-2.0
"""Attention maps as dense row blocks, and their product with the values of a sequence.

A causal map is a lower triangle. Cut into about four row blocks, each holding only the columns
its last row can see, 62.5 % of the square is multiplied; smaller tiles skip more zeros but cost
more in calls than they save.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_MAX_BLOCKS = 4
_MIN_ROWS = 64
_ROW_MULTIPLE = 32


def block_bounds(length: int) -> list[tuple[int, int]]:
    """Cut `length` rows into at most four half-open ranges that cover them in order.

    Every range starts at a multiple of 32 and has at least 64 rows, unless `length` is less.

    Raises:
        ValueError: `length` is below 1.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length!r}; skip empty sequences")
    count = max(1, min(_MAX_BLOCKS, length // _MIN_ROWS))
    edges = [i * length // (count * _ROW_MULTIPLE) * _ROW_MULTIPLE for i in range(count)]
    return list(zip(edges, [*edges[1:], length], strict=True))


def query_heads_per_kv_head(num_heads: int, num_kv_heads: int) -> int:
    """Query heads that share one KV head; query head `h` belongs to KV head `h // group`.

    Raises:
        ValueError: a count is below 1, or the heads do not divide evenly.
    """
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            "num_heads must be a positive multiple of num_kv_heads, "
            f"got {num_heads!r} and {num_kv_heads!r}; take both from the model's attention layer"
        )
    return num_heads // num_kv_heads


@dataclass(frozen=True)
class RowBlock:
    """Rows `start:stop` of a causal map and the columns `0:stop` they can see.

    Attributes:
        probs: `[KV, G, stop - start, stop]` bfloat16, contiguous, zero above the diagonal.
    """

    start: int
    stop: int
    probs: Tensor


@dataclass(frozen=True)
class RowBlocks:
    """The causal map of one layer of one sequence of `length` tokens, blocks in row order."""

    length: int
    num_heads: int
    num_kv_heads: int
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
        dense = torch.zeros(self.num_heads, self.length, self.length, dtype=torch.bfloat16)
        for block in self.blocks:
            dense[:, block.start : block.stop, : block.stop] = block.probs.flatten(0, 1)
        return dense


def apply_map(maps: RowBlocks, value: Tensor, out: Tensor) -> None:
    """Write `map @ value` of every head into `out`, as attention would.

    A query shorter than the map uses its leading block: row `i` of a causal map depends on the
    tokens `0..i` only, so that block is the exact map of the prefix.

    Args:
        maps: map of a sequence of at least `L` tokens.
        value: `[L, KV, d]`, any float dtype; the product is computed in this dtype.
        out: `[L, KV * G * d]`, overwritten; query head `h = kv * G + g` at `h * d:(h + 1) * d`.

    Raises:
        ValueError: a shape does not fit the map, or the sequence is longer than the map.
    """
    group = query_heads_per_kv_head(maps.num_heads, maps.num_kv_heads)
    if value.ndim != 3 or value.shape[1] != maps.num_kv_heads:
        raise ValueError(
            f"value must be [L, {maps.num_kv_heads}, d] for this map, got {tuple(value.shape)!r}; "
            "use maps recorded from the same model"
        )
    length, num_kv_heads, head_size = value.shape
    if not 1 <= length <= maps.length:
        raise ValueError(
            f"a map of {maps.length} tokens serves 1 to {maps.length} tokens, got {length!r}; "
            "match only entries at least as long as the query"
        )
    if out.shape != (length, maps.num_heads * head_size):
        raise ValueError(
            f"out must be [{length}, {maps.num_heads * head_size}], got {tuple(out.shape)!r}; "
            "allocate one row per token and head_size columns per query head"
        )
    out_heads = out.view(length, num_kv_heads, group, head_size).permute(1, 2, 0, 3)
    value_heads = value.transpose(0, 1)
    for block in maps.blocks:
        if block.start >= length:
            break
        stop = min(block.stop, length)
        # A view, except in the one block that `length` cuts short.
        probs = block.probs[:, :, : stop - block.start, :stop].reshape(num_kv_heads, -1, stop)
        # The heads of a KV group are rows of one product, so no value is repeated.
        product = torch.bmm(probs.to(value.dtype), value_heads[:, :stop])
        out_heads[:, :, block.start : stop] = product.view(num_kv_heads, group, -1, head_size)


def exact_causal_probs(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Causal attention probabilities, `softmax(scale * query @ key^T)`, for recording.

    Args:
        query: `[L, H, d]`, after the position encoding, any float dtype.
        key: `[L, KV, d]`, likewise; `H` is a multiple of `KV`.
        scale: factor on the scores, usually `d ** -0.5`.

    Returns:
        `[H, L, L]` float32, rows sum to 1, zero above the diagonal.

    Raises:
        ValueError: the shapes disagree.
    """
    if query.ndim != 3 or key.ndim != 3 or query.shape[::2] != key.shape[::2]:
        raise ValueError(
            "query and key must be [L, heads, d] with equal L and d, "
            f"got {tuple(query.shape)!r} and {tuple(key.shape)!r}; pass one whole sequence"
        )
    length, num_heads, head_size = query.shape
    group = query_heads_per_kv_head(num_heads, key.shape[1])
    # As in apply_map, the query heads of a KV group are rows of one product.
    rows = query.float().transpose(0, 1).reshape(-1, group * length, head_size)
    scores = torch.bmm(rows, key.float().permute(1, 2, 0)).view(num_heads, length, length)
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    return scores.mul_(scale).masked_fill_(future, float("-inf")).softmax(-1)
