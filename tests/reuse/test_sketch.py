# SPDX-License-Identifier: Apache-2.0
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from attncache_vllm.reuse.sketch import SHINGLE, SKETCH_SIZE, shingle_hashes, sketch

texts = st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 2), min_size=1, max_size=100)


def ids(tokens: list[int]) -> NDArray[np.int32]:
    return np.array(tokens, dtype=np.int32)


def text(draw: random.Random, length: int) -> list[int]:
    """Tokens as unlike in frequency as words are, so that many of them repeat."""
    return [int(20 * draw.paretovariate(0.7)) % 49_152 for _ in range(length)]


def splitmix(value: int) -> int:
    """The finaliser of SplitMix64 as published."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def hashed(run: list[int]) -> int:
    value = 0
    for token in run:
        value = (value * 0x9E3779B97F4A7C15 + token + 1) % 2**64
    return splitmix(value)


@given(texts, st.integers(1, 8))
def test_every_run_has_the_hash_that_is_documented(tokens: list[int], width: int) -> None:
    runs = [tokens[at : at + width] for at in range(len(tokens) - width + 1)]
    assert shingle_hashes(ids(tokens), width).tolist() == [hashed(run) for run in runs]


@given(texts | st.integers(70, 300).map(lambda length: text(random.Random(length), length)))
def test_a_sketch_holds_the_smallest_hashes_of_all_runs(tokens: list[int]) -> None:
    width = min(SHINGLE, len(tokens))
    runs = {hashed(tokens[at : at + width]) for at in range(len(tokens) - width + 1)}
    found = sketch(ids(tokens))
    assert found.dtype == np.uint64
    assert found.tolist() == sorted(runs)[:SKETCH_SIZE]


def test_a_sketch_is_the_same_in_every_process() -> None:
    code = (
        "import numpy as np; from attncache_vllm.reuse.sketch import sketch;"
        "print(sketch(np.arange(99, dtype=np.int32)).tolist())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] == f"{sketch(np.arange(99, dtype=np.int32)).tolist()}\n"


def test_token_ids_may_come_in_any_integer_type() -> None:
    tokens = list(range(5, 400, 3))
    for dtype in (np.int64, np.uint16):
        assert np.array_equal(sketch(np.array(tokens, dtype=dtype)), sketch(ids(tokens)))


def test_the_order_of_tokens_matters() -> None:
    forward = list(range(200))
    common = np.intersect1d(sketch(ids(forward)), sketch(ids(forward[::-1])))
    assert not len(common)


def counts(query: list[int], store: list[NDArray[np.uint64]]) -> list[int]:
    own = sketch(ids(query))
    return [len(np.intersect1d(own, other)) for other in store]


@pytest.mark.parametrize("share", [0.02, 0.05, 0.15, 0.3])
def test_an_edited_text_has_most_in_common_with_its_original(share: float) -> None:
    draw = random.Random(0)
    originals = [text(draw, 300) for _ in range(60)]
    store = [sketch(ids(tokens)) for tokens in originals]
    for number, tokens in enumerate(originals[:12]):
        changed = [draw.choice(tokens) if draw.random() < share else token for token in tokens]
        common = counts(changed, store)
        own = common.pop(number)
        assert own >= 2 * max(common)


def test_a_shared_beginning_shows_beside_another_end() -> None:
    draw = random.Random(1)
    beginnings = [text(draw, 200) for _ in range(10)]
    store = [sketch(ids(start + text(draw, 100))) for start in beginnings]
    for number, start in enumerate(beginnings):
        common = counts(start + text(draw, 100), store)
        assert max(common) == common[number] >= SKETCH_SIZE // 4


@pytest.mark.parametrize(
    "tokens", [ids([]), ids([[1, 2]]), np.array([1.0])], ids=["empty", "2-D", "float"]
)
def test_what_is_no_text_has_no_sketch(tokens: NDArray[np.int32]) -> None:
    with pytest.raises(ValueError, match=r"tokens must be \[L\] integers"):
        sketch(tokens)
