# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from map_samples import masks, sees

from attncache_vllm.reuse.layout import MapLayout, Mask


@settings(deadline=None)
@given(masks, st.integers(1, 40))
def test_columns_cells_and_visible_agree_with_the_definition(mask: Mask, length: int) -> None:
    seen = [[sees(mask, row, column) for column in range(length)] for row in range(length)]
    assert mask.visible(length).tolist() == seen
    assert mask.cells(length) == sum(map(sum, seen))
    for row in range(length):
        first, last = mask.columns(row, length)
        assert seen[row] == [first <= column < last for column in range(length)]


@settings(deadline=None)
@given(masks, st.integers(1, 40), st.integers(0, 40))
def test_a_longer_text_changes_no_row_of_a_causal_map(mask: Mask, length: int, more: int) -> None:
    for row in range(length):
        shorter, longer = mask.columns(row, length), mask.columns(row, length + more)
        assert shorter[0] == longer[0]
        assert shorter == longer if mask.causal else shorter[1] == min(longer[1], length)


def test_a_window_counts_the_row_itself() -> None:
    assert Mask(window=1).visible(3).tolist() == torch.eye(3, dtype=torch.bool).tolist()
    assert Mask(window=4).columns(10, 20) == (7, 11)
    assert Mask(causal=False, window=4).columns(10, 20) == (7, 14)


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (Mask(), "causal"),
        (Mask(window=512), "causal, window 512"),
        (Mask(causal=False), "bidirectional"),
        (Mask(causal=False, window=64), "bidirectional, window 64"),
    ],
)
def test_a_mask_says_what_it_is(mask: Mask, text: str) -> None:
    assert str(mask) == text


@pytest.mark.parametrize("window", [0, -1, 2.0, "8", True])
def test_a_window_of_no_tokens_is_refused(window: Any) -> None:
    with pytest.raises(ValueError, match="window must be an integer of at least 1"):
        Mask(window=window)


def test_heads_share_kv_heads_evenly() -> None:
    assert [MapLayout(6, kv, Mask()).group for kv in (1, 2, 3, 6)] == [6, 3, 2, 1]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 3), (2, 4), (0, 1), (4, 0), (4, -2)])
def test_heads_that_do_not_divide_are_refused(num_heads: int, num_kv_heads: int) -> None:
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        MapLayout(num_heads, num_kv_heads, Mask())
