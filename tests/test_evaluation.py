# SPDX-License-Identifier: Apache-2.0
"""`make eval` without an engine: disjoint texts, targets, and the shape of its report."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from attncache_vllm.calibrate.corpus import token_hash
from attncache_vllm.evaluate.files import write_rows
from benchmarks import eval as evaluation
from benchmarks import mmlu, workloads
from benchmarks.corpus import Pair, edited_copies
from benchmarks.workloads import WORKLOADS, Sizes, Target, Unavailable, write_files


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


class Words:
    """A tokenizer whose tokens are words, numbered as they are met."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def ids(self, text: str) -> list[int]:
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return [self.words.index(word) for word in text.split()]

    def __call__(self, text: str | list[str], **_: Any) -> SimpleNamespace:
        rows = [self.ids(t) for t in text] if isinstance(text, list) else self.ids(text)
        return SimpleNamespace(input_ids=rows)

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids)


def test_what_is_measured_is_taken_from_the_texts_to_choose_on_and_to_record(
    tmp_path: Path,
) -> None:
    measure = [{"text": "m1", "text_pair": "m2"}, {"text": "m3"}]
    files = write_files(tmp_path, ["r", "c", "m2", "r"], ["c", "m1", "c"], measure)
    assert texts(files.record) == ["r"]
    assert texts(files.choose) == ["c"]
    assert texts(files.measure) == ["m1", "m3"]


def test_sentences_of_measured_pairs_are_never_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {
        "test": [Pair("a", "shared", 1.0), Pair("b", "c", 2.0)],
        "train": [Pair(f"t{i}", "shared", 0.0) for i in range(10)],
        "dev": [Pair("a", f"d{i}", 0.0) for i in range(5)]
        + [Pair("e", f"d{i}", 0.0) for i in range(9)],
    }
    monkeypatch.setattr(workloads, "stsb_pairs", splits.__getitem__)
    files = workloads.sts_b(tmp_path, Sizes(record=12, choose=5, measure=2, tune=4))
    assert files.tune is not None
    tuned = [json.loads(line) for line in files.tune.read_text().splitlines()]
    assert [row["text"] for row in tuned] == ["e"] * 4, "no sentence of a measured pair"
    record, choose = texts(files.record), texts(files.choose)
    assert (len(record), len(choose)) == (12, 5)
    assert not {"a", "b", "c", "shared"} & {*record, *choose}
    assert not set(record) & set(choose)


@pytest.fixture
def articles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """News whose length in tokens is 200 to 599."""
    words = [f"w{i}" for i in range(50)]
    made = [" ".join([f"n{n}", *(words * 12)[: 199 + n]]) for n in range(400)]
    monkeypatch.setattr(workloads, "news", lambda limit: made)
    monkeypatch.setattr(workloads, "_tokenizer", lambda asset: Words())
    return made


def test_both_news_workloads_record_and_choose_on_the_same_texts(
    tmp_path: Path, articles: list[str]
) -> None:
    sizes = Sizes(record=20, choose=15, measure=10)
    unrelated = workloads.unrelated_news(tmp_path / "u", sizes)
    edited = workloads.edited_news(tmp_path / "e", sizes)
    for name in ("record", "choose"):
        assert getattr(unrelated, name).read_text() == getattr(edited, name).read_text()
    assert unrelated.tune is None
    sets = [set(texts(path)) for path in vars(unrelated).values() if path]
    assert [len(part) for part in sets] == [20, 15, 10]
    assert len(set.union(*sets)) == 45
    assert all(256 <= len(text.split()) <= 512 for part in sets for text in part)
    rows = [json.loads(line) for line in edited.measure.read_text().splitlines()]
    assert [row["original"] for row in rows] == texts(edited.record)[:10]
    assert all(row["text"] != row["original"] for row in rows)


def test_edited_copies_keep_most_of_their_tokens(articles: list[str]) -> None:
    (copy,) = edited_copies(articles[300:301], Words(), 0.05)
    before, after = articles[300].split(), copy.split()
    assert abs(len(after) - len(before)) < 20
    assert before != after


def test_reviews_are_parted_and_those_of_the_budget_have_a_probe_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [SimpleNamespace(text=f"t{n // 2}", label=n % 2) for n in range(80)]  # each twice
    monkeypatch.setattr(workloads, "reviews", lambda limit: made[:limit])
    sizes = Sizes(record=5, choose=6, fit=7, measure=8, tune=4)
    files = workloads.labelled_reviews(tmp_path, sizes)
    sets = [set(texts(path)) for path in vars(files).values()]
    assert [len(part) for part in sets] == [5, 6, 15, 11]
    assert len(set.union(*sets)) == 37
    for path, tested in ((files.measure, 8), (files.tune, 4)):
        assert path is not None
        splits = [json.loads(line)["split"] for line in path.read_text().splitlines()]
        assert splits == ["fit"] * 7 + ["test"] * tested


def questions(path: Path, name: str, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as lines:
        rows = csv.writer(lines)
        rows.writerow(["question", "choice0", "choice1", "choice2", "choice3", "answer"])
        for n in range(count):
            rows.writerow([f"{name} {n},\nwhy?", "w", "x", "y", "z", n % 4])


def test_few_shot_prompts_end_where_the_answer_is_asked_for(tmp_path: Path) -> None:
    questions(tmp_path / "dev" / "high_art_dev.csv", "shot", 7)
    questions(tmp_path / "test" / "high_art_test.csv", "asked", 3)
    assert mmlu.subjects(tmp_path) == ["high_art"]
    prompts = mmlu.prompts(tmp_path, "high_art")
    assert [prompt["answer"] for prompt in prompts] == [0, 1, 2]
    text = prompts[2]["text"]
    assert "about high art." in text
    assert text.count("Answer:") == mmlu.SHOTS + 1
    assert text.endswith("asked 2,\nwhy?\nA. w\nB. x\nC. y\nD. z\nAnswer:")
    assert "shot 1,\nwhy?\nA. w\nB. x\nC. y\nD. z\nAnswer: B\n\n" in text


def test_prompts_of_all_three_sets_are_of_the_same_subjects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for subject in ("one", "two", "three"):
        questions(tmp_path / "dev" / f"{subject}_dev.csv", subject, 5)
        questions(tmp_path / "test" / f"{subject}_test.csv", subject, 20)
    questions(tmp_path / "dev" / "few_dev.csv", "few", 5)
    questions(tmp_path / "test" / "few_test.csv", "few", 2)
    monkeypatch.setenv("ATTNCACHE_MMLU", str(tmp_path))
    monkeypatch.setattr(workloads, "_tokenizer", lambda asset: Words())
    monkeypatch.setattr(workloads, "MMLU_SUBJECTS", 2)
    monkeypatch.setattr(workloads, "MMLU_TOKENS", (10, 10_000))
    files = workloads.few_shot_mmlu(tmp_path / "w", Sizes(record=4, choose=2, measure=6))
    sets = [set(texts(path)) for path in vars(files).values() if path]
    assert [len(part) for part in sets] == [4, 2, 6]
    assert len(set.union(*sets)) == 12
    subjects = [{text.split("about ")[1].split(".")[0] for text in part} for part in sets]
    assert len(subjects[0]) == 2 and "few" not in subjects[0]
    assert subjects[0] == subjects[1] == subjects[2]


def test_without_mmlu_its_workload_says_where_it_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNCACHE_MMLU", str(tmp_path / "absent"))
    with pytest.raises(Unavailable, match="ATTNCACHE_MMLU"):
        workloads.few_shot_mmlu(tmp_path, Sizes(1, 1, 1))


@pytest.mark.parametrize(
    ("target", "met"),
    [
        (Target("", "kl", at_most=0.02), True),
        (Target("", "kl", at_most=0.01), False),
        (Target("", "kl", at_least=0.02), True),
        (Target("", "ci95.kl.0", at_least=0.015), False),
        (Target("", "ci95.kl.1", at_least=0.03), True),
        (Target("", "rows_reused_share", at_least=0.1), None),
        (Target("", "ci95.absent.0", at_least=0.1), None),
    ],
)
def test_a_target_is_met_missed_or_not_measured(target: Target, met: bool | None) -> None:
    row = {"kl": 0.02, "ci95": {"kl": [0.01, 0.03]}, "rows_reused_share": None}
    assert target.met(row) is met


FIGURES = {
    "texts": 3,
    "metric": "rank fidelity",
    "groups_reused_share": 0.4,
    "layers_reused_share": 0.1,
    "rows_reused_share": None,
    "hit_rate": 1.0,
    "exact": 1.0,
    "reuse": 0.985,
    "rank_fidelity": 0.985,
    "self_retrieval": 1.0,
    "ci95": {"rank_fidelity": [0.98, 0.995], "self_retrieval": [1.0, 1.0]},
    "counts": {"hits": {"aligned": 1, "template": 7}},
}
FOUND = {
    "rows": [
        {"model": "M", "workload": "texts", **FIGURES, "published_rule": {**FIGURES, "reuse": 0.5}}
    ],
    "calibration": {
        "budget": {"rank": 0.99, "self_retrieval": 0.99, "task": None},
        "predicted": {"template": {"rank_fidelity": 0.5, "self_retrieval": 0.5}},
        "rehearsed": {
            "corpus": {"rank_fidelity": 0.997, "self_retrieval": 1.0, "centred_cosine": 0.5},
            "edits": {"rank_fidelity": 0.5, "self_retrieval": 1.0, "centred_cosine": 0.5},
        },
    },
    "plan": {},
    "entries": 8,
    "versions": {},
}
SHAPE = [
    *("model", "workload", "groups_reused_share", "layers_reused_share", "rows_reused_share"),
    *("hit_rate", "exact", "reuse", "rank_fidelity", "self_retrieval", "ci95", "published_rule"),
]


def test_a_line_has_the_promised_keys_and_the_rest_below_them() -> None:
    row = evaluation.row_of(WORKLOADS["news"], FOUND)
    assert [key for key in row if key not in {"targets", "details"}] == SHAPE
    assert row["workload"] == WORKLOADS["news"].title
    assert row["published_rule"]["reuse"] == 0.5
    met = {target["target"]: target["met"] for target in row["targets"]}
    assert met == {
        "at least 1/3 of KV groups": True,
        "at least 1/3 of map rows": None,
        "all requests": True,
        "rank fidelity at least 0.99": False,
        "self-retrieval at least 0.99": True,
        "predicted rank_fidelity 0.9970 not below": True,
        "predicted rank_fidelity 0.9970 not above": False,
        "predicted self_retrieval 1.0000 not below": True,
        "predicted self_retrieval 1.0000 not above": True,
    }


def test_predictions_are_those_of_the_budget_on_texts_like_the_workloads() -> None:
    def predicted(name: str, **budget: float) -> set[str]:
        calibration = {
            "budget": {"rank": None, "self_retrieval": None, "task": None, **budget},
            "predicted": {"template": {"rank_fidelity": 0.5, "task_change": -0.002}},
            "rehearsed": FOUND["calibration"]["rehearsed"],
        }
        targets = evaluation.prediction_targets(WORKLOADS[name], calibration)
        return {target.text.rsplit(" not ")[0] for target in targets}

    assert predicted("edits", rank=0.9) == {"predicted rank_fidelity 0.5000"}
    assert predicted("reviews", task=0.005) == {"predicted task_change -0.0020"}
    assert predicted("news", rank=0.9, self_retrieval=0.9) == {
        "predicted rank_fidelity 0.9970",
        "predicted self_retrieval 1.0000",
    }


def test_every_target_is_about_a_figure_that_its_task_has() -> None:
    shares = {"hit_rate", "groups_reused_share", "layers_reused_share", "rows_reused_share"}
    common = shares | {"rank_fidelity", "self_retrieval", "centred_cosine", "exact", "reuse"}
    own = {"pairs": {"difference"}, "labels": {"difference"}, "prompts": {"difference", "kl"}}
    own |= {"edits": {"ci95.gain_over_stale.0"}}
    for workload in WORKLOADS.values():
        known = common | own.get(workload.task, set())
        assert {target.figure for target in workload.targets} <= known


def test_rows_are_kept_and_what_did_not_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def measure(name: str, *_: object) -> dict[str, Any]:
        asked.append(name)
        if name == "mmlu":
            raise Unavailable("MMLU is not here")
        return evaluation.row_of(WORKLOADS[name], FOUND)

    monkeypatch.setattr(evaluation, "measure", measure)

    def run(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["eval", "--out", str(tmp_path), *arguments])
        evaluation.main()

    run("--only", "news")
    with pytest.raises(SystemExit) as ended:
        run("--only", "sts-b,news,mmlu")
    assert ended.value.code == 1
    assert asked == ["news", "sts-b", "mmlu"], "the row that was there is kept"
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["workload"] for row in report["rows"]] == [
        WORKLOADS[name].title for name in ("sts-b", "news")
    ]
    assert report["not_run"] == {"mmlu": "MMLU is not here"}
    page = (tmp_path / "report.html").read_text()
    assert "MISSED" in page and "MMLU is not here" in page and "href='news/report.html'" in page
    assert "MISSED" in capsys.readouterr().out
    run("--only", "news", "--again")
    assert asked[-1] == "news"


def test_edits_of_what_the_plan_was_chosen_on_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Letters:
        def __call__(self, text: str) -> SimpleNamespace:
            return SimpleNamespace(input_ids=[ord(letter) for letter in text])

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: Letters())
    entries = [SimpleNamespace(token_hash=token_hash([ord(text)])) for text in "abcd"]
    predicted = {"aligned": {"entries": [0]}, "template": {}}
    rehearsed = {"edits": {"entries": [2]}, "corpus": {}}
    report = {"calibration": {"predicted": predicted, "rehearsed": rehearsed}}
    manifest: Any = SimpleNamespace(entries=entries, published=SimpleNamespace(report=report))
    rows = [{"text": text + "x", "original": text} for text in "abcd"]
    path = write_rows(tmp_path / "measure.jsonl", rows)

    def left() -> list[str]:
        unseen = evaluation.unseen_edits(path, manifest, tmp_path)
        assert unseen != path
        return [json.loads(line)["original"] for line in unseen.read_text().splitlines()]

    assert left() == ["b", "d"]
    report.clear()
    assert left() == ["a", "b", "c", "d"]
