# SPDX-License-Identifier: Apache-2.0
import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attncache_vllm.reuse.codec import decode_causal, encode_causal, encoded_bytes


def random_map(num_heads: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.rand(num_heads, length, length, generator=generator).tril()


@settings(deadline=None)
@given(
    length=st.one_of(st.integers(1, 300), st.sampled_from([64, 127, 128, 255, 256, 257])),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
)
def test_decoding_gives_back_the_map_rounded_to_bfloat16(
    length: int, num_kv_heads: int, group: int
) -> None:
    num_heads = num_kv_heads * group
    probs = random_map(num_heads, length)
    payload = encode_causal(probs)
    assert payload.dtype == torch.uint8
    assert payload.shape == (encoded_bytes(num_heads, length),)
    maps = decode_causal(payload, num_heads, num_kv_heads, length)
    assert torch.equal(maps.to_dense(), probs.bfloat16())
    for block in maps.blocks:
        assert block.probs.shape == (num_kv_heads, group, block.stop - block.start, block.stop)
        assert block.probs.is_contiguous()


def test_layout_is_the_lower_triangle_of_each_head_row_by_row() -> None:
    probs = torch.tensor([[[1.0, 9], [0.25, 0.75]], [[1.0, 9], [0.5, 0.5]]])
    stored = encode_causal(probs).view(torch.bfloat16)
    assert stored.tolist() == [1.0, 0.25, 0.75, 1.0, 0.5, 0.5]


def test_size_is_half_the_dense_map_plus_the_diagonal() -> None:
    assert encoded_bytes(9, 512) == 9 * (512 * 513 // 2) * 2


def test_decoding_reads_a_read_only_memory_map(tmp_path: Path) -> None:
    probs = random_map(6, 130)
    path = tmp_path / "map"
    path.write_bytes(bytes(64) + encode_causal(probs).numpy().tobytes())
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    array = np.frombuffer(view, dtype=np.uint8, offset=64)
    assert not array.flags.writeable
    with pytest.warns(UserWarning, match="not writable"):
        payload = torch.from_numpy(array)
    assert torch.equal(decode_causal(payload, 6, 2, 130).to_dense(), probs.bfloat16())


def test_the_decoded_map_does_not_alias_the_payload() -> None:
    payload = encode_causal(random_map(2, 70))
    maps = decode_causal(payload, 2, 1, 70)
    before = maps.to_dense()
    payload.zero_()
    assert torch.equal(maps.to_dense(), before)


@pytest.mark.parametrize(
    "payload",
    [
        torch.zeros(encoded_bytes(4, 10) - 1, dtype=torch.uint8),
        torch.zeros(encoded_bytes(4, 10) + 2, dtype=torch.uint8),
        torch.zeros(0, dtype=torch.uint8),
        torch.zeros(encoded_bytes(4, 10), dtype=torch.int8),
        torch.zeros(encoded_bytes(4, 10), 1, dtype=torch.uint8),
        torch.zeros(encoded_bytes(4, 10) * 2, dtype=torch.uint8)[::2],
        torch.zeros(encoded_bytes(4, 10) + 1, dtype=torch.uint8)[1:],
    ],
    ids=["short", "long", "empty", "dtype", "2-D", "strided", "odd offset"],
)
def test_a_payload_that_does_not_fit_is_refused(payload: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="440 contiguous uint8 bytes"):
        decode_causal(payload, 4, 2, 10)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 3), (2, 4), (0, 1), (4, 0), (4, -2)])
def test_heads_that_do_not_divide_are_refused(num_heads: int, num_kv_heads: int) -> None:
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        decode_causal(torch.zeros(440, dtype=torch.uint8), num_heads, num_kv_heads, 10)


def test_an_absurd_length_is_refused_before_anything_is_allocated() -> None:
    with pytest.raises(ValueError, match="contiguous uint8 bytes"):
        decode_causal(torch.zeros(16, dtype=torch.uint8), 4, 2, 2**40)
    with pytest.raises(ValueError, match="length must be at least 1"):
        decode_causal(torch.zeros(0, dtype=torch.uint8), 4, 2, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.5, 1.5])
def test_what_is_no_probability_is_never_stored(bad: float) -> None:
    probs = random_map(3, 20)
    probs[1, 7, 4] = bad
    with pytest.raises(ValueError, match=r"probabilities must be in \[0, 1\]"):
        encode_causal(probs)


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 5), (0, 4, 4), (2, 0, 0)])
def test_encoding_refuses_what_is_no_map(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \[heads, N, N\]"):
        encode_causal(torch.zeros(shape))
    with pytest.raises(ValueError, match="float dtype"):
        encode_causal(torch.zeros(1, 2, 2, dtype=torch.int64))
