# SPDX-License-Identifier: Apache-2.0
"""Tiled maps: what they keep, what they refuse, and that their native product is their product."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from map_samples import product
from torch import Tensor

from attncache_vllm.names import CodecName
from attncache_vllm.reuse import tiles
from attncache_vllm.reuse.apply import apply_map
from attncache_vllm.reuse.codec import encode_map
from attncache_vllm.reuse.codecs import CODECS, DEFAULT_CODEC, decode_blocks, servable
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.maps import RowBlocks
from attncache_vllm.reuse.tile_codec import decode_tiles, encode_tiles
from attncache_vllm.reuse.tiles import (
    COLUMNS,
    DROPPED,
    ROWS,
    TiledMap,
    multiplies,
    panels_of,
)

CPU = torch.device("cpu")
NATIVE = multiplies(CPU, torch.bfloat16, 16)
native = pytest.mark.skipif(not NATIVE, reason="no compiled tiles, or no AVX-512 BF16 here")

masks = st.sampled_from([Mask(), Mask(causal=False), Mask(window=40), Mask(False, 20)])
lengths = st.integers(1, 150)
seeds = st.integers(0, 2**16)


def sample(mask: Mask, length: int, seed: int, kv_heads: int = 2) -> tuple[MapLayout, Tensor]:
    """A map as attention makes them: a few large probabilities in a crowd of small ones."""
    generator = torch.Generator().manual_seed(seed)
    layout = MapLayout(2 * kv_heads, kv_heads, mask)
    scores = 3 * torch.randn(layout.num_heads, length, length, generator=generator)
    scores[:, :, 0] += 5
    return layout, scores.masked_fill(~mask.visible(length), -torch.inf).softmax(-1)


def tiled(layout: MapLayout, probs: Tensor, groups: tuple[int, ...] | None = None) -> TiledMap:
    lse = torch.arange(probs.shape[0] * probs.shape[1]).float().view(probs.shape[:2])
    return decode_tiles(encode_tiles(probs, lse, layout.mask), layout, probs.shape[-1], groups)


@given(masks, lengths, seeds)
@settings(max_examples=60, deadline=None)
def test_what_is_kept_is_within_the_stated_bound(mask: Mask, length: int, seed: int) -> None:
    layout, probs = sample(mask, length, seed)
    found = tiled(layout, probs)
    dense = found._held()
    visible = mask.visible(length)
    # Whole panels of 4 rows see what one of them sees.
    assert not dense[:, ~visible].any()
    padded = torch.nn.functional.pad(probs, (0, -length % COLUMNS))
    of_tiles = padded.unflatten(-1, (-1, COLUMNS))
    largest = of_tiles.amax(-1, keepdim=True)
    rounding = (of_tiles * largest).sqrt() / 255 + largest / 255**2 / 4
    beside = probs.sum(-1) - probs.amax(-1)
    bound = 1.01 * rounding.sum((-1, -2)) + 2 * DROPPED * beside + probs.sum(-1) / 128
    assert ((dense - probs).abs().sum(-1) <= bound).all()
    torch.testing.assert_close(dense.sum(-1), probs.sum(-1), atol=0.02, rtol=0)
    assert found.nbytes < 2 * probs.numel() or length < 64


@given(lengths, seeds)
@settings(max_examples=30, deadline=None)
def test_small_tiles_are_dropped_and_rows_scaled_up(length: int, seed: int) -> None:
    layout, probs = sample(Mask(), length, seed)
    cells, scales, columns, panels = tiles.tile(probs, dropped=0.1)
    every = tiles.tile(probs, dropped=0.0)
    assert len(columns) <= len(every[2])
    zeros = torch.zeros(layout.num_heads, length)
    few = TiledMap(layout, length, (0, 1), cells, scales, columns, panels, zeros)._held()
    present = few > 0
    gone = (probs * ~present).sum(-1)  # what is rounded to 0, too
    assert (gone <= 0.1 * (1 - probs.amax(-1)) + 1e-3).all()
    torch.testing.assert_close(few.sum(-1), probs.sum(-1), atol=0.02, rtol=0)


@given(masks, lengths, seeds, st.sampled_from([0.0, 0.005, 0.1]))
@settings(max_examples=60, deadline=None)
@pytest.mark.skipif(tiles._tiles is None, reason="no compiled tiles")
def test_compiled_or_not_the_tiles_are_the_same(
    mask: Mask, length: int, seed: int, dropped: float
) -> None:
    _, probs = sample(mask, length, seed)
    natively = tiles._tile_natively(probs, dropped)
    for (cells, scales, columns, counts), head in zip(natively, probs, strict=True):
        expected = tiles._tile_head(head, dropped)
        assert torch.equal(counts, expected[3]) and torch.equal(columns, expected[2])
        torch.testing.assert_close(scales.float(), expected[1].float(), atol=0, rtol=2**-7)
        assert (cells.int() - expected[0].int()).abs().max() <= 1


@given(masks, lengths, seeds, st.sampled_from([0.02, 0.1, 0.5]))
@settings(max_examples=60, deadline=None)
def test_pruning_takes_no_more_of_a_row_than_allowed_and_keeps_its_sum(
    mask: Mask, length: int, seed: int, dropped: float
) -> None:
    layout, probs = sample(mask, length, seed)
    every = tiled(layout, probs)
    few = every.pruned(dropped)
    before, after = every._held(), few._held()
    assert len(few.columns) <= len(every.columns) and few.nbytes <= every.nbytes
    gone = (before * (after == 0)).sum(-1)
    # Scales are rounded to 1 in 128.
    assert (gone <= (dropped + 0.01) * (before.sum(-1) - before.amax(-1)) + 1e-3).all()
    torch.testing.assert_close(after.sum(-1), before.sum(-1), atol=0.02, rtol=0)
    assert few.pruned(0.0) is few


@given(masks, lengths, seeds, st.sampled_from([0.02, 0.1, 0.5]))
@settings(max_examples=60, deadline=None)
@pytest.mark.skipif(tiles._tiles is None, reason="no compiled tiles")
def test_compiled_or_not_the_same_tiles_are_pruned(
    mask: Mask, length: int, seed: int, dropped: float
) -> None:
    layout, probs = sample(mask, length, seed)
    every = tiled(layout, probs, (1,))
    found, expected = tiles._prune_natively(every, dropped), tiles._prune(every, dropped)
    for part in (0, 2, 3):
        assert torch.equal(found[part], expected[part])
    torch.testing.assert_close(found[1].float(), expected[1].float(), atol=0, rtol=2**-7)


def test_a_panel_with_more_tiles_than_its_rows_see_is_refused() -> None:
    """Whoever prunes has room for as many as there can be."""
    layout, probs = sample(Mask(causal=False), 64, 0, kv_heads=1)
    tiles_of = tiled(layout, probs)
    for is_sound in (tiles._is_sound, *([tiles._is_sound_natively] if tiles._tiles else [])):
        counts = torch.tensor([0, 3] + [3] * (len(tiles_of.panels) - 2)).to(torch.uint32)
        columns, scales = tiles_of.columns[:3].clone(), tiles_of.scales[:3]
        assert not is_sound(columns, scales, counts, 64, causal=False)


def test_what_the_first_token_leaves_over_is_kept_though_it_be_little() -> None:
    """Its value is often near zero: then the others' few percent are the whole answer."""
    layout, probs = sample(Mask(), 300, 4)
    probs[:, 1:] *= 0.03 / (1 - probs[:, 1:, :1])
    probs[:, 1:, 0] = 0.97
    value = torch.randn(300, 2, 16, generator=torch.Generator().manual_seed(0))
    value[0] = 0
    exact = product(probs, value)
    error = product(tiled(layout, probs)._held(), value) - exact
    assert error.norm() < 0.02 * exact.norm()


def test_log_sum_exps_and_groups_are_those_that_were_encoded() -> None:
    layout, probs = sample(Mask(), 70, 0, kv_heads=3)
    every = tiled(layout, probs)
    assert every.lse is not None and every.lse.flatten().tolist() == list(range(6 * 70))
    for groups in ((0,), (1,), (0, 2), (1, 2)):
        own = tiled(layout, probs, groups)
        heads = [2 * group + member for group in groups for member in range(2)]
        assert own.groups == groups
        assert own.lse is not None and torch.equal(own.lse, every.lse[heads])
        assert torch.equal(own._held(), every._held()[heads])
        dense = own.to_dense()
        assert dense.shape == (6, 70, 70) and dense.dtype == torch.bfloat16
        others = [head for head in range(6) if head not in heads]
        assert not dense[others].any()
        assert torch.equal(dense[heads], every.to_dense()[heads])


@given(masks, lengths, seeds, st.sampled_from([16, 32, 48, 64, 80, 128]))
@settings(max_examples=60, deadline=None)
@native
def test_the_native_product_is_the_product(mask: Mask, length: int, seed: int, width: int) -> None:
    layout, probs = sample(mask, length, seed)
    found = tiled(layout, probs)
    value = torch.randn(length, 2, width, generator=torch.Generator().manual_seed(seed))
    value = value.to(torch.bfloat16)
    out = torch.full((length, layout.num_heads * width), torch.nan, dtype=torch.bfloat16)
    apply_map(found, value, out)
    expected = product(found._held(), value.float()).float()
    torch.testing.assert_close(out.float(), expected, atol=0.02, rtol=0.02)
    blocks = torch.empty_like(out)
    apply_map(found.to_blocks(), value, blocks)
    torch.testing.assert_close(out, blocks, atol=0.03, rtol=0.03)


@given(lengths, lengths, seeds)
@settings(max_examples=40, deadline=None)
@native
def test_a_causal_map_serves_shorter_texts_natively(length: int, longer: int, seed: int) -> None:
    total = max(length, longer)
    layout, probs = sample(Mask(), total, seed)
    found = tiled(layout, probs)
    length = min(length, longer)
    value = torch.randn(length, 2, 32, generator=torch.Generator().manual_seed(seed))
    out = torch.full((length, 4 * 32), torch.nan, dtype=torch.bfloat16)
    apply_map(found, value.to(torch.bfloat16), out)
    expected = product(found._held()[:, :length, :length], value.to(torch.bfloat16).float())
    torch.testing.assert_close(out.float(), expected.float(), atol=0.02, rtol=0.02)


@native
def test_heads_that_are_not_held_stay_as_they_are_and_rows_may_be_strided() -> None:
    layout, probs = sample(Mask(), 50, 1, kv_heads=4)
    found = tiled(layout, probs, (1, 3))
    wide = torch.randn(50, 3 * 4 * 16).to(torch.bfloat16)
    value = wide[:, 64:128].view(50, 4, 16)
    out = torch.full((50, 8 * 16), 7.0, dtype=torch.bfloat16)
    apply_map(found, value, out)
    heads = out.view(50, 8, 16)
    assert (heads[:, [0, 1, 4, 5]] == 7).all()
    expected = product(found.to_dense().float(), value.float()).float().view(50, 8, 16)
    torch.testing.assert_close(
        heads[:, [2, 3, 6, 7]].float(), expected[:, [2, 3, 6, 7]], atol=0.02, rtol=0.02
    )


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_are_refused_or_harmless(data: st.DataObject) -> None:
    layout, probs = sample(Mask(), 40, 0)
    payload = encode_tiles(probs, torch.zeros(4, 40), layout.mask)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(payload) - 1))
        payload[at] = data.draw(st.integers(0, 255))
    payload = payload[: data.draw(st.integers(len(payload) - 3, len(payload)))]
    try:
        found = decode_tiles(payload, layout, 40)
    except ValueError as error:
        assert "treat the record as damaged" in str(error)
        return
    assert found.columns.to(torch.int32).max() * COLUMNS < 40
    assert int(found.panels[-1]) == len(found.cells) == len(found.scales) == len(found.columns)
    assert (found.panels.to(torch.int64).diff() >= 0).all()
    dense = found._held()
    assert dense.isfinite().all() and dense.min() >= 0 and dense.max() <= 1.02
    assert not dense.triu(ROWS + COLUMNS).any(), "the product reads no value past the text's end"


def test_a_tile_that_its_rows_cannot_see_is_refused() -> None:
    """Served to a shorter text, it would be multiplied with what lies behind the values."""
    layout, probs = sample(Mask(), 100, 0)
    later = probs.clone()
    later[0, 2, 90] = 0.5
    payload = encode_tiles(later, torch.zeros(4, 100), Mask(causal=False))
    assert decode_tiles(payload, MapLayout(4, 2, Mask(causal=False)), 100).length == 100
    with pytest.raises(ValueError, match="a tile that its rows cannot see"):
        decode_tiles(payload, layout, 100)


@pytest.mark.parametrize("size", [0, 1, 100])
def test_too_few_bytes_are_refused(size: int) -> None:
    layout = MapLayout(4, 2, Mask())
    with pytest.raises(ValueError, match="treat the record as damaged"):
        decode_tiles(torch.zeros(size, dtype=torch.uint8), layout, 40)


@pytest.mark.parametrize("bad", [torch.nan, -0.1, 1.5])
def test_what_is_no_probability_is_not_recorded(bad: float) -> None:
    layout, probs = sample(Mask(), 10, 0)
    probs[0, 5, 3] = bad
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        encode_tiles(probs, torch.zeros(4, 10), layout.mask)


def test_the_form_is_that_which_the_engine_can_multiply() -> None:
    layout, probs = sample(Mask(), 40, 0)
    stored = tiled(layout, probs)
    assert (servable(stored, CPU, torch.bfloat16, 64) is stored) is NATIVE
    for dtype, head_size in ((torch.float16, 64), (torch.float32, 64), (torch.bfloat16, 20)):
        found = servable(stored, CPU, dtype, head_size)
        assert isinstance(found, RowBlocks)
        assert torch.equal(found.to_dense(), stored.to_dense())
        assert found.lse is stored.lse
    blocks = stored.to_blocks()
    assert isinstance(servable(blocks, CPU, torch.bfloat16, 64), RowBlocks)


@pytest.mark.parametrize("name", sorted(CODECS))
def test_every_codec_gives_back_its_maps(name: str) -> None:
    layout, probs = sample(Mask(), 90, 3)
    lse = torch.randn(4, 90)
    payload = CODECS[name].encode(probs, lse, layout.mask)
    found = decode_blocks(name, payload, layout, 90)
    assert found.lse is not None and torch.equal(found.lse, lse)
    torch.testing.assert_close(found.to_dense().float(), probs, atol=0.01, rtol=0)
    part = CODECS[name].decode(payload, layout, 90, (1,))
    assert torch.equal(part.to_dense()[2:], found.to_dense()[2:])


def test_codecs_are_those_that_a_setting_may_name() -> None:
    assert set(get_args(CodecName)) == set(CODECS)
    assert DEFAULT_CODEC in CODECS
    with pytest.raises(ValueError, match="codec must be one of"):
        decode_blocks("zip", torch.zeros(1), MapLayout(1, 1, Mask()), 1)


def test_tiles_are_a_quarter_of_the_dense_map_and_less_where_little_is_seen() -> None:
    layout, probs = sample(Mask(), 512, 0)
    lse = torch.zeros(4, 512)
    dense = 2 * probs.numel()
    size = len(encode_tiles(probs, lse, layout.mask))
    assert size < 0.31 * dense
    assert size < 0.6 * len(encode_map(probs, lse, layout.mask))
    near = torch.zeros_like(probs)
    rows = torch.arange(512)
    near[:, rows, (rows - 3).clamp_min(0)] = 1.0
    assert len(encode_tiles(near, lse, layout.mask)) < 0.05 * dense
    assert panels_of(512) * ROWS == 512


@pytest.mark.skipif(tiles._tiles is None, reason="no compiled tiles")
@given(
    length=st.integers(1, 150),
    causal=st.booleans(),
    seed=st.integers(0, 1000),
    place=st.floats(0, 1, exclude_max=True),
    column=st.integers(0, 6),
    scale=st.sampled_from([0.0, 1e-9, 1.5e-5, 1.6e-5, 1.0, -1e-6, math.nan, math.inf]),
)
def test_what_is_sound_is_sound_natively(
    length: int, causal: bool, seed: int, place: float, column: int, scale: float
) -> None:
    mask = Mask(causal=causal)
    draw = torch.Generator().manual_seed(seed)
    probs = torch.rand(2, length, length, generator=draw) * mask.visible(length)
    probs /= probs.sum(-1, keepdim=True)
    _, scales, columns, panels = tiles.tile(probs)
    given_ = columns, scales, panels, length, causal
    assert tiles._is_sound(*given_) and tiles._is_sound_natively(*given_)
    tile = int(place * len(columns))
    columns[tile] = column
    scales[tile, seed % 4] = scale
    assert tiles._is_sound(*given_) == tiles._is_sound_natively(*given_)
