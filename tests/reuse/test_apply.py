# SPDX-License-Identifier: Apache-2.0
"""`apply_map` against softmax(QK^T)V in float64.

Tolerance for bfloat16, whose unit roundoff is u = 2^-8: every stored probability is off by at
most u relatively, so a product over values bounded by V is off by at most u * V, and rounding
the result to bfloat16 adds u * V again. A wrong row, head or column is off by the order of V.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from map_samples import (
    lengths,
    masks,
    product,
    random_qkv,
    reference_probs,
    reference_scores,
    visible,
)
from torch import Tensor

from attncache_vllm.reuse.apply import apply_map, exact_map
from attncache_vllm.reuse.codec import decode_map, encode_map
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.maps import RowBlocks, block_bounds

HEADS = {"grouped": (6, 2), "multi-query": (4, 1), "plain": (3, 3)}
HEAD_SIZE = 16
ROUNDOFF = 2**-8
BIDIRECTIONAL = Mask(causal=False)

heads = st.sampled_from(list(HEADS.values()))
head_sizes = st.sampled_from([32, 64, 128, 256])


def stored(probs: Tensor, num_kv_heads: int, mask: Mask, lse: Tensor | None = None) -> RowBlocks:
    lse = torch.zeros(probs.shape[:2]) if lse is None else lse
    layout = MapLayout(len(probs), num_kv_heads, mask)
    return decode_map(encode_map(probs, lse, mask), layout, probs.shape[1])


def own_map(query: Tensor, key: Tensor, mask: Mask) -> RowBlocks:
    probs, lse = exact_map(query, key, query.shape[2] ** -0.5, mask)
    return stored(probs, key.shape[1], mask, lse)


def random_map(length: int, num_heads: int, num_kv_heads: int, mask: Mask) -> RowBlocks:
    query, key, _ = random_qkv(length, num_heads, num_kv_heads, HEAD_SIZE)
    return own_map(query, key, mask)


def applied(maps: RowBlocks, value: Tensor) -> Tensor:
    width = maps.layout.num_heads * value.shape[2]
    out = torch.full((len(value), width), float("nan"), dtype=value.dtype)
    apply_map(maps, value, out)
    return out


def assert_close(actual: Tensor, expected: Tensor, value: Tensor) -> None:
    bound = 2.1 * ROUNDOFF * value.abs().max().item()
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("length", [1, 2, 31, 63, 64, 65, 127, 128, 129, 200, 255, 257, 511, 601])
def test_applying_a_sequences_own_map_is_causal_attention(
    length: int, heads: tuple[int, int]
) -> None:
    query, key, value = random_qkv(length, *heads, HEAD_SIZE)
    expected = product(reference_probs(query, key, Mask()), value)
    assert_close(applied(own_map(query, key, Mask()), value), expected, value)


@settings(deadline=None)
@given(lengths, heads, head_sizes, masks)
def test_applying_a_sequences_own_map_is_attention_under_any_mask(
    length: int, heads: tuple[int, int], head_size: int, mask: Mask
) -> None:
    query, key, value = random_qkv(length, *heads, head_size)
    expected = product(reference_probs(query, key, mask), value)
    assert_close(applied(own_map(query, key, mask), value), expected, value)


@pytest.mark.parametrize("window", [None, 1, 50, 64, 100, 299, 5000])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("length", [1, 63, 64, 100, 128, 129, 299, 300])
def test_a_longer_causal_map_serves_every_prefix_exactly(
    length: int, heads: tuple[int, int], window: int | None
) -> None:
    query, key, value = random_qkv(300, *heads, HEAD_SIZE)
    mask, prefix = Mask(window=window), value[:length]
    expected = product(reference_probs(query[:length], key[:length], mask), prefix)
    assert_close(applied(own_map(query, key, mask), prefix), expected, value)


@settings(deadline=None)
@given(lengths, heads, masks, st.integers(0, 299))
def test_values_that_the_mask_hides_do_not_matter(
    length: int, heads: tuple[int, int], mask: Mask, column: int
) -> None:
    column %= length
    _, _, value = random_qkv(length, *heads, HEAD_SIZE)
    maps = random_map(length, *heads, mask)
    changed = value.clone()
    changed[column] += 1
    differs = (applied(maps, value) != applied(maps, changed)).any(1)
    assert not differs[~visible(mask, length)[:, column]].any()
    assert differs[column] or maps.to_dense()[:, column, column].max() < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_product_is_computed_in_the_dtype_of_the_values(dtype: torch.dtype) -> None:
    query, key, value = random_qkv(150, 4, 2, HEAD_SIZE)
    out = applied(own_map(query, key, Mask()), value.to(dtype))
    assert out.dtype == dtype
    assert_close(out, product(reference_probs(query, key, Mask()), value), value)


def test_values_may_be_a_slice_of_qkv_and_out_a_slice_of_a_batch() -> None:
    query, key, value = random_qkv(150, 4, 2, HEAD_SIZE)
    maps = own_map(query, key, Mask())
    qkv = torch.cat([query, key, value], dim=1)
    batch = torch.zeros(200, 4 * HEAD_SIZE, dtype=torch.bfloat16)
    apply_map(maps, qkv[:, 6:], batch[20:170])
    assert torch.equal(batch[20:170], applied(maps, value))
    assert not batch[:20].any() and not batch[170:].any()


@pytest.mark.parametrize(
    ("value_shape", "out_shape", "message"),
    [
        ((11, 2, 8), (11, 32), "causal map of 10 tokens serves 1 to 10 tokens"),
        ((0, 2, 8), (0, 32), "serves 1 to 10 tokens"),
        ((10, 4, 8), (10, 32), r"value must be \[L, 2, d\]"),
        ((10, 16), (10, 32), r"value must be \[L, 2, d\]"),
        ((10, 2, 8), (10, 16), r"out must be \[10, 32\]"),
        ((10, 2, 8), (9, 32), r"out must be \[10, 32\]"),
    ],
)
def test_shapes_that_do_not_fit_the_map_are_refused(
    value_shape: tuple[int, ...], out_shape: tuple[int, ...], message: str
) -> None:
    maps = stored(torch.eye(10).expand(4, 10, 10), 2, Mask())
    with pytest.raises(ValueError, match=message):
        apply_map(maps, torch.zeros(value_shape), torch.zeros(out_shape))


@pytest.mark.parametrize("mask", [BIDIRECTIONAL, Mask(causal=False, window=4)])
@pytest.mark.parametrize("length", [0, 1, 9, 11])
def test_a_bidirectional_map_serves_its_own_length_only(length: int, mask: Mask) -> None:
    maps = stored(torch.eye(10).expand(4, 10, 10), 2, mask)
    with pytest.raises(ValueError, match=r"bidirectional.* map of 10 tokens serves 10 to 10"):
        apply_map(maps, torch.zeros(length, 2, 8), torch.zeros(length, 32))


# -- some of the KV groups ---------------------------------------------------------------------


@settings(deadline=None)
@given(lengths, st.sampled_from([(6, 3), (8, 4)]), masks, st.data())
def test_only_the_heads_of_the_groups_held_are_written(
    length: int, heads: tuple[int, int], mask: Mask, data: st.DataObject
) -> None:
    query, key, value = random_qkv(length, *heads, HEAD_SIZE)
    probs, lse = exact_map(query, key, HEAD_SIZE**-0.5, mask)
    chosen = data.draw(st.sets(st.integers(0, heads[1] - 1), min_size=1))
    groups = tuple(sorted(chosen))
    layout = MapLayout(*heads, mask)
    part = decode_map(encode_map(probs, lse, mask), layout, length, groups)
    whole = applied(stored(probs, heads[1], mask, lse), value).view(length, heads[1], -1)
    out = torch.full((length, heads[0] * HEAD_SIZE), 7.0, dtype=torch.bfloat16)
    apply_map(part, value, out)
    for kv_head, written in enumerate(out.view(length, heads[1], -1).unbind(1)):
        if kv_head in groups:
            # Products of more or fewer groups may be summed in another order.
            torch.testing.assert_close(written, whole[:, kv_head], rtol=2**-7, atol=2**-9)
        else:
            assert (written == 7.0).all()
    dense = part.to_dense().view(heads[1], layout.group, length, length)
    for kv_head, seen in enumerate(probs.view_as(dense).bfloat16()):
        assert torch.equal(dense[kv_head], seen if kv_head in groups else torch.zeros_like(seen))


# -- row blocks --------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 10_000), masks)
def test_row_blocks_cover_every_row_once_in_aligned_pieces(length: int, mask: Mask) -> None:
    bounds = block_bounds(mask, length)
    assert [row for start, stop in bounds for row in range(start, stop)] == list(range(length))
    assert all(start % 32 == 0 for start, _ in bounds)
    assert all(stop - start >= min(64, length) for start, stop in bounds)


@pytest.mark.parametrize(
    ("mask", "length", "blocks", "share"),
    [
        (Mask(), 64, 1, 1.0),
        (Mask(), 512, 4, 0.625),
        (Mask(), 2048, 4, 0.625),
        (Mask(window=512), 512, 4, 0.625),
        (Mask(window=512), 8192, 16, 0.121),
        (Mask(window=32), 512, 8, 0.178),
        (BIDIRECTIONAL, 512, 1, 1.0),
        (Mask(causal=False, window=64), 512, 8, 0.340),
        (Mask(causal=False, window=600), 512, 1, 1.0),
    ],
)
def test_the_more_a_mask_hides_the_less_is_held(
    mask: Mask, length: int, blocks: int, share: float
) -> None:
    bounds = block_bounds(mask, length)
    held = sum(
        (stop - start) * (mask.columns(stop - 1, length)[1] - mask.columns(start, length)[0])
        for start, stop in bounds
    )
    assert len(bounds) == blocks
    assert held / length**2 == pytest.approx(share, abs=0.001)


def test_nbytes_counts_the_blocks() -> None:
    maps = stored(torch.eye(512).expand(4, 512, 512), 2, Mask())
    assert maps.nbytes == 4 * 0.625 * 512**2 * 2 + 4 * 512 * 4


def test_moving_a_map_keeps_its_layout() -> None:
    maps = random_map(70, 4, 2, Mask(window=20))
    moved = maps.to(torch.device("meta"))
    assert (moved.layout, moved.length, moved.nbytes) == (maps.layout, 70, maps.nbytes)
    assert all(block.probs.is_meta for block in moved.blocks)
    assert moved.lse is not None and moved.lse.is_meta
    same = maps.to(torch.device("cpu"))
    assert [b.probs.data_ptr() for b in same.blocks] == [b.probs.data_ptr() for b in maps.blocks]


@pytest.mark.parametrize("length", [0, -1])
def test_row_blocks_of_nothing_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match="length must be at least 1"):
        block_bounds(Mask(), length)


# -- recording ---------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    length=st.integers(1, 90),
    heads=heads,
    head_size=head_sizes,
    mask=masks,
    soft_cap=st.sampled_from([None, 0.5, 5.0, 50.0]),
)
def test_an_exact_map_is_the_masked_softmax_and_its_log_sum_exps(
    length: int, heads: tuple[int, int], head_size: int, mask: Mask, soft_cap: float | None
) -> None:
    query, key, _ = random_qkv(length, *heads, head_size)
    probs, lse = exact_map(query, key, head_size**-0.5, mask, soft_cap)
    assert probs.dtype == lse.dtype == torch.float32
    assert not probs[:, ~visible(mask, length)].any()
    expected = reference_probs(query, key, mask, soft_cap)
    torch.testing.assert_close(probs.double(), expected, rtol=1e-4, atol=1e-6)
    expected = reference_scores(query, key, mask, soft_cap).logsumexp(-1)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)


def test_query_and_key_of_different_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="equal L and d"):
        exact_map(torch.zeros(4, 2, 8), torch.zeros(5, 2, 8), 1.0, Mask())
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        exact_map(torch.zeros(4, 3, 8), torch.zeros(4, 2, 8), 1.0, Mask())


@pytest.mark.parametrize("soft_cap", [0.0, -1.0, float("inf"), float("nan")])
def test_a_soft_cap_that_caps_nothing_sensible_is_refused(soft_cap: float) -> None:
    with pytest.raises(ValueError, match="soft_cap must be a finite number above 0"):
        exact_map(torch.zeros(4, 2, 8), torch.zeros(4, 2, 8), 1.0, Mask(), soft_cap)
