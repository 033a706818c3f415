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


def random_map(num_heads: int, length: int) -> torch.Tensor:
    """Dense: what a mask hides is not zero."""
    generator = torch.Generator().manual_seed(length)
    return torch.rand(num_heads, length, length, generator=generator)


@settings(deadline=None)
@given(length=lengths, num_kv_heads=st.integers(1, 3), group=st.integers(1, 3), mask=masks)
def test_decoding_gives_back_what_the_mask_shows_rounded_to_bfloat16(
    length: int, num_kv_heads: int, group: int, mask: Mask
) -> None:
    layout = MapLayout(num_kv_heads * group, num_kv_heads, mask)
    probs = random_map(layout.num_heads, length)
    payload = encode_map(probs, mask)
    assert payload.dtype == torch.uint8
    assert payload.shape == (encoded_bytes(layout, length),)
    maps = decode_map(payload, layout, length)
    assert (maps.layout, maps.length) == (layout, length)
    shown = torch.where(visible(mask, length), probs, 0)
    assert torch.equal(maps.to_dense(), shown.bfloat16())
    for block in maps.blocks:
        rows, columns = block.stop - block.start, block.last - block.first
        assert block.probs.shape == (num_kv_heads, group, rows, columns)
        assert block.probs.is_contiguous()


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
def test_the_visible_columns_lie_head_after_head_and_row_by_row(
    mask: Mask, columns: list[list[int]]
) -> None:
    probs = torch.arange(32).view(2, 4, 4) / 32
    expected = [
        probs[head, row, column].item()
        for head in range(2)
        for row in range(4)
        for column in columns[row]
    ]
    assert encode_map(probs, mask).view(torch.bfloat16).tolist() == expected


def test_sizes_are_those_of_what_is_visible() -> None:
    assert encoded_bytes(MapLayout(9, 3, Mask()), 512) == 9 * (512 * 513 // 2) * 2
    assert encoded_bytes(MapLayout(9, 3, BIDIRECTIONAL), 512) == 9 * 512**2 * 2
    assert encoded_bytes(MapLayout(9, 3, Mask(window=1)), 512) == 9 * 512 * 2


@pytest.mark.parametrize("mask", [Mask(), BIDIRECTIONAL, Mask(causal=False, window=9)], ids=str)
def test_encoding_leaves_a_bfloat16_map_alone(mask: Mask) -> None:
    probs = random_map(2, 40).bfloat16()
    before = probs.clone()
    encode_map(probs, mask).zero_()
    assert torch.equal(probs, before)


def test_decoding_reads_a_read_only_memory_map(tmp_path: Path) -> None:
    probs = random_map(6, 130).tril()
    path = tmp_path / "map"
    path.write_bytes(bytes(64) + encode_map(probs, Mask()).numpy().tobytes())
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    array = np.frombuffer(view, dtype=np.uint8, offset=64)
    assert not array.flags.writeable
    with warnings.catch_warnings():  # torch says once in a process that it cannot mark this
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        payload = torch.from_numpy(array)
    maps = decode_map(payload, MapLayout(6, 2, Mask()), 130)
    assert torch.equal(maps.to_dense(), probs.bfloat16())


@pytest.mark.parametrize("mask", [Mask(), BIDIRECTIONAL, Mask(causal=False, window=9)], ids=str)
def test_the_decoded_map_does_not_alias_the_payload(mask: Mask) -> None:
    payload = encode_map(random_map(2, 70), mask)
    maps = decode_map(payload, MapLayout(2, 1, mask), 70)
    before = maps.to_dense()
    payload.zero_()
    assert torch.equal(maps.to_dense(), before)


@pytest.mark.parametrize(
    "payload",
    [
        torch.zeros(440 - 1, dtype=torch.uint8),
        torch.zeros(440 + 2, dtype=torch.uint8),
        torch.zeros(0, dtype=torch.uint8),
        torch.zeros(440, dtype=torch.int8),
        torch.zeros(440, 1, dtype=torch.uint8),
        torch.zeros(440 * 2, dtype=torch.uint8)[::2],
        torch.zeros(440 + 1, dtype=torch.uint8)[1:],
    ],
    ids=["short", "long", "empty", "dtype", "2-D", "strided", "odd offset"],
)
def test_a_payload_that_does_not_fit_is_refused(payload: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="440 contiguous uint8 bytes"):
        decode_map(payload, MapLayout(4, 2, Mask()), 10)


def test_a_payload_of_another_mask_is_refused() -> None:
    payload = encode_map(random_map(4, 10), BIDIRECTIONAL)
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
    probs = random_map(3, 20)
    probs[1, 7, 4] = bad
    with pytest.raises(ValueError, match=r"probabilities must be in \[0, 1\]"):
        encode_map(probs, mask)


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 5), (0, 4, 4), (2, 0, 0)])
def test_encoding_refuses_what_is_no_map(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \[heads, N, N\]"):
        encode_map(torch.zeros(shape), Mask())
    with pytest.raises(ValueError, match="float dtype"):
        encode_map(torch.zeros(1, 2, 2, dtype=torch.int64), Mask())
