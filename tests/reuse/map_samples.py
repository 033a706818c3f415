# SPDX-License-Identifier: Apache-2.0
"""Masks by their definition, and attention in float64 to compare with."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from attncache_vllm.reuse.layout import Mask

windows = st.one_of(st.none(), st.integers(1, 320), st.sampled_from([1, 31, 32, 33, 64, 128]))
masks = st.builds(Mask, causal=st.booleans(), window=windows)
# Around the edges of row blocks, and anything.
lengths = st.one_of(
    st.sampled_from([1, 2, 31, 63, 64, 65, 127, 128, 129, 255, 256, 257]), st.integers(1, 300)
)


def sees(mask: Mask, row: int, column: int) -> bool:
    """The definition of a mask, one cell at a time."""
    if mask.causal and column > row:
        return False
    return mask.window is None or abs(row - column) < mask.window


def visible(mask: Mask, length: int) -> Tensor:
    """`[length, length]` bool, by definition."""
    row, column = torch.arange(length).view(-1, 1), torch.arange(length)
    seen = torch.ones(length, length, dtype=torch.bool)
    if mask.causal:
        seen &= column <= row
    if mask.window is not None:
        seen &= (row - column).abs() < mask.window
    return seen


def random_qkv(
    length: int, num_heads: int, num_kv_heads: int, head_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(length, heads, head_size) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    query, key, value = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    return query * 3, key, value  # sharper than uniform rows


def reference_scores(
    query: Tensor, key: Tensor, mask: Mask, soft_cap: float | None = None
) -> Tensor:
    """`[H, L, L]` float64, one head at a time; minus infinity where the mask hides."""
    length, num_heads, head_size = query.shape
    group = num_heads // key.shape[1]
    hidden = ~visible(mask, length)
    heads = []
    for head in range(num_heads):
        scores = query[:, head].double() @ key[:, head // group].double().T * head_size**-0.5
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        heads.append(scores.masked_fill(hidden, float("-inf")))
    return torch.stack(heads)


def reference_probs(
    query: Tensor, key: Tensor, mask: Mask, soft_cap: float | None = None
) -> Tensor:
    """`[H, L, L]` float64."""
    return reference_scores(query, key, mask, soft_cap).softmax(-1)


def product(probs: Tensor, value: Tensor) -> Tensor:
    """`probs @ value` in float64, `[H, L, L]` and `[L, KV, d]` to `[L, H * d]`."""
    group = len(probs) // value.shape[1]
    heads = [p.double() @ value[:, h // group].double() for h, p in enumerate(probs)]
    return torch.cat(heads, dim=1)
