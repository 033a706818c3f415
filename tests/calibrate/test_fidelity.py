# SPDX-License-Identifier: Apache-2.0
from statistics import mean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attncache_vllm.calibrate.fidelity import Fidelity, compare, spearman

# Few distinct values, so that ties are common.
pairs = st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=30)


def embeddings(seed: int, texts: int = 40, width: int = 16) -> Tensor:
    return torch.randn(texts, width, generator=torch.Generator().manual_seed(seed)).double()


def as_tuple(fidelity: Fidelity) -> tuple[float, float, float]:
    return fidelity.centred_cosine, fidelity.pairwise_spearman, fidelity.self_retrieval


def naive_spearman(a: list[int], b: list[int]) -> float:
    """Pearson's correlation of ranks found by counting."""

    def ranks(values: list[int]) -> list[float]:
        return [sum(x < v for x in values) + (values.count(v) + 1) / 2 for v in values]

    x, y = ranks(a), ranks(b)
    mx, my = mean(x), mean(y)
    covariance = sum((i - mx) * (j - my) for i, j in zip(x, y, strict=True))
    spread = sum((i - mx) ** 2 for i in x) * sum((j - my) ** 2 for j in y)
    return covariance / spread**0.5 if spread else 0.0


@given(pairs)
def test_spearman_is_the_correlation_of_the_ranks_with_ties_shared(
    points: list[tuple[int, int]],
) -> None:
    a, b = [x for x, _ in points], [y for _, y in points]
    found = spearman(torch.tensor(a).float(), torch.tensor(b).float())
    assert found == pytest.approx(naive_spearman(a, b), abs=1e-5)


def test_spearman_of_known_ranks() -> None:
    # 1 - 6 * sum(d^2) / (n * (n^2 - 1)) with d = 1, 1, 1, 1, 0.
    a, b = torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([20.0, 10, 40, 30, 50])
    assert spearman(a, b) == pytest.approx(1 - 6 * 4 / (5 * 24))


def test_spearman_sees_order_and_not_size() -> None:
    a = embeddings(0, 50, 1)[:, 0]
    assert spearman(a, a.exp()) == pytest.approx(1)
    assert spearman(a, -(a**3)) == pytest.approx(-1)


def test_spearman_of_a_constant_is_zero() -> None:
    a, constant = torch.arange(5.0), torch.full((5,), 3.0)
    assert spearman(a, constant) == spearman(constant, a) == spearman(constant, constant) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_equal_embeddings_keep_everything(dtype: torch.dtype) -> None:
    exact = embeddings(0).to(dtype)
    assert as_tuple(compare(exact, exact.clone())) == pytest.approx((1, 1, 1))


def test_unrelated_embeddings_keep_nothing() -> None:
    fidelity = compare(embeddings(0), embeddings(1))
    assert abs(fidelity.centred_cosine) < 0.15
    assert abs(fidelity.pairwise_spearman) < 0.15
    assert fidelity.self_retrieval < 0.15


def test_embeddings_given_to_the_wrong_texts_find_other_texts() -> None:
    exact = embeddings(0)
    fidelity = compare(exact, exact.roll(1, dims=0))
    assert fidelity.self_retrieval == 0
    assert abs(fidelity.centred_cosine) < 0.15


def test_embeddings_turned_as_a_whole_keep_their_similarities_and_nothing_else() -> None:
    exact = embeddings(0)
    turn, _ = torch.linalg.qr(embeddings(1, 16, 16))
    centre = exact.mean(0)
    fidelity = compare(exact, (exact - centre) @ turn + centre)
    assert fidelity.pairwise_spearman == pytest.approx(1)
    assert abs(fidelity.centred_cosine) < 0.5
    assert fidelity.self_retrieval < 0.5


def test_two_texts_swapped_are_two_texts_not_found() -> None:
    exact = embeddings(0)
    order = torch.arange(len(exact))
    order[:2] = torch.tensor([1, 0])
    assert compare(exact, exact[order]).self_retrieval == pytest.approx(1 - 2 / len(exact))


def test_what_all_embeddings_share_counts_for_nothing() -> None:
    exact = embeddings(0)
    reused = exact + 0.5 * embeddings(1)
    shared = 100 * embeddings(2, 1)
    assert as_tuple(compare(exact + shared, reused + shared)) == pytest.approx(
        as_tuple(compare(exact, reused)), abs=1e-9
    )
    # Plain cosine would see no difference at all.
    plain = torch.cosine_similarity(exact + shared, reused + shared, dim=1).mean()
    assert plain > 0.999 > compare(exact + shared, reused + shared).centred_cosine


def test_more_damage_is_less_fidelity() -> None:
    exact, noise = embeddings(0), embeddings(1)
    slight, strong = (as_tuple(compare(exact, exact + k * noise)) for k in (0.2, 2.0))
    assert all(a > b for a, b in zip(slight, strong, strict=True))


@pytest.mark.parametrize(
    ("exact", "reused"), [((2, 4), (2, 4)), ((5, 4), (5, 3)), ((5, 4), (4, 4)), ((5,), (5,))]
)
def test_shapes_that_cannot_be_compared_are_refused(
    exact: tuple[int, ...], reused: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"\[N, D\] with N >= 3, got"):
        compare(torch.zeros(exact), torch.zeros(reused))
