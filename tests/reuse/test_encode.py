# SPDX-License-Identifier: Apache-2.0
"""Maps encoded from queries and keys: natively they are what `exact_map` and the codec make."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from map_samples import random_qkv, reference_scores
from torch import Tensor

from attncache_vllm.names import CodecName
from attncache_vllm.reuse import encode
from attncache_vllm.reuse.apply import exact_map
from attncache_vllm.reuse.codecs import CODECS
from attncache_vllm.reuse.encode import encode_attention, encodes
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.tile_codec import decode_tiles
from attncache_vllm.reuse.tiles import DROPPED, TiledMap

TILES, EXACT = "tiles-u8-lse", "visible-bf16-lse"
SAMPLE = torch.zeros(1, 1, 16, dtype=torch.bfloat16)
native = pytest.mark.skipif(not encodes(SAMPLE, SAMPLE), reason="not compiled, or no AVX-512 BF16")

masks = st.builds(
    Mask, st.booleans(), st.one_of(st.none(), st.integers(1, 200), st.sampled_from([1, 31, 32, 33]))
)
lengths = st.one_of(st.sampled_from([1, 3, 4, 31, 32, 33, 127, 513]), st.integers(1, 200))


def by_torch(
    query: Tensor, key: Tensor, scale: float, mask: Mask, soft_cap: float | None = None
) -> Tensor:
    return CODECS[TILES].encode(*exact_map(query, key, scale, mask, soft_cap), mask)


def assert_same_map(found: TiledMap, expected: TiledMap, sharpness: float) -> None:
    """As `encode_attention` states it; scores are sums of terms in proportion to `sharpness`."""
    assert found.lse is not None and expected.lse is not None
    atol = 1e-5 + 1e-6 * sharpness
    torch.testing.assert_close(found.lse, expected.lse, atol=atol, rtol=1e-5)
    if found.columns.shape == expected.columns.shape:
        assert torch.equal(found.panels, expected.panels)
        assert torch.equal(found.columns, expected.columns)
        torch.testing.assert_close(found.scales, expected.scales, atol=1e-30, rtol=2**-7)
        # Where a scale is next to nothing, so is what its cells stand for.
        counts = (expected.scales > 1e-30)[..., None]
        assert ((found.cells.int() - expected.cells.int()).abs() * counts).max() <= 1
        return
    # A tile on the edge: what is left of its rows is scaled up for it, or not.
    difference = found._held() - expected._held()
    assert difference.abs().max() <= DROPPED + 1 / 128


@given(
    mask=masks,
    length=lengths,
    group=st.sampled_from([1, 2, 3]),
    head_size=st.sampled_from([2, 16, 64, 80, 98]),
    sharpness=st.sampled_from([0.1, 1.0, 5.0, 300.0]),
    soft_cap=st.sampled_from([None, 0.5, 30.0]),
)
@settings(max_examples=150, deadline=None)
@native
def test_natively_a_map_is_the_same(
    mask: Mask,
    length: int,
    group: int,
    head_size: int,
    sharpness: float,
    soft_cap: float | None,
) -> None:
    query, key, _ = random_qkv(length, 2 * group, 2, head_size)
    scale = sharpness * head_size**-0.5
    layout = MapLayout(2 * group, 2, mask)
    found = decode_tiles(encode_attention(TILES, query, key, scale, mask, soft_cap), layout, length)
    expected = decode_tiles(by_torch(query, key, scale, mask, soft_cap), layout, length)
    assert_same_map(found, expected, sharpness)


@given(mask=masks, length=lengths, soft_cap=st.sampled_from([None, 2.0]))
@settings(max_examples=50, deadline=None)
@native
def test_log_sum_exps_are_those_of_the_scores(
    mask: Mask, length: int, soft_cap: float | None
) -> None:
    query, key, _ = random_qkv(length, 4, 2, 64)
    payload = encode_attention(TILES, query, key, 64**-0.5, mask, soft_cap)
    found = decode_tiles(payload, MapLayout(4, 2, mask), length)
    expected = reference_scores(query, key, mask, soft_cap).logsumexp(-1).float()
    torch.testing.assert_close(found.lse, expected, atol=1e-5, rtol=1e-5)


@native
def test_most_maps_have_the_very_tiles() -> None:
    same = 0
    for length in range(100, 130):
        query, key, _ = random_qkv(length, 4, 2, 64)
        found = encode_attention(TILES, query, key, 0.3, Mask())
        same += len(found) == len(by_torch(query, key, 0.3, Mask()))
    assert same >= 29


@pytest.mark.parametrize("mask", [Mask(), Mask(False), Mask(window=40), Mask(False, 20)])
@native
def test_queries_and_keys_may_be_parts_of_wider_rows(mask: Mask) -> None:
    query, key, value = random_qkv(70, 6, 3, 64)
    rows = torch.cat([part.flatten(1) for part in (query, key, value)], dim=1)
    wide_query = rows[:, : 6 * 64].view(70, 6, 64)
    wide_key = rows[:, 6 * 64 : 9 * 64].view(70, 3, 64)
    assert encodes(wide_query, wide_key) and not wide_key.is_contiguous()
    found = encode_attention(TILES, wide_query, wide_key, 0.125, mask)
    assert torch.equal(found, encode_attention(TILES, query, key, 0.125, mask))


@native
def test_threads_change_nothing() -> None:
    query, key, _ = random_qkv(300, 6, 2, 64)
    every = encode_attention(TILES, query, key, 0.125, Mask())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = encode_attention(TILES, query, key, 0.125, Mask())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, every)


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("case", ["not built", "float32", "odd head size", "strided numbers"])
def test_elsewhere_a_map_is_made_by_torch(
    codec: CodecName, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, _ = random_qkv(50, 4, 2, 15 if case == "odd head size" else 64)
    if case == "not built":
        monkeypatch.setattr(encode, "_encode", None)
    elif case == "float32":
        query, key = query.float(), key.float()
    elif case == "strided numbers":
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert not encodes(query, key)
    expected = CODECS[codec].encode(*exact_map(query, key, 0.125, Mask(), 5.0), Mask())
    assert torch.equal(encode_attention(codec, query, key, 0.125, Mask(), 5.0), expected)


def test_the_exact_codec_keeps_what_torch_computes() -> None:
    query, key, _ = random_qkv(50, 4, 2, 64)
    expected = CODECS[EXACT].encode(*exact_map(query, key, 0.125, Mask()), Mask())
    assert torch.equal(encode_attention(EXACT, query, key, 0.125, Mask()), expected)


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (49, 3, 63), (20, 1, 7)])
def test_scores_that_are_not_finite_are_not_recorded(
    codec: CodecName, bad: float, place: tuple[int, int, int]
) -> None:
    query, key, _ = random_qkv(50, 4, 2, 64)
    query[place] = bad
    with pytest.raises(ValueError, match=r"log-sum-exps must be finite, got .*do not record"):
        encode_attention(codec, query, key, 0.125, Mask())


def test_a_key_that_is_not_a_number_is_not_recorded() -> None:
    query, key, _ = random_qkv(50, 4, 2, 64)
    key[49, 1, 3] = torch.nan  # seen by one row
    with pytest.raises(ValueError, match="log-sum-exps must be finite, got nan"):
        encode_attention(TILES, query, key, 0.125, Mask())


def test_what_makes_no_map_is_refused() -> None:
    query, key, _ = random_qkv(50, 4, 2, 64)
    with pytest.raises(ValueError, match="pass one whole sequence"):
        encode_attention(TILES, query, key[:49], 0.125, Mask())
    with pytest.raises(ValueError, match="soft_cap must be a finite number above 0, got 0"):
        encode_attention(TILES, query, key, 0.125, Mask(), 0.0)
    with pytest.raises(ValueError, match="num_heads must be a positive multiple"):
        encode_attention(TILES, query[:, :3], key, 0.125, Mask())
