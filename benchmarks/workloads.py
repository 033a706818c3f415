# SPDX-License-Identifier: Apache-2.0
"""The workloads of ``make eval``: their texts, how they are served, and what they are held to.

Of each, three sets of texts are written that have no text in common: those whose maps are recorded,
those that the plan is chosen on, and those that it is measured on.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from attncache_vllm.evaluate.files import write_rows
from benchmarks import mmlu
from benchmarks.assets import ensure
from benchmarks.classifiers import Review, reviews
from benchmarks.corpus import Pair, edited_copies, news, stsb_pairs

EDITED_SHARE = 0.05
MEAN = ("--convert", "embed", "--pooler-config", '{"seq_pooling_type": "MEAN"}')
LAST = (
    *("--convert", "embed", "--pooler-config", '{"seq_pooling_type": "LAST"}'),
    # Beside prefix caching, on by default with the last token, every request is bypassed; beside
    # chunked prefill, every prompt that does not fit the rest of a step.
    *("--no-enable-prefix-caching", "--no-enable-chunked-prefill"),
)


class Unavailable(Exception):
    """A workload cannot be run here; the message says why."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of texts to record, to choose on, to measure on, (labels) to fit a probe to, and
    (budgets of a task) to measure the task on while choosing."""

    record: int
    choose: int
    measure: int
    fit: int = 0
    tune: int = 0


@dataclass(frozen=True)
class Files:
    """The corpora of a workload: to record, to choose on, to measure on, and the task of its
    budget if that is one of a task."""

    record: Path
    choose: Path
    measure: Path
    tune: Path | None = None


@dataclass(frozen=True)
class Target:
    """A bound on a figure of a row; ``ci95.NAME.0`` is the lower end of an interval."""

    text: str
    figure: str
    at_least: float | None = None
    at_most: float | None = None

    def met(self, row: dict[str, Any]) -> bool | None:
        """Whether ``row`` keeps it; None where the row has no such figure."""
        value: Any = row
        for key in self.figure.split("."):
            if value is not None:
                value = value[int(key)] if isinstance(value, list) else value.get(key)
        if value is None:
            return None
        return (self.at_least is None or value >= self.at_least) and (
            self.at_most is None or value <= self.at_most
        )


@dataclass(frozen=True)
class Workload:
    """A line of the table.

    Attributes:
        title: what the report calls it.
        asset: the model.
        layers: all of them, as ``attncache build`` takes them.
        task: the option of ``attncache evaluate`` that its measured texts are for.
        serve: options of ``vllm serve``.
        tokens: fewest and most tokens of an entry; shorter requests are bypassed.
        full, quick: how many texts.
        prepare: writes the files.
        targets: what must be kept.
        budget: what the plan is chosen for: the metric that its targets are about.
        store: the folder of its store. Workloads that share it record and choose on the same.
    """

    title: str
    asset: str
    layers: str
    task: str
    serve: tuple[str, ...]
    tokens: tuple[int, int]
    full: Sizes
    quick: Sizes
    prepare: Callable[[Path, Sizes], Files]
    targets: tuple[Target, ...]
    budget: str
    store: str


def write_files(
    folder: Path,
    record: Iterable[str],
    choose: Iterable[str],
    measure: Sequence[dict[str, Any]],
) -> Files:
    """Write the three sets, less any text that is in a later one.

    What is measured is given, so texts are taken from the others.
    """
    measured = {row[key] for row in measure for key in ("text", "text_pair") if key in row}
    chosen = [text for text in dict.fromkeys(choose) if text not in measured]
    taken = measured | set(chosen)
    recorded = [text for text in dict.fromkeys(record) if text not in taken]
    return Files(
        write_rows(folder / "record.jsonl", [{"text": text} for text in recorded]),
        write_rows(folder / "choose.jsonl", [{"text": text} for text in chosen]),
        write_rows(folder / "measure.jsonl", measure),
    )


def sts_b(folder: Path, sizes: Sizes) -> Files:
    """Pairs of the test split; the other splits' sentences are recorded and chosen on, and the
    task is tuned on their pairs."""
    pairs = random.Random(0).sample(stsb_pairs("test"), sizes.measure)
    measured = {text for pair in pairs for text in (pair.first, pair.second)}
    known = stsb_pairs("train") + stsb_pairs("dev")
    others = [text for pair in known for text in (pair.first, pair.second)]
    # Some test sentences stand in the other splits, too: their own maps would be exact.
    free = [text for text in dict.fromkeys(others) if text not in measured]
    random.Random(0).shuffle(free)  # the splits are sorted by source
    choose, record = free[: sizes.choose], free[sizes.choose :][: sizes.record]
    unseen = [pair for pair in known if measured.isdisjoint((pair.first, pair.second))]
    random.Random(0).shuffle(unseen)
    files = write_files(folder, record, choose, _scored(pairs))
    return replace(files, tune=write_rows(folder / "tune.jsonl", _scored(unseen[: sizes.tune])))


def _scored(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    return [{"text": pair.first, "text_pair": pair.second, "score": pair.score} for pair in pairs]


def unrelated_news(folder: Path, sizes: Sizes) -> Files:
    """Articles of 256 to 512 tokens, each in one set."""
    record, choose, others = _articles(sizes)
    return write_files(folder, record, choose, [{"text": text} for text in others[: sizes.measure]])


def edited_news(folder: Path, sizes: Sizes) -> Files:
    """Edited copies of recorded articles. The store is that of unrelated news."""
    record, choose, _ = _articles(sizes)
    originals = record[: sizes.measure]
    copies = edited_copies(originals, _tokenizer("smollm2"), EDITED_SHARE)
    rows = [
        {"text": copy, "original": original}
        for copy, original in zip(copies, originals, strict=True)
    ]
    return write_files(folder, record, choose, rows)


def labelled_reviews(folder: Path, sizes: Sizes) -> Files:
    """Film reviews with the sign of people's ratings."""
    total = sizes.record + sizes.choose + 2 * sizes.fit + sizes.tune + sizes.measure
    drawn = list({review.text: review for review in reviews(2 * total)}.values())[:total]
    record, rest = drawn[: sizes.record], drawn[sizes.record :]
    choose, rest = rest[: sizes.choose], rest[sizes.choose :]
    size = sizes.fit + sizes.tune
    tune, rest = rest[:size], rest[size:]
    files = write_files(
        folder,
        (row.text for row in record),
        (row.text for row in choose),
        _labelled(rest, sizes.fit),
    )
    return replace(files, tune=write_rows(folder / "tune.jsonl", _labelled(tune, sizes.fit)))


def _labelled(rows: Sequence[Review], fit: int) -> list[dict[str, Any]]:
    """The first ``fit`` of them to fit a probe to, the rest to test it on."""
    return [
        {"text": row.text, "label": row.label, "split": "fit" if n < fit else "test"}
        for n, row in enumerate(rows)
    ]


def few_shot_mmlu(folder: Path, sizes: Sizes) -> Files:
    """Five-shot prompts; other questions of the same subjects are recorded and chosen on.

    Raises:
        Unavailable: the folder of MMLU is not there.
    """
    source = mmlu_folder()
    if not (source / "test").is_dir():
        raise Unavailable(
            f"MMLU is not at {str(source)!r}; point ATTNCACHE_MMLU at a folder with dev and test"
        )
    shortest, longest = MMLU_TOKENS
    tokenizer = _tokenizer("smollm2")
    sets: tuple[list[dict[str, Any]], ...] = [], [], []
    parts = [-(-n // MMLU_SUBJECTS) for n in (sizes.record, sizes.choose, sizes.measure)]
    draw = random.Random(0)
    names = mmlu.subjects(source)
    left = MMLU_SUBJECTS
    for subject in draw.sample(names, len(names)):
        rows = mmlu.prompts(source, subject)
        draw.shuffle(rows)
        fitting = (
            row for row in rows if shortest <= len(tokenizer(row["text"]).input_ids) <= longest
        )
        picked = list(islice(fitting, sum(parts)))
        if len(picked) == sum(parts):  # not every subject has short questions
            for chosen, part in zip(sets, parts, strict=True):
                chosen += picked[:part]
                del picked[:part]
            left -= 1
        if left == 0:
            break
    record, choose, measure = sets
    return write_files(
        folder, (row["text"] for row in record), (row["text"] for row in choose), measure
    )


def mmlu_folder() -> Path:
    return Path(os.environ.get("ATTNCACHE_MMLU") or "../shared/data/mmlu")


def _articles(sizes: Sizes) -> tuple[list[str], list[str], list[str]]:
    """News articles to record and to choose on, and all others, of 256 to 512 tokens."""
    texts = news(NEWS_ARTICLES)
    lengths = [len(ids) for ids in _tokenizer("smollm2")(texts).input_ids]
    fitting = [text for text, n in zip(texts, lengths, strict=True) if 256 <= n <= 512]
    chosen = sizes.record + sizes.choose
    return fitting[: sizes.record], fitting[sizes.record : chosen], fitting[chosen:]


def _tokenizer(asset: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ensure(asset))


NEWS_ARTICLES = 3781  # different ones in the corpus
NEWS_FULL = Sizes(record=220, choose=430, measure=200)
NEWS_QUICK = Sizes(record=12, choose=32, measure=24)
MMLU_SUBJECTS = 20
MMLU_TOKENS = (256, 768)
THIRD_OF_GROUPS = Target("at least 1/3 of KV groups", "groups_reused_share", at_least=1 / 3)
# An aligned request counts as a whole among the groups, however few of its rows are served.
THIRD_OF_ROWS = Target("at least 1/3 of map rows", "rows_reused_share", at_least=1 / 3)
ALL_REQUESTS = Target("all requests", "hit_rate", at_least=0.995)
RANKS = Target("rank fidelity at least 0.99", "rank_fidelity", at_least=0.99)
BUDGET = "rank=0.99,self-retrieval=0.99"

WORKLOADS = {
    "sts-b": Workload(
        title="STS-B",
        asset="minilm",
        layers="0-5",
        task="pairs",
        # vLLM's choice for a float32 pooling model is float16, slow on CPUs without FP16 units.
        serve=("--dtype", "bfloat16"),
        tokens=(2, 64),  # the longest test sentence has 46
        full=Sizes(record=1000, choose=4000, measure=1379, tune=3000),
        quick=Sizes(record=200, choose=60, measure=150, tune=60),
        prepare=sts_b,
        targets=(
            THIRD_OF_GROUPS,
            THIRD_OF_ROWS,
            ALL_REQUESTS,
            Target("Spearman within 0.3 points", "difference", at_least=-0.003),
        ),
        budget="task=0.003",
        store="sts-b",
    ),
    "news": Workload(
        title="unrelated news, 256-512 tokens",
        asset="smollm2",
        layers="0-29",
        task="texts",
        serve=(*MEAN, "--max-model-len", "512"),
        tokens=(16, 512),
        full=NEWS_FULL,
        quick=NEWS_QUICK,
        prepare=unrelated_news,
        targets=(
            THIRD_OF_GROUPS,
            THIRD_OF_ROWS,
            ALL_REQUESTS,
            RANKS,
            Target("self-retrieval at least 0.99", "self_retrieval", at_least=0.99),
        ),
        budget=BUDGET,
        store="news",
    ),
    "reviews": Workload(
        title="VADER reviews, LAST, probe",
        asset="smollm2",
        layers="0-29",
        task="labels",
        serve=(*LAST, "--max-model-len", "128"),
        tokens=(4, 128),
        # Sentences of twenty tokens: what corrections are fitted on takes thousands.
        full=Sizes(record=300, choose=3000, measure=2000, fit=1500, tune=2000),
        quick=Sizes(record=40, choose=40, measure=100, fit=200, tune=60),
        prepare=labelled_reviews,
        targets=(
            THIRD_OF_GROUPS,
            THIRD_OF_ROWS,
            Target("accuracy within 0.5 points", "difference", at_least=-0.005),
        ),
        budget="task=0.005",
        store="reviews",
    ),
    "edits": Workload(
        title="edited news, 5 % of tokens",
        asset="smollm2",
        layers="0-29",
        task="edits",
        serve=(*MEAN, "--max-model-len", "512"),
        tokens=(16, 512),
        full=replace(NEWS_FULL, measure=220),
        quick=replace(NEWS_QUICK, measure=12),
        prepare=edited_news,
        targets=(
            Target("at least 60 % of layer-rows", "rows_reused_share", at_least=0.6),
            RANKS,
            Target("above the old embedding", "ci95.gain_over_stale.0", at_least=0.0),
        ),
        budget=BUDGET,
        store="news",
    ),
    "mmlu": Workload(
        title="MMLU, 5 shots, LAST",
        asset="smollm2",
        layers="0-29",
        task="prompts",
        serve=(*LAST, "--max-model-len", "1024"),
        tokens=(16, 1024),
        full=Sizes(record=60, choose=120, measure=200),
        quick=Sizes(record=20, choose=20, measure=20),
        prepare=few_shot_mmlu,
        targets=(
            Target("at least 80 % of layer-rows", "rows_reused_share", at_least=0.8),
            Target("KL at most 0.02", "kl", at_most=0.02),
        ),
        budget=BUDGET,
        store="mmlu",
    ),
}
