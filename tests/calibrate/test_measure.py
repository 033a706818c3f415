# SPDX-License-Identifier: Apache-2.0
"""What texts keep of their exact answers, by a model whose answers are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calibration_samples import Tokens, sample_texts
from torch import Tensor

from attncache_vllm.calibrate.fidelity import compare
from attncache_vllm.calibrate.measure import Measured

TEXTS = sample_texts(0, 40)


class Model:
    """A vector for each text; ``damage`` is how much noise is in it."""

    max_tokens = 64

    def __init__(self) -> None:
        self.damage = 0.0

    def tokenize(self, text: str, pair: None, max_tokens: int) -> Tokens:
        return sample_texts(int(text), 1)[0][:max_tokens]

    def run(self, texts: Sequence[Tokens]) -> Tensor:
        answers = []
        for ids in texts:
            generator = torch.Generator().manual_seed(int(ids.sum()) * 1000 + int(ids[0]))
            exact, noise = torch.randn(2, 8, generator=generator)
            answers.append(exact + self.damage * noise)
        return torch.stack(answers)


@dataclass(frozen=True)
class Task:
    """Keeps what it was given to compare; half a point is lost for each unit of change."""

    sent: tuple[str, ...] = ("100", "101", "102")
    exact_only: tuple[str, ...] = ("103",)

    def change(self, exact: Tensor, reused: Tensor) -> float:
        assert len(exact) == len(reused) + len(self.exact_only)
        return -float((exact[: len(reused)] - reused).abs().mean()) / 2

    def figures(self, exact: Tensor, reused: Tensor, seed: int) -> Any:
        change = self.change(exact, reused)
        return SimpleNamespace(
            values={"difference": change}, ci95={"difference": (change - 0.1, change + 0.1)}
        )

    def halves(self) -> tuple[Task, Task]:
        return self, self


def measured(task: Any = None) -> tuple[Model, Measured]:
    model: Any = Model()
    return model, Measured(model, TEXTS, task)


def test_exact_answers_keep_everything() -> None:
    _, texts = measured(Task())
    fidelity = texts.fidelity(texts.answers())
    assert fidelity.pairwise_spearman == pytest.approx(1)
    assert (fidelity.self_retrieval, fidelity.task_change) == (1, 0)


def test_what_is_kept_is_that_of_the_answers_now() -> None:
    model, texts = measured()
    exact = model.run(TEXTS)
    model.damage = 1.0
    found = texts.fidelity(texts.answers())
    assert found == compare(exact, model.run(TEXTS))
    assert found.pairwise_spearman < 1 and found.task_change is None


def test_a_report_is_the_fidelity_within_its_intervals() -> None:
    model, texts = measured()
    model.damage = 1.0
    surely, report = texts.checked(texts.answers())
    fidelity = texts.fidelity(texts.answers())
    for name, reported in (("pairwise_spearman", "rank_fidelity"), ("self_retrieval",) * 2):
        low, _ = report["ci95"][reported]
        assert low < getattr(surely, name) < getattr(fidelity, name)
    assert surely.centred_cosine == fidelity.centred_cosine
    assert report["rank_fidelity"] == pytest.approx(fidelity.pairwise_spearman, abs=1e-4)
    assert report["self_retrieval"] == pytest.approx(fidelity.self_retrieval, abs=1e-4)
    assert report["centred_cosine"] == pytest.approx(fidelity.centred_cosine, abs=1e-4)
    assert report["texts"] == len(TEXTS)
    assert set(report["ci95"]) == {"rank_fidelity", "self_retrieval", "centred_cosine"}
    for name, (low, high) in report["ci95"].items():
        assert low < report[name] < high
    assert "task_change" not in report


def test_a_task_is_measured_on_its_own_texts() -> None:
    model, texts = measured(Task())
    model.damage = 1.0
    surely, report = texts.checked(texts.answers())
    assert surely.task_change == texts.fidelity(texts.answers()).task_change
    assert surely.task_change is not None and surely.task_change < 0
    assert report["task_change"] == pytest.approx(surely.task_change, abs=1e-4)
    low, high = report["ci95"]["task_change"]
    assert low < report["task_change"] < high


def test_answers_of_parts_are_those_of_the_whole() -> None:
    model, texts = measured(Task())
    first, last = Task(sent=("100", "101")), Task(sent=("101", "102"))
    parts = texts.part(slice(15), first), texts.part(slice(15, None), last)
    model.damage = 1.0
    # Exact ones are not computed anew: the model does not give them any more.
    assert compare(parts[0].exact.texts, model.run(TEXTS[:15])).centred_cosine < 0.9
    a, b = (part.answers() for part in parts)
    assert len(a.texts) == 15 and set(a.sent) == {"100", "101"}
    assert texts.checked(a + b) == texts.checked(texts.answers())
    assert parts[0].fidelity(a) != parts[1].fidelity(b)
