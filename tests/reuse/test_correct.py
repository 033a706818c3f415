# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_tensors
from torch import Tensor

from attncache_vllm.reuse.correct import (
    Correction,
    Corrections,
    FitSums,
    corrections_from_bytes,
    corrections_to_bytes,
)

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 3
SIZE = HEADS * HEAD_SIZE
# Outputs and own values: what a correction reads.
INPUTS = SIZE + KV_HEADS * HEAD_SIZE
SERVED = (1, 3)
# The outputs of heads 1 and 3 among those of all heads.
COLUMNS = [3, 4, 5, 9, 10, 11]
TINY_RIDGE = 1e-7


def fit_correction(
    reused: Tensor,
    value: Tensor,
    exact: Tensor,
    heads: tuple[int, ...],
    head_size: int,
    ridge: float,
) -> Correction:
    counts = torch.ones(len(value))
    return FitSums.of(reused, value, exact, counts, heads, head_size).solve(ridge)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correction(heads: tuple[int, ...] = SERVED, dtype: torch.dtype = torch.float32) -> Correction:
    width = len(heads) * HEAD_SIZE
    return Correction(heads, random(INPUTS, width).to(dtype) / 4, random(width, seed=1).to(dtype))


def values(tokens: int, seed: int = 4) -> Tensor:
    return random(tokens, KV_HEADS, HEAD_SIZE, seed=seed)


def corrected(reused: Tensor, value: Tensor, found: Correction) -> Tensor:
    out = reused.clone()
    found.apply_(out, value)
    return out


def planted(tokens: int, noise: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Correction]:
    """Reused outputs, own values and exact outputs of which the correction is known."""
    truth, reused, value = correction(), random(tokens, SIZE, seed=2), values(tokens)
    exact = corrected(reused, value, truth)
    return reused, value, exact + noise * random(tokens, SIZE, seed=3), truth


# -- applying ----------------------------------------------------------------------------------


def test_a_correction_reads_all_heads_and_own_values_and_writes_its_heads() -> None:
    found, reused, value = correction(), random(7, SIZE, seed=5), values(7)
    assert found.columns().tolist() == COLUMNS
    answer = corrected(reused, value, found)
    others = [column for column in range(SIZE) if column not in COLUMNS]
    assert torch.equal(answer[:, others], reused[:, others])
    for token in range(7):
        for at, column in enumerate(COLUMNS):
            of_outputs, of_values = found.weight[:, at].split([SIZE, INPUTS - SIZE])
            change = reused[token] @ of_outputs + found.bias[at]
            for group in range(KV_HEADS):
                first = group * HEAD_SIZE
                change += value[token, group] @ of_values[first : first + HEAD_SIZE]
            torch.testing.assert_close(answer[token, column], reused[token, column] + change)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("bias", [False, True])
@given(heads=st.sets(st.integers(0, HEADS - 1), min_size=1))
@settings(deadline=None)
def test_folded_into_the_projection_it_gives_the_same(
    dtype: torch.dtype, tolerance: float, bias: bool, heads: set[int]
) -> None:
    found = correction(tuple(sorted(heads)), dtype)
    weight = random(9, SIZE, seed=7).to(dtype)
    own = random(9, seed=8).to(dtype) if bias else None
    reused, value = random(40, SIZE, seed=9).to(dtype), values(40).to(dtype)
    applied = torch.nn.functional.linear(corrected(reused, value, found), weight, own)
    folded_weight, folded_bias = found.folded(weight, own)
    assert (folded_weight.dtype, folded_bias.dtype) == (dtype, dtype)
    given = torch.cat([reused, value.flatten(1)], 1)
    folded = torch.nn.functional.linear(given, folded_weight, folded_bias)
    assert (folded.float() - applied.float()).norm() / applied.float().norm() <= tolerance


def test_it_moves_to_a_dtype_as_a_whole() -> None:
    found = correction().to(torch.device("cpu"), torch.bfloat16)
    assert (found.weight.dtype, found.bias.dtype) == (torch.bfloat16, torch.bfloat16)
    assert found.heads == SERVED


# -- fitting -----------------------------------------------------------------------------------


def test_a_planted_relation_is_recovered() -> None:
    reused, value, exact, truth = planted(200)
    found = fit_correction(reused, value, exact, SERVED, HEAD_SIZE, TINY_RIDGE)
    assert found.heads == SERVED
    torch.testing.assert_close(found.weight, truth.weight, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.bias, truth.bias, rtol=0, atol=1e-3)
    assert (corrected(reused, value, found) - exact).norm() / exact.norm() < 1e-3


def test_sums_of_parts_fit_what_those_of_the_whole_do() -> None:
    reused, value, exact, _ = planted(90, noise=0.3)
    ones = torch.ones(90)
    parts = [
        FitSums.of(reused[part], value[part], exact[part], ones[part], SERVED, HEAD_SIZE)
        for part in (slice(30), slice(30, 90))
    ]
    found = (parts[0] + parts[1]).solve(0.1)
    whole = fit_correction(reused, value, exact, SERVED, HEAD_SIZE, 0.1)
    torch.testing.assert_close(found.weight, whole.weight, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.bias, whole.bias, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(parts[0].solve(0.1).weight, whole.weight, rtol=1e-2)


def test_a_token_that_counts_twice_is_two_tokens() -> None:
    reused, value, exact, _ = planted(60, noise=0.3)
    counts = torch.ones(60)
    counts[::7] = 2
    twice = counts.long()
    found = FitSums.of(reused, value, exact, counts, SERVED, HEAD_SIZE).solve(0.1)
    repeated = (part.repeat_interleave(twice, 0) for part in (reused, value, exact))
    expected = fit_correction(*repeated, SERVED, HEAD_SIZE, 0.1)
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-3, atol=1e-5)
    once = fit_correction(reused, value, exact, SERVED, HEAD_SIZE, 0.1)
    assert not torch.allclose(found.weight, once.weight, rtol=1e-2)


def test_what_only_own_values_tell_is_taken_back() -> None:
    # The exact outputs lean on the token itself, the reused ones do not know it.
    reused, value = random(200, SIZE, seed=2), values(200)
    exact = reused + value.repeat_interleave(HEADS // KV_HEADS, 1).flatten(1) / 2
    seen, unseen = slice(0, 100), slice(100, 200)
    found = fit_correction(reused[seen], value[seen], exact[seen], SERVED, HEAD_SIZE, TINY_RIDGE)
    error = corrected(reused[unseen], value[unseen], found) - exact[unseen]
    assert error[:, COLUMNS].abs().max() < 1e-3
    # Each head its own group, and nothing of the outputs.
    expected = torch.zeros(INPUTS, len(COLUMNS))
    expected[SIZE:] = torch.eye(6) / 2
    torch.testing.assert_close(found.weight, expected, rtol=0, atol=1e-3)


def test_a_fit_lowers_the_error_of_texts_that_it_has_not_seen() -> None:
    reused, value, exact, _ = planted(400, noise=0.3)
    found = fit_correction(reused[:200], value[:200], exact[:200], SERVED, HEAD_SIZE, 0.01)
    unseen = slice(200, 400)
    before = (reused[unseen] - exact[unseen])[:, COLUMNS].norm()
    after = (corrected(reused[unseen], value[unseen], found) - exact[unseen])[:, COLUMNS].norm()
    assert after < 0.5 * before


def test_heads_that_are_not_corrected_decide_nothing() -> None:
    reused, value, exact, _ = planted(200)
    exact[:, [0, 1, 2]] += 5  # head 0 is another's business; it only weighs the rows
    found = fit_correction(reused, value, exact, SERVED, HEAD_SIZE, TINY_RIDGE)
    torch.testing.assert_close(
        corrected(reused, value, found)[:, COLUMNS], exact[:, COLUMNS], rtol=0, atol=0.01
    )


def test_one_huge_row_does_not_decide_the_fit() -> None:
    # It follows another rule than the others, as the first token's row does.
    reused, value, exact, truth = planted(200)
    reused = torch.cat([1000 * random(1, SIZE, seed=11), reused])
    value = torch.cat([1000 * values(1, seed=13), value])
    exact = torch.cat([1000 * random(1, SIZE, seed=12), exact])
    found = fit_correction(reused, value, exact, SERVED, HEAD_SIZE, TINY_RIDGE)
    rest = slice(1, None)
    error = (corrected(reused[rest], value[rest], found) - exact[rest])[:, COLUMNS].norm()
    assert error / exact[rest][:, COLUMNS].norm() < 0.2
    assert (found.weight - truth.weight).norm() / truth.weight.norm() < 0.2

    # By plain least squares that row would decide.
    given = torch.cat([reused, value.flatten(1), torch.ones(201, 1)], 1)
    plain = torch.linalg.lstsq(given, (exact - reused)[:, COLUMNS]).solution[:INPUTS]
    assert (plain - truth.weight).norm() / truth.weight.norm() > 0.5


@given(st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_a_ridge_has_no_unit(scale: float) -> None:
    # Outputs and values in another unit: the same weight, and a bias in that unit.
    reused, value, exact, _ = planted(60, noise=0.1)
    found = fit_correction(reused, value, exact, SERVED, HEAD_SIZE, 0.3)
    scaled = fit_correction(scale * reused, scale * value, scale * exact, SERVED, HEAD_SIZE, 0.3)
    torch.testing.assert_close(scaled.weight, found.weight, rtol=1e-2, atol=1e-4)


def test_a_ridge_is_the_same_for_more_texts_of_the_same_kind() -> None:
    reused, value, exact, _ = planted(60, noise=0.1)
    found = fit_correction(reused, value, exact, SERVED, HEAD_SIZE, 0.3)
    again = fit_correction(
        reused.repeat(5, 1), value.repeat(5, 1, 1), exact.repeat(5, 1), SERVED, HEAD_SIZE, 0.3
    )
    torch.testing.assert_close(again.weight, found.weight, rtol=1e-2, atol=1e-4)


def test_a_ridge_holds_the_correction_small() -> None:
    reused, value, exact, _ = planted(60, noise=0.5)
    weights = [
        fit_correction(reused, value, exact, SERVED, HEAD_SIZE, ridge).weight
        for ridge in (1e-6, 0.1, 1.0, 100.0)
    ]
    for part in (slice(SIZE), slice(SIZE, INPUTS)):  # outputs, values
        norms = [float(weight[part].norm()) for weight in weights]
        assert norms == sorted(norms, reverse=True)
        assert norms[-1] < 0.1 * norms[0]
    # The bias is not held: what all tokens lack is added whatever the ridge.
    shifted = reused.clone()
    shifted[:, COLUMNS] += 2.0
    found = fit_correction(reused, value, shifted, SERVED, HEAD_SIZE, 100.0)
    torch.testing.assert_close(found.bias, torch.full((6,), 2.0), rtol=0, atol=0.1)


def test_fewer_tokens_than_outputs_are_enough_for_a_fit() -> None:
    reused, value, exact, _ = planted(5)
    found = fit_correction(reused, value, exact, SERVED, HEAD_SIZE, 0.01)
    assert found.weight.isfinite().all() and found.bias.isfinite().all()


def test_rows_of_zeros_are_no_division_by_zero() -> None:
    reused, value, exact, _ = planted(50)
    reused[7], value[7], exact[7] = 0.0, 0.0, 0.0
    found = fit_correction(reused, value, exact, SERVED, HEAD_SIZE, 0.01)
    assert found.weight.isfinite().all()


@pytest.mark.parametrize(
    ("reused", "value", "exact", "heads", "ridge"),
    [
        (random(3, SIZE), values(3), random(4, SIZE), SERVED, 0.1),
        (random(3, SIZE), values(3), random(3, SIZE + 1), SERVED, 0.1),
        (random(3, 2, SIZE), values(3), random(3, 2, SIZE), SERVED, 0.1),
        (random(0, SIZE), values(0), random(0, SIZE), SERVED, 0.1),
        (random(3, SIZE), values(4), random(3, SIZE), SERVED, 0.1),
        (random(3, SIZE), values(3).flatten(1), random(3, SIZE), SERVED, 0.1),
        (random(3, SIZE), values(3), random(3, SIZE), (), 0.1),
        (random(3, SIZE), values(3), random(3, SIZE), SERVED, 0.0),
        (random(3, SIZE), values(3), random(3, SIZE), SERVED, -1.0),
        (random(3, SIZE), values(3), random(3, SIZE), SERVED, float("nan")),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    reused: Tensor, value: Tensor, exact: Tensor, heads: tuple[int, ...], ridge: float
) -> None:
    with pytest.raises(ValueError, match=r"a correction .* got"):
        fit_correction(reused, value, exact, heads, HEAD_SIZE, ridge)


# -- bytes -------------------------------------------------------------------------------------


def read(data: bytes) -> Corrections:
    return corrections_from_bytes(data, HEADS, KV_HEADS, HEAD_SIZE)


def test_corrections_survive_their_bytes() -> None:
    given = {
        ("template", 3): correction(dtype=torch.bfloat16),
        ("neighbour", 3): correction((0,), torch.bfloat16),
        ("template", 11): correction((0, 1, 2, 3), torch.bfloat16),
    }
    found = read(corrections_to_bytes(given))  # type: ignore[arg-type]
    assert found.keys() == given.keys()
    for key, ours in given.items():
        assert found[key].heads == ours.heads  # type: ignore[index]
        assert torch.equal(found[key].weight, ours.weight)  # type: ignore[index]
        assert torch.equal(found[key].bias, ours.bias)  # type: ignore[index]
    assert read(corrections_to_bytes({})) == {}


def crafted(heads: object, weight: Tensor | None = None, bias: Tensor | None = None) -> bytes:
    sound = correction(dtype=torch.bfloat16)
    tensors = {
        "template.3.weight": sound.weight if weight is None else weight,
        "template.3.bias": sound.bias if bias is None else bias,
    }
    data: bytes = save_tensors(tensors, {"heads": json.dumps(heads)})
    return data


OWN = {"template.3": [1, 3]}
BF16 = torch.bfloat16


def test_what_is_crafted_below_would_be_read_if_it_were_sound() -> None:
    assert read(crafted(OWN)).keys() == {("template", 3)}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x" * 50,
        (1 << 60).to_bytes(8, "little") + b"{}",
        save_tensors({}),
        save_tensors({}, {"heads": "[" * 100_000}),
        save_tensors({}, {"heads": json.dumps(OWN)}),
        crafted([]),
        crafted(None),
        crafted({"template.3": None}),
        crafted({"template.3": []}),
        crafted({"template.3": [1, 4]}),
        crafted({"template.3": [-1, 1]}),
        crafted({"template.3": [3, 1]}),
        crafted({"template.3": [1, 1]}),
        crafted({"template.3": [1.0, 3.0]}),
        crafted({"template.3": [True, 3]}),
        crafted({"template.3": [[1], [3]]}),
        crafted({"template.3": "13"}),
        crafted({"template.3": [1]}),
        crafted({"template.four": [1, 3]}),
        crafted({"exact.3": [1, 3]}),
        crafted({"template": [1, 3]}),
        crafted(OWN, weight=torch.zeros(INPUTS + 1, 6, dtype=BF16)),
        crafted(OWN, weight=torch.zeros(SIZE, 6, dtype=BF16)),  # reads no values
        crafted(OWN, weight=torch.zeros(INPUTS, 5, dtype=BF16)),
        crafted(OWN, weight=torch.zeros(INPUTS * 6, dtype=BF16)),
        crafted(OWN, bias=torch.zeros(5, dtype=BF16)),
        crafted(OWN, weight=torch.full((INPUTS, 6), float("nan"), dtype=BF16)),
        crafted(OWN, bias=torch.full((6,), float("inf"), dtype=BF16)),
        crafted(OWN, weight=torch.zeros(INPUTS, 6)),
        crafted(OWN, weight=torch.zeros(INPUTS, 6, dtype=torch.int64)),
        crafted(OWN, bias=torch.zeros(6).to(torch.float8_e4m3fn)),
    ],
)
def test_bytes_that_are_no_corrections_of_the_model_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="these are not corrections of a model with 4 heads of 3"):
        read(data)


def test_corrections_named_for_a_source_that_the_bytes_lack_are_refused() -> None:
    data = crafted({"neighbour.3": [1, 3]})
    with pytest.raises(ValueError, match="these are not corrections"):
        read(data)


def test_corrections_of_a_model_with_other_kv_heads_are_refused() -> None:
    data = crafted(OWN)
    for kv_heads in (1, HEADS):
        with pytest.raises(ValueError, match="these are not corrections"):
            corrections_from_bytes(data, HEADS, kv_heads, HEAD_SIZE)
