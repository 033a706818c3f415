# SPDX-License-Identifier: Apache-2.0
"""Texts whose exact answers are known: what do they keep of them while something is served?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

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


class Measured:
    """Texts, and perhaps a task, with their exact answers."""

    def __init__(
        self, model: CalibratedModel, texts: Sequence[Tokens], task: Task | None = None
    ) -> None:
        self.texts = texts
        self._model = model
        self._exact = model.run(texts)
        self._task = task
        if task is not None:
            longest = model.max_tokens
            self._sent = [model.tokenize(text, None, longest) for text in task.sent]
            further = [model.tokenize(text, None, longest) for text in task.exact_only]
            self._task_exact = model.run([*self._sent, *further])

    def fidelity(self) -> Fidelity:
        """What is kept by what the model serves now."""
        return self._fidelity(*self._answers())

    def compared(self, reused: Tensor) -> Fidelity:
        """What other answers ``[N, D]`` to the texts keep."""
        return compare(self._exact, reused)

    def checked(self) -> tuple[Fidelity, dict[str, Any]]:
        """What is surely kept, and the figures as plain data with 95 % bootstrap intervals over the
        texts.

        Surely is less one standard error of the texts: of samples like these, five in six keep as
        much. A task's change is as it is: its error is larger than a budget would ever be.
        """
        reused, reused_sent = self._answers()
        fidelity = self._fidelity(reused, reused_sent)
        a, b = centred(self._exact, reused)
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
        if self._task is not None and reused_sent is not None:
            figures = self._task.figures(self._task_exact, reused_sent, 0)
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
            "texts": len(reused),
        }

    def _answers(self) -> tuple[Tensor, Tensor | None]:
        """To the texts, and to those of the task."""
        reused = self._model.run(self.texts)
        return reused, None if self._task is None else self._model.run(self._sent)

    def _fidelity(self, reused: Tensor, reused_sent: Tensor | None) -> Fidelity:
        fidelity = compare(self._exact, reused)
        if self._task is None or reused_sent is None:
            return fidelity
        return replace(fidelity, task_change=self._task.change(self._task_exact, reused_sent))
