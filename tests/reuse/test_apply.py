# SPDX-License-Identifier: Apache-2.0
"""`apply_map` against softmax(QK^T)V in float64.

Tolerance for bfloat16, whose unit roundoff is u = 2^-9: every stored probability is off by at
most u relatively, so a product over values bounded by V is off by at most u * V, and rounding
the result to bfloat16 adds u * V again. A wrong row, head or column is off by the order of V.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attncache_vllm.reuse.apply import RowBlocks, apply_map, block_bounds, exact_causal_probs
from attncache_vllm.reuse.codec import decode_causal, encode_causal

HEADS = {"grouped": (6, 2), "multi-query": (4, 1), "plain": (3, 3)}
HEAD_SIZE = 16
SCALE = HEAD_SIZE**-0.5
ROUNDOFF = 2**-9


def random_qkv(length: int, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(length, heads, HEAD_SIZE) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    query, key, value = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    return query * 3, key, value  # sharper than uniform rows


def reference_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention in float64, one head at a time: `[L, H * d]`."""
    length, num_heads, _ = query.shape
    group = num_heads // key.shape[1]
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    heads = []
    for head in range(num_heads):
        scores = query[:, head].double() @ key[:, head // group].double().T * SCALE
        probs = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        heads.append(probs @ value[:, head // group].double())
    return torch.cat(heads, dim=1)


def stored_map(query: Tensor, key: Tensor) -> RowBlocks:
    payload = encode_causal(exact_causal_probs(query, key, SCALE))
    return decode_causal(payload, query.shape[1], key.shape[1], len(query))


def applied(maps: RowBlocks, value: Tensor) -> Tensor:
    out = torch.full((len(value), maps.num_heads * HEAD_SIZE), float("nan"), dtype=value.dtype)
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
    query, key, value = random_qkv(length, *heads)
    expected = reference_attention(query, key, value)
    assert_close(applied(stored_map(query, key), value), expected, value)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("length", [1, 63, 64, 100, 128, 129, 299, 300])
def test_a_longer_map_serves_every_prefix_exactly(length: int, heads: tuple[int, int]) -> None:
    query, key, value = (tensor for tensor in random_qkv(300, *heads))
    prefix = value[:length]
    expected = reference_attention(query[:length], key[:length], prefix)
    assert_close(applied(stored_map(query, key), prefix), expected, value)


def test_values_after_the_query_are_invisible() -> None:
    query, key, value = random_qkv(130, 4, 2)
    changed = value.clone()
    changed[100:] += 1
    maps = stored_map(query, key)
    assert torch.equal(applied(maps, value)[:100], applied(maps, changed)[:100])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_product_is_computed_in_the_dtype_of_the_values(dtype: torch.dtype) -> None:
    query, key, value = random_qkv(150, 4, 2)
    out = applied(stored_map(query, key), value.to(dtype))
    assert out.dtype == dtype
    assert_close(out, reference_attention(query, key, value), value)


def test_values_may_be_a_slice_of_qkv_and_out_a_slice_of_a_batch() -> None:
    query, key, value = random_qkv(150, 4, 2)
    maps = stored_map(query, key)
    qkv = torch.cat([query, key, value], dim=1)
    batch = torch.zeros(200, 4 * HEAD_SIZE, dtype=torch.bfloat16)
    apply_map(maps, qkv[:, 6:], batch[20:170])
    assert torch.equal(batch[20:170], applied(maps, value))
    assert not batch[:20].any() and not batch[170:].any()


@pytest.mark.parametrize(
    ("value_shape", "out_shape", "message"),
    [
        ((11, 2, 8), (11, 32), "serves 1 to 10 tokens"),
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
    maps = decode_causal(encode_causal(torch.eye(10).expand(4, 10, 10)), 4, 2, 10)
    with pytest.raises(ValueError, match=message):
        apply_map(maps, torch.zeros(value_shape), torch.zeros(out_shape))


@settings(deadline=None)
@given(st.integers(1, 10_000))
def test_row_blocks_cover_every_row_once_in_aligned_pieces(length: int) -> None:
    bounds = block_bounds(length)
    assert [row for start, stop in bounds for row in range(start, stop)] == list(range(length))
    assert len(bounds) <= 4
    assert all(start % 32 == 0 for start, _ in bounds)
    assert all(stop - start >= min(64, length) for start, stop in bounds)


@pytest.mark.parametrize(("length", "share"), [(512, 0.625), (2048, 0.625), (64, 1.0)])
def test_long_maps_hold_five_eighths_of_the_square(length: int, share: float) -> None:
    held = sum((stop - start) * stop for start, stop in block_bounds(length))
    assert held == share * length**2


def test_nbytes_counts_the_blocks() -> None:
    maps = decode_causal(encode_causal(torch.eye(512).expand(4, 512, 512)), 4, 2, 512)
    assert maps.nbytes == 4 * 0.625 * 512**2 * 2


@pytest.mark.parametrize("length", [0, -1])
def test_row_blocks_of_nothing_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match="length must be at least 1"):
        block_bounds(length)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_exact_probabilities_are_causal_softmax(heads: tuple[int, int]) -> None:
    query, key, _ = random_qkv(70, *heads)
    probs = exact_causal_probs(query, key, SCALE)
    assert probs.dtype == torch.float32
    assert probs.shape == (heads[0], 70, 70)
    assert not probs.triu(1).any()
    torch.testing.assert_close(probs.sum(-1), torch.ones(heads[0], 70))
    one_hot = torch.eye(70).unsqueeze(1).expand(70, heads[1], 70)
    expected = reference_attention(query, key, one_hot).view(70, heads[0], 70).transpose(0, 1)
    torch.testing.assert_close(probs.double(), expected, rtol=1e-4, atol=1e-6)


def test_query_and_key_of_different_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="equal L and d"):
        exact_causal_probs(torch.zeros(4, 2, 8), torch.zeros(5, 2, 8), 1.0)
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        exact_causal_probs(torch.zeros(4, 3, 8), torch.zeros(4, 2, 8), 1.0)
