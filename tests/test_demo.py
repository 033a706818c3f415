# SPDX-License-Identifier: Apache-2.0
import pytest

from benchmarks.demo import Request, fidelity_of

EXACT = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]


def answered(reused: list[list[float]]) -> list[Request]:
    return [
        Request("text", "hit", exact_ms=2.0, reuse_ms=1.0, exact=exact, reuse=reuse)
        for exact, reuse in zip(EXACT, reused, strict=True)
    ]


def test_the_figures_of_a_demo_are_numbers() -> None:
    kept = fidelity_of(answered(EXACT))
    assert kept == pytest.approx(
        {"centred_cosine": 1.0, "pairwise_spearman": 1.0, "self_retrieval": 1.0}
    )
    lost = fidelity_of(answered(EXACT[::-1]))
    assert lost["self_retrieval"] < 1.0 and lost["centred_cosine"] < 0.9
