# SPDX-License-Identifier: Apache-2.0
"""Attention maps, and their plain form: dense row blocks.

A causal map is a lower triangle. Cut into about four row blocks, each holding only the columns
its rows can see, 62.5 % of the square is multiplied; smaller tiles skip more zeros but cost more
in calls than they save. A window hides more, and is cut into blocks of about its size; where
everything is visible, one block is the whole map.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

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


def kv_index(groups: tuple[int, ...]) -> slice | list[int]:
    """What selects these KV heads: a slice, which copies nothing, where they lie side by side."""
    first, last = groups[0], groups[-1]
    return slice(first, last + 1) if last - first + 1 == len(groups) else list(groups)


class AttentionMap(Protocol):
    """The map of one layer of one sequence, in a form that can be multiplied.

    Attributes:
        layout: heads and mask of the layer.
        length: tokens of the sequence.
        groups: the KV heads whose query heads it holds, ascending.
        lse: `[len(groups) * G, length]` float32, the log-sum-exp of each row's scaled, capped and
            masked scores; None for a map that comes from no single sequence.
    """

    @property
    def layout(self) -> MapLayout: ...

    @property
    def length(self) -> int: ...

    @property
    def groups(self) -> tuple[int, ...]: ...

    @property
    def lse(self) -> Tensor | None: ...

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    def multiply(self, value: Tensor, out: Tensor, rows: int) -> None:
        """Write the first rows of `map @ value` of every head that it holds into `out`.

        Args:
            value: `[len(groups), L, width]` of the KV heads that it holds, contiguous rows; where
                the first rows see no column from L on, L may be below the length.
            out: `[len(groups), G, rows, width]`, contiguous rows.
            rows: at most the map's length.
        """

    def to_dense(self) -> Tensor:
        """The map as `[num_heads, length, length]` bfloat16, zero in the heads it does not hold.

        A copy, for tests and reports.
        """


@dataclass(frozen=True)
class RowBlock:
    """Rows `start:stop` of a map and the columns `first:last`, which hold all that they can see.

    Attributes:
        probs: `[len(groups), G, stop - start, last - first]` bfloat16, contiguous, zero where the
            mask hides.
    """

    start: int
    stop: int
    first: int
    last: int
    probs: Tensor


@dataclass(frozen=True)
class RowBlocks:
    """A map as dense `blocks`, in row order; see `AttentionMap`."""

    layout: MapLayout
    length: int
    groups: tuple[int, ...]
    blocks: tuple[RowBlock, ...]
    lse: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held by the probabilities and the log-sum-exps."""
        held = sum(block.probs.nbytes for block in self.blocks)
        return held if self.lse is None else held + self.lse.nbytes

    def to(self, device: torch.device) -> RowBlocks:
        """The same map on ``device``; itself where it is there already."""
        return replace(
            self,
            blocks=tuple(replace(b, probs=b.probs.to(device)) for b in self.blocks),
            lse=None if self.lse is None else self.lse.to(device),
        )

    def multiply(self, value: Tensor, out: Tensor, rows: int) -> None:
        """See `AttentionMap`; computed in the dtype of `value`."""
        for block in self.blocks:
            if block.start >= rows:
                break
            stop, last = min(block.stop, rows), min(block.last, value.shape[1])
            out[:, :, block.start : stop] = _product(block, stop, last, value)

    def to_dense(self) -> Tensor:
        """See `AttentionMap`."""
        size = self.length
        groups = torch.zeros(
            self.layout.num_kv_heads, self.layout.group, size, size, dtype=torch.bfloat16
        )
        held = kv_index(self.groups)
        for block in self.blocks:
            rows, columns = slice(block.start, block.stop), slice(block.first, block.last)
            groups[held, :, rows, columns] = block.probs.cpu()
        return groups.flatten(0, 1)


def _product(block: RowBlock, stop: int, last: int, value: Tensor) -> Tensor:
    """Rows `block.start:stop` times `value` `[n, tokens, d]` up to column `last`: `[n, G, R, d]`.

    The heads of a KV group are rows of one product, so no value is repeated.
    """
    # A view, except in the one block that is cut short.
    probs = block.probs[:, :, : stop - block.start, : last - block.first]
    groups, group, rows, columns = probs.shape
    product = torch.bmm(
        probs.reshape(groups, -1, columns).to(value.dtype), value[:, block.first : last]
    )
    return product.view(groups, group, rows, value.shape[2])
