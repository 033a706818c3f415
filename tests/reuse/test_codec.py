# SPDX-License-Identifier: Apache-2.0
import mmap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from map_samples import lengths, masks, visible

from attncache_vllm.reuse.codec import decode_map, encode_map, encoded_bytes
from attncache_vllm.reuse.layout import MapLayout, Mask

BIDIRECTIONAL = Mask(causal=False)


def random_map(num_heads: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense probabilities, not zero where a mask hides, and log-sum-exps of either sign."""
    generator = torch.Generator().manual_seed(length)
    probs = torch.rand(num_heads, length, length, generator=generator)
    return probs, torch.randn(num_heads, length, generator=generator) * 30


@settings(deadline=None)
@given(length=lengths, num_kv_heads=st.integers(1, 3), group=st.integers(1, 3), mask=masks)
def test_decoding_gives_back_what_the_mask_shows_rounded_to_bfloat16(
    length: int, num_kv_heads: int, group: int, mask: Mask
) -> None:
    layout = MapLayout(num_kv_heads * group, num_kv_heads, mask)
    probs, lse = random_map(layout.num_heads, length)
    payload = encode_map(probs, lse, mask)
    assert payload.dtype == torch.uint8
    assert payload.shape == (encoded_bytes(layout, length),)
    maps = decode_map(payload, layout, length)
    assert (maps.layout, maps.length) == (layout, length)
    assert maps.groups == tuple(range(num_kv_heads))
    assert maps.lse is not None and torch.equal(maps.lse, lse)
    shown = torch.where(visible(mask, length), probs, 0)
    assert torch.equal(maps.to_dense(), shown.bfloat16())
    for block in maps.blocks:
        rows, columns = block.stop - block.start, block.last - block.first
        assert block.probs.shape == (num_kv_heads, group, rows, columns)
        assert block.probs.is_contiguous()


@settings(deadline=None)
@given(length=lengths, group=st.integers(1, 3), mask=masks, data=st.data())
def test_some_groups_are_decoded_from_their_own_bytes(
    length: int, group: int, mask: Mask, data: st.DataObject
) -> None:
    layout = MapLayout(4 * group, 4, mask)
    groups = tuple(sorted(data.draw(st.sets(st.integers(0, 3), min_size=1))))
    heads = [kv_head * group + member for kv_head in groups for member in range(group)]
    probs, lse = random_map(layout.num_heads, length)
    payload = encode_map(probs, lse, mask)
    whole = decode_map(payload, layout, length)
    # Whatever lies where the other groups are: nothing of it is looked at.
    others = [head for head in range(layout.num_heads) if head not in heads]
    lse_bytes = layout.num_heads * length * 4
    payload[:lse_bytes].view(layout.num_heads, -1)[others] = 255
    payload[lse_bytes:].view(layout.num_heads, -1)[others] = 255
    part = decode_map(payload, layout, length, groups)
    assert (part.groups, part.length, part.layout) == (groups, length, layout)
    assert part.lse is not None and torch.equal(part.lse, lse[heads])
    for block, expected in zip(part.blocks, whole.blocks, strict=True):
        assert block.probs.is_contiguous()
        assert torch.equal(block.probs, expected.probs[list(groups)])
    assert part.nbytes * 4 == whole.nbytes * len(groups)


@pytest.mark.parametrize("groups", [(), (-1,), (0, 2), (2,), (1, 0), (1, 1)])
def test_groups_that_a_layer_does_not_have_are_refused(groups: tuple[int, ...]) -> None:
    payload = encode_map(*random_map(4, 10), Mask())
    with pytest.raises(ValueError, match="groups must be KV heads of 0 to 1, ascending"):
        decode_map(payload, MapLayout(4, 2, Mask()), 10, groups)


@pytest.mark.parametrize(
    ("mask", "columns"),
    [
        (Mask(), [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]),
        (Mask(window=2), [[0], [0, 1], [1, 2], [2, 3]]),
        (BIDIRECTIONAL, [[0, 1, 2, 3]] * 4),
        (Mask(causal=False, window=2), [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]]),
    ],
    ids=str,
)
def test_the_visible_columns_lie_after_the_log_sum_exps_head_after_head_and_row_by_row(
    mask: Mask, columns: list[list[int]]
) -> None:
    probs = torch.arange(32).view(2, 4, 4) / 32
    expected = [
        probs[head, row, column].item()
        for head in range(2)
        for row in range(4)
        for column in columns[row]
    ]
    lse = torch.arange(8.0).view(2, 4)
    payload = encode_map(probs, lse, mask)
    assert payload[:32].view(torch.float32).tolist() == lse.flatten().tolist()
    assert payload[32:].view(torch.bfloat16).tolist() == expected


def test_sizes_are_those_of_what_is_visible() -> None:
    assert encoded_bytes(MapLayout(9, 3, Mask()), 512) == 9 * 512 * (513 + 4)
    assert encoded_bytes(MapLayout(9, 3, BIDIRECTIONAL), 512) == 9 * 512 * (1024 + 4)
    assert encoded_bytes(MapLayout(9, 3, Mask(window=1)), 512) == 9 * 512 * (2 + 4)


@pytest.mark.parametrize("mask", [Mask(), BIDIRECTIONAL, Mask(causal=False, window=9)], ids=str)
def test_encoding_leaves_a_bfloat16_map_alone(mask: Mask) -> None:
    probs, lse = random_map(2, 40)
    probs = probs.bfloat16()
    before = probs.clone(), lse.clone()
    encode_map(probs, lse, mask).zero_()
    assert torch.equal(probs, before[0]) and torch.equal(lse, before[1])


def test_decoding_reads_a_read_only_memory_map(tmp_path: Path) -> None:
    probs, lse = random_map(6, 130)
    path = tmp_path / "map"
    path.write_bytes(bytes(64) + encode_map(probs, lse, Mask()).numpy().tobytes())
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    array = np.frombuffer(view, dtype=np.uint8, offset=64)
    assert not array.flags.writeable
    with warnings.catch_warnings():  # torch says once in a process that it cannot mark this
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        payload = torch.from_numpy(array)
    maps = decode_map(payload, MapLayout(6, 2, Mask()), 130)
    assert torch.equal(maps.to_dense(), probs.tril().bfloat16())
    assert maps.lse is not None and torch.equal(maps.lse, lse)


@pytest.mark.parametrize("mask", [Mask(), BIDIRECTIONAL, Mask(causal=False, window=9)], ids=str)
def test_the_decoded_map_does_not_alias_the_payload(mask: Mask) -> None:
    probs, lse = random_map(2, 70)
    payload = encode_map(probs, lse, mask)
    maps = decode_map(payload, MapLayout(2, 1, mask), 70)
    before = maps.to_dense()
    payload.zero_()
    assert torch.equal(maps.to_dense(), before)
    assert maps.lse is not None and torch.equal(maps.lse, lse)


@pytest.mark.parametrize(
    "payload",
    [
        torch.zeros(600 - 1, dtype=torch.uint8),
        torch.zeros(600 + 2, dtype=torch.uint8),
        torch.zeros(0, dtype=torch.uint8),
        torch.zeros(600, dtype=torch.int8),
        torch.zeros(600, 1, dtype=torch.uint8),
        torch.zeros(600 * 2, dtype=torch.uint8)[::2],
        torch.zeros(600 + 2, dtype=torch.uint8)[2:],
    ],
    ids=["short", "long", "empty", "dtype", "2-D", "strided", "offset"],
)
def test_a_payload_that_does_not_fit_is_refused(payload: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="600 contiguous uint8 bytes"):
        decode_map(payload, MapLayout(4, 2, Mask()), 10)


def test_a_payload_of_another_mask_is_refused() -> None:
    payload = encode_map(*random_map(4, 10), BIDIRECTIONAL)
    with pytest.raises(ValueError, match="a causal, window 3 map of 4 heads x 10 tokens"):
        decode_map(payload, MapLayout(4, 2, Mask(window=3)), 10)


@settings(deadline=None)
@given(masks)
def test_an_absurd_length_is_refused_before_anything_is_allocated(mask: Mask) -> None:
    layout = MapLayout(4, 2, mask)
    with pytest.raises(ValueError, match="contiguous uint8 bytes"):
        decode_map(torch.zeros(16, dtype=torch.uint8), layout, 2**40)
    with pytest.raises(ValueError, match="length must be at least 1"):
        decode_map(torch.zeros(0, dtype=torch.uint8), layout, 0)


@pytest.mark.parametrize("mask", [Mask(), BIDIRECTIONAL, Mask(window=4)], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.5, 1.5])
def test_what_is_no_probability_is_never_stored(bad: float, mask: Mask) -> None:
    probs, lse = random_map(3, 20)
    probs[1, 7, 4] = bad
    with pytest.raises(ValueError, match=r"probabilities must be in \[0, 1\]"):
        encode_map(probs, lse, mask)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_log_sum_exp_is_never_stored(bad: float) -> None:
    probs, lse = random_map(3, 20)
    lse[2, 19] = bad
    with pytest.raises(ValueError, match=rf"log-sum-exps must be finite, got {bad}"):
        encode_map(probs, lse, Mask())


@pytest.mark.parametrize(
    "lse",
    [torch.zeros(2, 4), torch.zeros(3), torch.zeros(3, 5), torch.zeros(3, 4).bfloat16()],
    ids=["heads", "1-D", "tokens", "dtype"],
)
def test_log_sum_exps_of_another_map_are_refused(lse: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"lse must be \[3, 4\] float32"):
        encode_map(torch.zeros(3, 4, 4), lse, Mask())


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 5), (0, 4, 4), (2, 0, 0)])
def test_encoding_refuses_what_is_no_map(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \[heads, N, N\]"):
        encode_map(torch.zeros(shape), torch.zeros(shape[:2]), Mask())
    with pytest.raises(ValueError, match="float dtype"):
        encode_map(torch.zeros(1, 2, 2, dtype=torch.int64), torch.zeros(1, 2), Mask())
