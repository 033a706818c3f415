# SPDX-License-Identifier: Apache-2.0
"""What is asked of both servers, and the figures their answers are compared by."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from attncache_vllm.calibrate import fidelity
from attncache_vllm.calibrate.bootstrap import (
    interval,
    mean_samples,
    pairwise_spearman_samples,
    resamples,
    spearman_samples,
)
from attncache_vllm.calibrate.fidelity import spearman
from attncache_vllm.errors import SettingsError
from attncache_vllm.evaluate import next_token
from attncache_vllm.evaluate.files import Edited, Labelled, Pair, Prompt
from attncache_vllm.evaluate.probe import Probe, numbered

FEWEST = 3  # texts: with two there is one similarity and nothing to rank
# Rank fidelity looks at the pairs of so many texts: at half a million pairs more say little more.
RANKED_TEXTS = 1000


@dataclass
class Figures:
    """Named figures, and of those that have an interval the values over all resamples."""

    values: dict[str, float] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: float, samples: Tensor) -> None:
        self.values[name] = value
        self.samples[name] = samples

    def subtract(self, name: str, figure: str, from_figure: str) -> None:
        """``name`` is ``from_figure - figure``, item by item of the same resamples."""
        self.add(
            name,
            self.values[from_figure] - self.values[figure],
            self.samples[from_figure] - self.samples[figure],
        )

    @property
    def ci95(self) -> dict[str, tuple[float, float]]:
        return {name: interval(samples) for name, samples in self.samples.items()}


class Task(Protocol):
    """A workload.

    Attributes:
        name: what the report calls it.
        metric: what its ``exact`` and ``reuse`` are.
        raw: whether embeddings are wanted as they are, not normalised, and prompts whole.
        sent: texts that both servers embed.
        exact_only: further texts, of which only exact embeddings are needed.
    """

    name: str
    metric: str
    raw: bool

    @property
    def sent(self) -> list[str]: ...

    @property
    def exact_only(self) -> list[str]: ...

    def figures(self, exact: Tensor, reused: Tensor, seed: int) -> Figures:
        """Compare embeddings ``exact`` [sent + exact_only, D] with ``reused`` [sent, D]."""


@dataclass(frozen=True)
class Texts:
    """Any texts: do their embeddings keep their places among each other?"""

    texts: Sequence[str]
    name = "texts"
    metric = "rank fidelity"
    raw = False

    def __post_init__(self) -> None:
        _require(len(self.texts) >= FEWEST, "texts", f"{FEWEST} different texts", len(self.texts))

    @property
    def sent(self) -> list[str]:
        return list(self.texts)

    @property
    def exact_only(self) -> list[str]:
        return []

    def figures(self, exact: Tensor, reused: Tensor, seed: int) -> Figures:
        figures = embedding_figures(exact, reused, seed)
        figures.values |= {"exact": 1.0, "reuse": figures.values["rank_fidelity"]}
        return figures


@dataclass(frozen=True)
class Pairs:
    """Pairs of texts with scores: Spearman's correlation of cosine and score."""

    pairs: Sequence[Pair]
    name = "pairs"
    metric = "Spearman of cosine and score"
    raw = False

    def __post_init__(self) -> None:
        _require(len(self.pairs) >= FEWEST, "pairs", f"{FEWEST} pairs", len(self.pairs))

    @property
    def sent(self) -> list[str]:
        return _different(text for pair in self.pairs for text in (pair.text, pair.text_pair))

    @property
    def exact_only(self) -> list[str]:
        return []

    def figures(self, exact: Tensor, reused: Tensor, seed: int) -> Figures:
        figures = embedding_figures(exact, reused, seed)
        gold = torch.tensor([pair.score for pair in self.pairs], dtype=torch.float64)
        counts = resamples(len(gold), seed)
        for name, side in (("exact", exact), ("reuse", reused)):
            cosines = self.similarities(side)
            figures.add(name, spearman(cosines, gold), spearman_samples(cosines, gold, counts))
        figures.subtract("difference", "exact", "reuse")
        return figures

    def change(self, exact: Tensor, reused: Tensor) -> float:
        """The figure ``difference`` alone, without an interval."""
        gold = torch.tensor([pair.score for pair in self.pairs], dtype=torch.float64)
        return spearman(self.similarities(reused), gold) - spearman(self.similarities(exact), gold)

    def halves(self) -> tuple[Pairs, Pairs]:
        """Every other pair, and the rest."""
        return Pairs(self.pairs[::2]), Pairs(self.pairs[1::2])

    def similarities(self, embeddings: Tensor) -> Tensor:
        """Cosine of the two texts of each pair; rows of ``embeddings`` as ``sent``."""
        row = {text: number for number, text in enumerate(self.sent)}
        first = embeddings[[row[pair.text] for pair in self.pairs]]
        second = embeddings[[row[pair.text_pair] for pair in self.pairs]]
        return torch.cosine_similarity(first, second, dim=-1)


@dataclass(frozen=True)
class Labels:
    """Labelled texts: accuracy of a linear probe that was fitted to exact embeddings.

    That is an application whose classifier stays when reuse is switched on.
    """

    fit: Sequence[Labelled]
    test: Sequence[Labelled]
    name = "labels"
    metric = "accuracy of a linear probe"
    raw = False

    def __post_init__(self) -> None:
        _require(len(self.test) >= FEWEST, "labels", f"{FEWEST} texts to test", len(self.test))
        classes = {str(row.label) for row in self.fit}
        _require(len(classes) >= 2, "labels", "2 classes among the texts to fit", len(classes))
        if unseen := {str(row.label) for row in self.test} - classes:
            raise SettingsError(
                f"every label must be among the texts to fit, got {sorted(unseen)} to test only"
            )

    @classmethod
    def split(cls, rows: Sequence[Labelled], seed: int) -> Labels:
        """By each row's ``split``, or half and half at random where there is none."""
        if any(row.split is None for row in rows):
            drawn = random.Random(seed).sample(list(rows), len(rows))
            return cls(drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :])
        return cls(
            [row for row in rows if row.split == "fit"],
            [row for row in rows if row.split == "test"],
        )

    def change(self, exact: Tensor, reused: Tensor) -> float:
        """The figure ``difference`` alone, without an interval."""
        right = self._right(exact, reused)
        return (right[1].double().mean() - right[0].double().mean()).item()

    def _right(self, exact: Tensor, reused: Tensor) -> tuple[Tensor, Tensor]:
        """bool [test]: whether the probe's answer is right, on exact and on reused embeddings."""
        labels, names = numbered([row.label for row in (*self.test, *self.fit)])
        gold = labels[: len(self.test)]
        fitted = exact[len(self.test) :]
        probe = Probe.fit(fitted, labels[len(self.test) :], len(names))
        return probe(exact[: len(self.test)]) == gold, probe(reused) == gold

    def halves(self) -> tuple[Labels, Labels]:
        """Every other text to test, and the rest; both fit their probe to the same texts."""
        return Labels(self.fit, self.test[::2]), Labels(self.fit, self.test[1::2])

    @property
    def sent(self) -> list[str]:
        return [row.text for row in self.test]

    @property
    def exact_only(self) -> list[str]:
        return [row.text for row in self.fit]

    def figures(self, exact: Tensor, reused: Tensor, seed: int) -> Figures:
        figures = embedding_figures(exact[: len(self.test)], reused, seed)
        counts = resamples(len(self.test), seed)
        right, right_reused = self._right(exact, reused)
        figures.add("exact", *_share(right, counts))
        figures.add("reuse", *_share(right_reused, counts))
        figures.subtract("difference", "exact", "reuse")
        return figures


@dataclass(frozen=True)
class Prompts:
    """Prompts with choices: the distribution of the next token.

    ``weight`` are the output embeddings ``[V, D]``, ``tokens`` the first tokens of each prompt's
    choices.
    """

    prompts: Sequence[Prompt]
    tokens: Sequence[Sequence[int]]
    weight: Tensor
    name = "prompts"
    metric = "accuracy of the choice"
    raw = True

    def __post_init__(self) -> None:
        _require(len(self.prompts) >= FEWEST, "prompts", f"{FEWEST} prompts", len(self.prompts))

    @property
    def sent(self) -> list[str]:
        return [prompt.text for prompt in self.prompts]

    @property
    def exact_only(self) -> list[str]:
        return []

    def figures(self, exact: Tensor, reused: Tensor, seed: int) -> Figures:
        figures = embedding_figures(exact, reused, seed)
        divergence, chosen, chosen_reused = next_token.compare(
            exact, reused, self.weight, self.tokens
        )
        counts = resamples(len(divergence), seed)
        gold = torch.tensor([prompt.answer for prompt in self.prompts])
        figures.add("exact", *_share(chosen == gold, counts))
        figures.add("reuse", *_share(chosen_reused == gold, counts))
        figures.subtract("difference", "exact", "reuse")
        figures.add("kl", divergence.mean().item(), mean_samples(divergence, counts))
        figures.add("agreement", *_share(chosen == chosen_reused, counts))
        return figures


@dataclass(frozen=True)
class Edits:
    """Edited copies of stored texts, beside what costs nothing: the old embedding as it is."""

    edits: Sequence[Edited]
    name = "edits"
    metric = "rank fidelity"
    raw = False

    def __post_init__(self) -> None:
        _require(len(self.edits) >= FEWEST, "edits", f"{FEWEST} different texts", len(self.edits))

    @property
    def sent(self) -> list[str]:
        return [edit.text for edit in self.edits]

    @property
    def exact_only(self) -> list[str]:
        return [edit.original for edit in self.edits]

    def figures(self, exact: Tensor, reused: Tensor, seed: int) -> Figures:
        edited, originals = exact[: len(self.edits)], exact[len(self.edits) :]
        figures = embedding_figures(edited, reused, seed)
        figures.values |= {"exact": 1.0, "reuse": figures.values["rank_fidelity"]}
        stale = embedding_figures(edited, originals, seed)
        for name, value in stale.values.items():
            figures.add(f"stale_{name}", value, stale.samples[name])
        figures.subtract("gain_over_stale", "stale_rank_fidelity", "rank_fidelity")
        return figures


def embedding_figures(exact: Tensor, reused: Tensor, seed: int) -> Figures:
    """Rank fidelity, self-retrieval and centred cosine of embeddings ``[N, D]``."""
    figures = Figures()
    a, b = fidelity.centred(exact, reused)
    counts = resamples(len(a), seed)
    figures.add("self_retrieval", *_share(fidelity.finds_itself(a, b), counts))
    cosines = (a * b).sum(1)
    figures.add("centred_cosine", cosines.mean().item(), mean_samples(cosines, counts))
    a, b = a[:RANKED_TEXTS], b[:RANKED_TEXTS]
    first, second = a @ a.T, b @ b.T
    i, j = torch.triu_indices(len(a), len(a), offset=1)
    samples = pairwise_spearman_samples(first, second, resamples(len(a), seed))
    figures.add("rank_fidelity", spearman(first[i, j], second[i, j]), samples)
    return figures


def _share(right: Tensor, counts: Tensor) -> tuple[float, Tensor]:
    return right.double().mean().item(), mean_samples(right, counts)


def _different(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _require(holds: bool, task: str, needed: str, got: int) -> None:
    if not holds:
        raise SettingsError(f"{task} must hold at least {needed}, got {got}; add some")
