# SPDX-License-Identifier: Apache-2.0
"""`apply_aligned` against softmax(QK^T)V of the sequence itself, in float64.

Queries, keys and values are looked up by token, without positions: then the scores of a pair of
tokens are the same in the entry and in the sequence, the stored map is the true partial softmax of
the sequence, and what is put together must be the sequence's own attention.
"""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from map_samples import product, reference_scores
from torch import Tensor

from attncache_vllm.reuse.align import Alignment, align
from attncache_vllm.reuse.apply import apply_aligned, apply_map, exact_map
from attncache_vllm.reuse.codec import decode_map, encode_map
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.maps import RowBlock, RowBlocks

CAUSAL, BIDIRECTIONAL = Mask(), Mask(causal=False)
HEAD_SIZE = 16
SCALE = HEAD_SIZE**-0.5
VOCABULARY = 500
HEADS = [(3, 3), (6, 2), (4, 1), (8, 4)]
QKV = tuple[Tensor, Tensor, Tensor]


def vectors(num_heads: int, num_kv_heads: int, dtype: torch.dtype, sharpness: float = 2.0) -> QKV:
    """A query, a key and a value of every head for every token."""
    generator = torch.Generator().manual_seed(num_heads)
    query, key, value = (
        torch.randn(VOCABULARY, heads, HEAD_SIZE, generator=generator)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    return (query * sharpness).to(dtype), key.to(dtype), value.to(dtype)


def of(qkv: QKV, tokens: list[int]) -> QKV:
    query, key, value = (table[tokens] for table in qkv)
    return query, key, value


def ids(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def recorded(
    qkv: QKV,
    tokens: list[int],
    mask: Mask,
    soft_cap: float | None = None,
    groups: tuple[int, ...] | None = None,
) -> RowBlocks:
    """The entry's map: as a store has it beside bfloat16 values, unrounded beside float32 ones."""
    query, key, value = of(qkv, tokens)
    layout = MapLayout(query.shape[1], key.shape[1], mask)
    probs, lse = exact_map(query, key, SCALE, mask, soft_cap)
    maps = decode_map(encode_map(probs, lse, mask), layout, len(tokens), groups)
    if value.dtype == torch.bfloat16:
        return maps
    held = probs.view(layout.num_kv_heads, layout.group, *probs.shape[1:])[list(maps.groups)]
    return replace(maps, blocks=tuple(_unrounded(block, held) for block in maps.blocks))


def _unrounded(block: RowBlock, probs: Tensor) -> RowBlock:
    cut = probs[:, :, block.start : block.stop, block.first : block.last]
    return replace(block, probs=cut.contiguous())


def answered(
    maps: RowBlocks,
    alignment: Alignment,
    qkv: QKV,
    tokens: list[int],
    soft_cap: float | None = None,
) -> Tensor:
    query, key, value = of(qkv, tokens)
    out = torch.full((len(tokens), query[0].numel()), float("nan"), dtype=value.dtype)
    apply_aligned(maps, alignment, query, key, value, SCALE, soft_cap, out)
    return out


def attention(qkv: QKV, tokens: list[int], mask: Mask, soft_cap: float | None = None) -> Tensor:
    query, key, value = of(qkv, tokens)
    return product(reference_scores(query, key, mask, soft_cap).softmax(-1), value)


def assert_parity(actual: Tensor, expected: Tensor) -> None:
    """Values are of the order of 1, as are their means over few tokens."""
    bound = 1e-4 if actual.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound)
    if actual.dtype == torch.bfloat16:
        assert ((actual.double() - expected).norm() / expected.norm()).item() < 1e-2


def text(seed: int, length: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(VOCABULARY) for _ in range(length)]


def edited(tokens: list[int], share: float, seed: int) -> list[int]:
    """A third each of substitutions, insertions and deletions."""
    draw, result = random.Random(seed), []
    for token in tokens:
        dice = draw.random()
        if dice < share / 3:
            result.append(draw.randrange(VOCABULARY))
        elif dice < 2 * share / 3:
            result += [token, draw.randrange(VOCABULARY)]
        elif dice >= share:
            result.append(token)
    return result or [0]


ENTRY = text(1, 180)
NEW = text(2, 40)
EDITS = {
    "substitution": [*ENTRY[:70], *NEW[:3], *ENTRY[73:]],
    "insertion": [*ENTRY[:70], *NEW[:5], *ENTRY[70:]],
    "deletion": [*ENTRY[:70], *ENTRY[80:]],
    "first token": [NEW[0], *ENTRY[1:]],
    "last token": [*ENTRY[:-1], NEW[0]],
    "before": [*NEW, *ENTRY],
    "after": [*ENTRY, *NEW],
    "common ends": [*ENTRY[:60], *NEW, *ENTRY[120:]],
    "prefix only": [*ENTRY[:60], *NEW],
    "suffix only": [*NEW, *ENTRY[150:]],
    "prefix of the entry": ENTRY[:101],
    "suffix of the entry": ENTRY[100:],
    "all fresh": NEW,
    "one token": NEW[:1],
}
masks = pytest.mark.parametrize("mask", [CAUSAL, BIDIRECTIONAL], ids=str)


@masks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", EDITS.values(), ids=EDITS.keys())
def test_a_map_that_holds_the_true_scores_gives_the_sequences_own_attention(
    tokens: list[int], dtype: torch.dtype, mask: Mask
) -> None:
    qkv = vectors(6, 2, dtype)
    maps, alignment = recorded(qkv, ENTRY, mask), align(ids(tokens), ids(ENTRY))
    assert_parity(answered(maps, alignment, qkv, tokens), attention(qkv, tokens, mask))


@settings(deadline=None, max_examples=60)
@given(
    length=st.integers(1, 260),
    share=st.sampled_from([0.0, 0.02, 0.1, 0.4, 0.9]),
    seed=st.integers(0, 1000),
    heads=st.sampled_from(HEADS),
    mask=st.sampled_from([CAUSAL, BIDIRECTIONAL]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    soft_cap=st.sampled_from([None, 2.0, 30.0]),
)
def test_parity_holds_for_any_edits_heads_and_caps(
    length: int,
    share: float,
    seed: int,
    heads: tuple[int, int],
    mask: Mask,
    dtype: torch.dtype,
    soft_cap: float | None,
) -> None:
    qkv, entry = vectors(*heads, dtype), text(seed, length)
    tokens = edited(entry, share, seed)
    maps = recorded(qkv, entry, mask, soft_cap)
    alignment = align(ids(tokens), ids(entry))
    expected = attention(qkv, tokens, mask, soft_cap)
    assert_parity(answered(maps, alignment, qkv, tokens, soft_cap), expected)


@masks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parity_holds_where_nearly_all_of_a_row_went_to_lost_tokens(
    dtype: torch.dtype, mask: Mask
) -> None:
    # Token 0 draws nearly everything, and the sequence does not have it: what a row keeps is less
    # than the rounding of what it lost.
    query, key, value = vectors(6, 2, dtype)
    query[:, :, 0] = key[0, :, 0] = 9.0
    qkv = (query, key, value)
    tokens = [token or 1 for token in ENTRY]
    entry = [*tokens[:10], 0, *tokens[10:]]
    maps = recorded(qkv, entry, mask)
    assert maps.to_dense()[:, 100, 10].min() > 1 - 2**-8
    alignment = align(ids(tokens), ids(entry))
    assert not len(alignment.fresh)
    assert_parity(answered(maps, alignment, qkv, tokens), attention(qkv, tokens, mask))


@masks
def test_rows_that_kept_nothing_answer_from_fresh_columns_or_from_themselves(mask: Mask) -> None:
    qkv = vectors(6, 2, torch.float32)
    entry = [10, 11, 12, 13]
    probs = torch.zeros(6, 4, 4)
    probs[:, :, 0] = 1  # everything goes to the token that is replaced
    layout = MapLayout(6, 2, mask)
    maps = decode_map(encode_map(probs, torch.zeros(6, 4), mask), layout, 4)
    value = qkv[2].repeat_interleave(3, 1)  # a KV head's value for each of its query heads

    shorter = entry[1:]
    out = answered(maps, align(ids(shorter), ids(entry)), qkv, shorter).view(3, 6, HEAD_SIZE)
    torch.testing.assert_close(out, value[shorter])

    changed = [20, *entry[1:]]
    out = answered(maps, align(ids(changed), ids(entry)), qkv, changed).view(4, 6, HEAD_SIZE)
    torch.testing.assert_close(out[1:], value[20].expand(3, 6, HEAD_SIZE))


@masks
@pytest.mark.parametrize("length", [1, 64, 129, 300])
def test_a_text_that_is_its_own_entry_is_answered_as_by_apply_map(length: int, mask: Mask) -> None:
    qkv, tokens = vectors(6, 2, torch.bfloat16), text(3, length)
    maps, alignment = recorded(qkv, tokens, mask), align(ids(tokens), ids(tokens))
    expected = torch.empty(length, 6 * HEAD_SIZE, dtype=torch.bfloat16)
    apply_map(maps, of(qkv, tokens)[2], expected)
    assert torch.equal(answered(maps, alignment, qkv, tokens), expected)


@pytest.mark.parametrize("tail", [[], NEW, ENTRY[110:]], ids=["nothing", "fresh", "deletion"])
def test_the_common_prefix_of_a_causal_map_is_answered_as_by_apply_map(tail: list[int]) -> None:
    qkv, tokens = vectors(6, 2, torch.bfloat16), [*ENTRY[:100], *tail]
    maps, alignment = recorded(qkv, ENTRY, CAUSAL), align(ids(tokens), ids(ENTRY))
    assert alignment.prefix == 100
    # Rows of half the mass show that they are taken as they are stored, not scaled up.
    maps = replace(maps, blocks=tuple(replace(b, probs=b.probs / 2) for b in maps.blocks))
    query, key, value = of(qkv, tokens)
    query[:100] = float("nan")  # the map knows their scores
    out = torch.empty(len(tokens), 6 * HEAD_SIZE, dtype=torch.bfloat16)
    apply_aligned(maps, alignment, query, key, value, SCALE, None, out)
    expected = torch.empty(100, 6 * HEAD_SIZE, dtype=torch.bfloat16)
    apply_map(maps, value[:100], expected)
    torch.testing.assert_close(out[:100], expected, rtol=2**-7, atol=1e-5)


@masks
@pytest.mark.parametrize("groups", [(0,), (3,), (1, 2), (0, 3), (0, 2, 3)])
@pytest.mark.parametrize("edit", ["substitution", "deletion", "all fresh", "prefix of the entry"])
def test_only_the_heads_of_the_groups_held_are_written(
    edit: str, groups: tuple[int, ...], mask: Mask
) -> None:
    qkv, tokens = vectors(8, 4, torch.float32), EDITS[edit]
    maps = recorded(qkv, ENTRY, mask, groups=groups)
    alignment = align(ids(tokens), ids(ENTRY))
    out = answered(maps, alignment, qkv, tokens).view(len(tokens), 4, -1)
    expected = attention(qkv, tokens, mask).view(len(tokens), 4, -1)
    for kv_head in range(4):
        if kv_head in groups:
            assert_parity(out[:, kv_head], expected[:, kv_head])
        else:
            assert out[:, kv_head].isnan().all()


@masks
def test_stored_scores_are_used_where_both_tokens_are_known(mask: Mask) -> None:
    # The queries of known rows meet fresh keys only, and known keys meet queries of fresh rows
    # only: pairs of known tokens must come from the map, whatever their scores are now.
    tokens = EDITS["substitution"]
    qkv = vectors(6, 2, torch.float32)
    maps, alignment = recorded(qkv, ENTRY, mask), align(ids(tokens), ids(ENTRY))
    query, key, value = of(qkv, tokens)
    other = key.clone()
    other[alignment.rows] = 0
    outs = [torch.empty(len(tokens), 6 * HEAD_SIZE) for _ in range(2)]
    apply_aligned(maps, alignment, query, key, value, SCALE, None, outs[0])
    apply_aligned(maps, alignment, query, other, value, SCALE, None, outs[1])
    assert torch.equal(outs[0][alignment.rows], outs[1][alignment.rows])
    assert (outs[0] != outs[1])[alignment.fresh].any()


def test_tensors_may_be_slices_of_qkv_and_out_a_slice_of_a_batch() -> None:
    qkv, tokens = vectors(6, 2, torch.bfloat16), EDITS["common ends"]
    maps, alignment = recorded(qkv, ENTRY, CAUSAL), align(ids(tokens), ids(ENTRY))
    query, key, value = torch.cat(of(qkv, tokens), dim=1).split([6, 2, 2], dim=1)
    batch = torch.zeros(len(tokens) + 30, 6 * HEAD_SIZE, dtype=torch.bfloat16)
    own = batch[10:-20]
    apply_aligned(maps, alignment, query, key, value, SCALE, None, own)
    assert torch.equal(own, answered(maps, alignment, qkv, tokens))
    assert not batch[:10].any() and not batch[-20:].any()


@masks
def test_a_window_that_covers_both_texts_hides_nothing(mask: Mask) -> None:
    qkv = vectors(6, 2, torch.float32)
    for tokens, window in ((EDITS["after"], 220), (EDITS["deletion"], 180)):
        wide = replace(mask, window=window)
        maps, alignment = recorded(qkv, ENTRY, wide), align(ids(tokens), ids(ENTRY))
        assert_parity(answered(maps, alignment, qkv, tokens), attention(qkv, tokens, mask))
        narrow = recorded(qkv, ENTRY, replace(mask, window=window - 1))
        with pytest.raises(ValueError, match="a window must cover the sequence's"):
            answered(narrow, alignment, qkv, tokens)


@pytest.mark.parametrize(
    ("query", "key", "value", "out", "message"),
    [
        ((9, 4, 8), (9, 2, 8), (9, 2, 8), (9, 32), r"value must be \[10, 2, d\]"),
        ((10, 4, 8), (10, 4, 8), (10, 4, 8), (10, 32), r"value must be \[10, 2, d\]"),
        ((10, 4, 8), (10, 16), (10, 16), (10, 32), r"value must be \[10, 2, d\]"),
        ((10, 4, 8), (9, 2, 8), (10, 2, 8), (10, 32), "query must be"),
        ((10, 2, 8), (10, 2, 8), (10, 2, 8), (10, 32), "query must be"),
        ((10, 4, 4), (10, 2, 8), (10, 2, 8), (10, 32), "query must be"),
        ((10, 4, 8), (10, 2, 8), (10, 2, 8), (10, 16), r"out must be \[10, 32\]"),
        ((10, 4, 8), (10, 2, 8), (10, 2, 8), (9, 32), r"out must be \[10, 32\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    out: tuple[int, ...],
    message: str,
) -> None:
    probs = torch.eye(12).expand(4, 12, 12)
    maps = decode_map(encode_map(probs, torch.zeros(4, 12), CAUSAL), MapLayout(4, 2, CAUSAL), 12)
    tensors = [torch.zeros(shape) for shape in (query, key, value)]
    alignment = align(ids(ENTRY[:10]), ids(ENTRY[:12]))
    with pytest.raises(ValueError, match=message):
        apply_aligned(maps, alignment, *tensors, 1.0, None, torch.zeros(out))


def test_a_map_without_log_sum_exps_and_one_of_another_entry_are_refused() -> None:
    qkv, tokens = vectors(6, 2, torch.float32), EDITS["substitution"]
    maps = recorded(qkv, ENTRY, CAUSAL)
    with pytest.raises(ValueError, match="must have log-sum-exps, got None"):
        answered(replace(maps, lse=None), align(ids(tokens), ids(ENTRY)), qkv, tokens)
    with pytest.raises(ValueError, match="an entry of the map's 180 tokens, got 179"):
        answered(maps, align(ids(tokens), ids(ENTRY[1:])), qkv, tokens)
    with pytest.raises(ValueError, match="soft_cap must be a finite number above 0"):
        answered(maps, align(ids(tokens), ids(ENTRY)), qkv, tokens, soft_cap=0.0)
