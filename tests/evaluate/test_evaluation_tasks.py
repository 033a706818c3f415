# SPDX-License-Identifier: Apache-2.0
"""Figures of each task, on embeddings whose damage is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attncache_vllm.calibrate.fidelity import compare, spearman
from attncache_vllm.errors import SettingsError
from attncache_vllm.evaluate.files import Edited, Labelled, Pair, Prompt
from attncache_vllm.evaluate.tasks import Edits, Figures, Labels, Pairs, Prompts, Task, Texts

WIDTH = 12


def embeddings(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)).double()


def damaged(exact: Tensor, by: float) -> Tensor:
    return exact + by * embeddings(len(exact), 99)


def check_intervals(figures: Figures) -> None:
    """Every figure lies in its interval, or it is not one of the same thing."""
    for name, (low, high) in figures.ci95.items():
        assert low <= figures.values[name] <= high, name


def test_texts_are_compared_as_fidelity_is_defined() -> None:
    exact = embeddings(40)
    reused = damaged(exact, 0.3)
    figures = Texts([str(i) for i in range(40)]).figures(exact, reused, seed=0)
    expected = compare(exact, reused)
    assert figures.values["rank_fidelity"] == expected.pairwise_spearman
    assert figures.values["self_retrieval"] == expected.self_retrieval
    assert figures.values["centred_cosine"] == pytest.approx(expected.centred_cosine)
    assert figures.values["reuse"] == figures.values["rank_fidelity"] < figures.values["exact"] == 1
    check_intervals(figures)


def test_no_damage_is_no_doubt() -> None:
    exact = embeddings(10)
    figures = Texts([str(i) for i in range(10)]).figures(exact, exact.clone(), seed=0)
    for name in ("rank_fidelity", "self_retrieval", "centred_cosine"):
        assert figures.ci95[name] == pytest.approx((1, 1))


def test_pairs_find_each_text_where_it_was_embedded() -> None:
    task = Pairs([Pair("a", "b", 1.0), Pair("b", "c", 2.0), Pair("c", "c", 5.0)])
    assert task.sent == ["a", "b", "c"]
    assert task.exact_only == []
    found = task.similarities(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, -3.0]]))
    assert found.tolist() == pytest.approx([0.5**0.5, -(0.5**0.5), 1.0])


def pairs(count: int, exact: Tensor) -> Pairs:
    """Pairs of neighbouring texts, scored by their exact cosine and some noise."""
    cosines = torch.cosine_similarity(exact[:-1], exact[1:], dim=-1)
    scores = cosines + 0.1 * embeddings(count, 5)[:, 0]
    return Pairs([Pair(str(i), str(i + 1), scores[i].item()) for i in range(count)])


def test_pairs_tell_damage_by_the_order_of_their_cosines() -> None:
    exact = embeddings(201)
    task, reused = pairs(200, exact), damaged(exact, 1.0)
    figures = task.figures(exact, reused, seed=0)
    gold = torch.tensor([pair.score for pair in task.pairs]).double()
    assert figures.values["exact"] == pytest.approx(spearman(task.similarities(exact), gold))
    assert figures.values["reuse"] == pytest.approx(spearman(task.similarities(reused), gold))
    low, high = figures.ci95["difference"]
    assert low < figures.values["difference"] < high < -0.1
    check_intervals(figures)


def test_the_interval_of_a_difference_is_of_the_same_pairs() -> None:
    exact = embeddings(201)
    figures = pairs(200, exact).figures(exact, exact.clone(), seed=0)
    low, high = figures.ci95["exact"]
    assert high - low > 0.01, "the figure itself is uncertain"
    assert figures.ci95["difference"] == (0, 0)


def test_halves_measure_on_different_pairs_and_a_change_is_the_difference() -> None:
    exact = embeddings(201)
    task, reused = pairs(200, exact), damaged(exact, 0.5)
    first, second = task.halves()
    assert sorted((*first.pairs, *second.pairs), key=repr) == sorted(task.pairs, key=repr)
    assert len(first.pairs) == len(second.pairs) == 100
    difference = task.figures(exact, reused, seed=0).values["difference"]
    assert task.change(exact, reused) == pytest.approx(difference, abs=1e-12)
    assert task.change(exact, reused) < 0 == task.change(exact, exact)


def labelled(rows: int, seed: int) -> tuple[list[Labelled], Tensor]:
    """Texts of two classes, and embeddings that tell them apart by the first dimension."""
    vectors = embeddings(rows, seed)
    vectors[:, 0] += torch.tensor([-4.0, 4.0]).double()[torch.arange(rows) % 2]
    return [Labelled(f"{seed}.{i}", "ab"[i % 2]) for i in range(rows)], vectors


def test_a_probe_of_exact_embeddings_meets_reused_ones() -> None:
    (test, exact), (fit, fitted) = labelled(60, 1), labelled(80, 2)
    task = Labels(fit, test)
    assert (len(task.sent), len(task.exact_only)) == (60, 80)
    both = torch.cat([exact, fitted])
    intact = task.figures(both, exact.clone(), seed=0)
    assert intact.values["exact"] == intact.values["reuse"] > 0.95
    mirrored = exact.clone()
    mirrored[:, 0] *= -1
    figures = task.figures(both, mirrored, seed=0)
    # The probe was not fitted anew: mirrored classes are mistaken for each other.
    assert figures.values["reuse"] < 0.05
    assert figures.values["difference"] == figures.values["reuse"] - figures.values["exact"]
    check_intervals(figures)


def test_halves_of_labels_test_different_texts_by_the_same_probe() -> None:
    (test, exact), (fit, fitted) = labelled(60, 1), labelled(80, 2)
    task, both = Labels(fit, test), torch.cat([exact, fitted])
    first, second = task.halves()
    assert {*first.sent} | {*second.sent} == {*task.sent}
    assert not {*first.sent} & {*second.sent}
    assert first.exact_only == second.exact_only == task.exact_only
    reused = damaged(exact, 4.0)
    difference = task.figures(both, reused, seed=0).values["difference"]
    assert task.change(both, reused) == pytest.approx(difference, abs=1e-12)
    assert task.change(both, reused) < 0 == task.change(both, exact)


def test_labels_are_split_as_the_file_says_or_by_the_seed() -> None:
    rows = [Labelled(str(i), i % 2) for i in range(20)]
    drawn = Labels.split(rows, seed=0)
    assert drawn == Labels.split(rows, seed=0) != Labels.split(rows, seed=1)
    assert sorted((*drawn.sent, *drawn.exact_only)) == sorted(row.text for row in rows)
    assert len(drawn.fit) == 10
    given = [Labelled(str(i), i % 2, "fit" if i < 4 else "test") for i in range(20)]
    assert Labels.split(given, seed=0).exact_only == ["0", "1", "2", "3"]


def test_a_label_nothing_was_fitted_to_is_refused() -> None:
    fit = [Labelled("a", 0), Labelled("b", 1)]
    with pytest.raises(SettingsError, match="'2'"):
        Labels(fit, [Labelled(str(i), i) for i in range(3)])


def test_prompts_are_answered_by_the_likeliest_choice() -> None:
    weight = torch.eye(WIDTH)
    exact = torch.eye(WIDTH)[:4].double() * 8  # prompt i is followed by token i
    tokens = [[0, 1, 2, 3]] * 4
    prompts = [
        Prompt(f"p{i}", ("A", "B", "C", "D"), answer) for i, answer in enumerate((0, 1, 2, 0))
    ]
    task = Prompts(prompts, tokens, weight)
    reused = exact.clone()
    reused[0] = exact[1]  # the first prompt's answer is lost
    figures = task.figures(exact, reused, seed=0)
    assert (figures.values["exact"], figures.values["reuse"]) == (0.75, 0.5)
    assert figures.values["agreement"] == 0.75
    assert figures.values["kl"] == pytest.approx(8 * 0.996 / 4, rel=0.01)
    check_intervals(figures)


def test_edits_are_compared_with_the_old_embedding() -> None:
    exact = embeddings(60)
    old, reused = damaged(exact, 0.8), damaged(exact, 0.05)
    task = Edits([Edited(f"new {i}", f"old {i}") for i in range(60)])
    assert (task.sent[3], task.exact_only[3]) == ("new 3", "old 3")
    figures = task.figures(torch.cat([exact, old]), reused, seed=0)
    assert figures.values["rank_fidelity"] == compare(exact, reused).pairwise_spearman
    assert figures.values["stale_rank_fidelity"] == compare(exact, old).pairwise_spearman
    assert figures.ci95["gain_over_stale"][0] > 0.1
    check_intervals(figures)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Texts(["a", "b"]), "texts must hold at least 3 different texts, got 2"),
        (lambda: Pairs([Pair("a", "b", 1)]), "pairs must hold at least 3 pairs, got 1"),
        (lambda: Labels([], [Labelled("a", 1)]), "labels must hold at least 3 texts to test"),
        (
            lambda: Labels([Labelled("d", 1)], [Labelled(t, 1) for t in "abc"]),
            "2 classes among the texts to fit, got 1",
        ),
        (lambda: Edits([]), "edits must hold at least 3 different texts, got 0"),
    ],
)
def test_too_few_texts_are_refused(make: object, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("seed", [0, 1])
def test_figures_are_the_same_when_drawn_again(seed: int) -> None:
    exact = embeddings(20)
    task: Task = Texts([str(i) for i in range(20)])
    first, second = (task.figures(exact, damaged(exact, 0.5), seed) for _ in range(2))
    assert (first.values, first.ci95) == (second.values, second.ci95)
