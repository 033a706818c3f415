# SPDX-License-Identifier: Apache-2.0
"""What the attention map of one layer looks like: its heads, and what each row can see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """Which columns (keys) a row (query) of a map can see; a row always sees itself.

    Attributes:
        causal: a row sees no column after itself.
        window: a row sees columns less than this many tokens away, in the sense of vLLM and
            Hugging Face: a causal window of w is w tokens with the row itself. None is no bound.

    Raises:
        ValueError: the window is not an integer of at least 1.
    """

    causal: bool = True
    window: int | None = None

    def __post_init__(self) -> None:
        window = self.window
        if window is not None and (
            isinstance(window, bool) or not isinstance(window, int) or window < 1
        ):
            raise ValueError(
                f"window must be an integer of at least 1, or None, got {window!r}; "
                "take it from the model's attention layer"
            )

    def __str__(self) -> str:
        kind = "causal" if self.causal else "bidirectional"
        return kind if self.window is None else f"{kind}, window {self.window}"

    def columns(self, row: int, length: int) -> tuple[int, int]:
        """The half-open range of columns that `row` of a map of `length` tokens sees.

        Of a causal mask it does not depend on `length`.
        """
        before = after = length if self.window is None else self.window
        if self.causal:
            after = 1
        return max(0, row - before + 1), min(length, row + after)

    def cells(self, length: int) -> int:
        """How many cells of a map of `length` tokens are visible."""
        window = length if self.window is None else min(self.window, length)
        lower = length * window - window * (window - 1) // 2  # with the diagonal
        return lower if self.causal else 2 * lower - length

    def visible(self, length: int, device: torch.device | None = None) -> Tensor:
        """`[length, length]` bool: whether the row sees the column."""
        seen = torch.ones(length, length, dtype=torch.bool, device=device)
        if self.window is not None:
            seen = seen.triu(1 - self.window).tril(self.window - 1)
        return seen.tril() if self.causal else seen


@dataclass(frozen=True)
class MapLayout:
    """What the map of one layer looks like, whatever the sequence.

    Attributes:
        num_heads: query heads.
        num_kv_heads: KV heads; query head `h` belongs to KV head `h // group`.
        mask: what its rows can see.

    Raises:
        ValueError: a count is below 1, or the heads do not divide evenly.
    """

    num_heads: int
    num_kv_heads: int
    mask: Mask

    def __post_init__(self) -> None:
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                "num_heads must be a positive multiple of num_kv_heads, "
                f"got {heads!r} and {kv_heads!r}; take both from the model's attention layer"
            )

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads
