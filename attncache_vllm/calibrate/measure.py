# SPDX-License-Identifier: Apache-2.0
"""Texts whose exact answers are known: what do they keep of them while something is served?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from attncache_vllm.calibrate.bootstrap import (
    interval,
    mean_samples,
    pairwise_spearman_samples,
    resamples,
)
from attncache_vllm.calibrate.edits import Tokens
from attncache_vllm.calibrate.fidelity import Fidelity, centred, compare, finds_itself
from attncache_vllm.calibrate.model import CalibratedModel


class Figures(Protocol):
    """A task's figures by name; ``difference`` is its metric, reused less exact."""

    @property
    def values(self) -> Mapping[str, float]: ...

    @property
    def ci95(self) -> Mapping[str, tuple[float, float]]: ...


class Task(Protocol):
    """A task with a metric of its own, as of ``attncache evaluate``."""

    @property
    def sent(self) -> list[str]:
        """Texts that are answered exactly and with reuse."""

    @property
    def exact_only(self) -> list[str]:
        """Further texts, of which only exact answers are needed."""

    def figures(self, exact: Tensor, reused: Tensor, seed: int) -> Figures:
        """Compare answers ``exact`` [sent + exact_only, D] with ``reused`` [sent, D]."""

    def change(self, exact: Tensor, reused: Tensor) -> float:
        """The figure ``difference`` alone: intervals take their time."""

    def halves(self) -> tuple[Task, Task]:
        """Two tasks that measure on different texts."""


@dataclass(frozen=True, eq=False)
class Answers:
    """A model's answers.

    Attributes:
        texts: float32 ``[N, D]``, to the texts that are measured.
        sent: by text, float32 ``[D]``, to those of the task; empty without one.
    """

    texts: Tensor
    sent: Mapping[str, Tensor]

    def __add__(self, other: Answers) -> Answers:
        return Answers(torch.cat([self.texts, other.texts]), {**self.sent, **other.sent})

    def to(self, texts: Sequence[str]) -> Tensor:
        """``[len(texts), D]``, to texts of the task."""
        return torch.stack([self.sent[text] for text in texts])


class Measured:
    """Texts, and perhaps a task, with their exact answers."""

    def __init__(
        self,
        model: CalibratedModel,
        texts: Sequence[Tokens],
        task: Task | None = None,
        exact: Answers | None = None,
    ) -> None:
        """``exact`` are the exact answers to all of it where they are known."""
        self.texts = texts
        self._model = model
        self._task = task
        further = () if task is None else task.exact_only
        self.exact = self._run(further) if exact is None else exact

    def part(self, span: slice, task: Task | None) -> Measured:
        """Some of the texts, and a task that sends no others."""
        exact = Answers(self.exact.texts[span], self.exact.sent)
        return Measured(self._model, self.texts[span], task, exact)

    def answers(self) -> Answers:
        """Those of what the model serves now."""
        return self._run(())

    def fidelity(self, reused: Answers) -> Fidelity:
        """What is kept by other answers."""
        fidelity = compare(self.exact.texts, reused.texts)
        if self._task is None:
            return fidelity
        exact = self.exact.to([*self._task.sent, *self._task.exact_only])
        return replace(fidelity, task_change=self._task.change(exact, reused.to(self._task.sent)))

    def checked(self, reused: Answers) -> tuple[Fidelity, dict[str, Any]]:
        """What is surely kept, and the figures as plain data with 95 % bootstrap intervals over the
        texts.

        Surely is less one standard error of the texts: of samples like these, five in six keep as
        much. A task's change is as it is: its error is larger than a budget would ever be.
        """
        fidelity = self.fidelity(reused)
        a, b = centred(self.exact.texts, reused.texts)
        counts = resamples(len(a))
        samples = {
            "rank_fidelity": pairwise_spearman_samples(a @ a.T, b @ b.T, counts),
            "self_retrieval": mean_samples(finds_itself(a, b).double(), counts),
            "centred_cosine": mean_samples((a * b).sum(1), counts),
        }
        bounds = {name: interval(values) for name, values in samples.items()}
        kept = {
            "rank_fidelity": fidelity.pairwise_spearman,
            "self_retrieval": fidelity.self_retrieval,
            "centred_cosine": fidelity.centred_cosine,
        }
        if self._task is not None:
            exact = self.exact.to([*self._task.sent, *self._task.exact_only])
            figures = self._task.figures(exact, reused.to(self._task.sent), 0)
            kept["task_change"] = figures.values["difference"]
            bounds["task_change"] = figures.ci95["difference"]
        surely = replace(
            fidelity,
            pairwise_spearman=fidelity.pairwise_spearman - samples["rank_fidelity"].std().item(),
            self_retrieval=fidelity.self_retrieval - samples["self_retrieval"].std().item(),
        )
        return surely, {
            **{name: round(value, 4) for name, value in kept.items()},
            "ci95": {name: [round(bound, 4) for bound in pair] for name, pair in bounds.items()},
            "texts": len(reused.texts),
        }

    def _run(self, further: Sequence[str]) -> Answers:
        """Answers to the texts, to those that the task sends, and to ``further`` ones."""
        texts = self._model.run(self.texts)
        if self._task is None:
            return Answers(texts, {})
        sent = list(dict.fromkeys([*self._task.sent, *further]))
        longest = self._model.max_tokens
        tokens = [self._model.tokenize(text, None, longest) for text in sent]
        return Answers(texts, dict(zip(sent, self._model.run(tokens), strict=True)))
