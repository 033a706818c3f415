# SPDX-License-Identifier: Apache-2.0
"""The command line: mistakes, and the options of calibrate and rearm."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_samples import (
    attncache,
    one_line_error,
    published,
)

from attncache_vllm.calibrate import build, calibrate
from attncache_vllm.calibrate.budget import Budget
from attncache_vllm.calibrate.corpus import Text
from attncache_vllm.errors import AttnCacheError
from attncache_vllm.store.rearm import rearmed_at


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # The commands set it for the processes they start, and so for this one.
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return published(tmp_path / "store")


# -- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "verify", "rearm"])
def test_a_folder_without_a_store_is_one_line_with_a_remedy(command: str, tmp_path: Path) -> None:
    message = one_line_error(attncache(command, tmp_path))
    assert str(tmp_path) in message
    assert "attncache build" in message


def test_brackets_in_a_path_are_printed_as_they_are(tmp_path: Path) -> None:
    # They look like rich's markup: "[/b]" alone would be an error, "[b]" would vanish.
    path = tmp_path / "[b]maps" / "[" / "b]:smile:"
    assert str(path) in one_line_error(attncache("verify", path))
    assert str(path) in attncache("inspect", published(path)).stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect"],
        ["inspect", "store", "--yaml"],
        ["record"],
        ["build", "model", "--corpus", "c.txt"],
        ["build", "model", "--corpus", "c.txt", "--store", "s", "--max-entries", "0"],
        ["build", "model", "--corpus", "c.txt", "--store", "s", "--max-distance", "-1"],
        ["build", "model", "--corpus", "c.txt", "--store", "s", "--min-tokens", "1"],
        ["calibrate", "model", "--store", "s"],
        ["calibrate", "model", "--corpus", "c.txt", "--store", "s", "--max-tokens", "1"],
        ["rearm"],
    ],
)
def test_a_wrong_call_exits_2_without_a_traceback(arguments: list[str]) -> None:
    result = attncache(*arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.stderr


Build = Callable[..., Any]


@pytest.fixture
def build_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """``attncache build`` of a model of six layers, up to where an engine would start."""

    def record(options: build.BuildOptions, layers: tuple[int, ...], texts: object) -> Any:
        raise AssertionError(f"an engine would start for {options}")

    monkeypatch.setattr(build, "_limits", lambda model: (6, 100))
    monkeypatch.setattr(build, "_record", record)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("one text\n")

    def call(*options: object, corpus: Path = corpus) -> Any:
        store = tmp_path / "store"
        return attncache("build", "model", "--corpus", corpus, "--store", store, *options)

    return call


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--layers", "last"], "numbers and ranges"),
        (["--layers", "4-9"], "must be in 0..5"),
        (["--layers", "1,5-3"], "must ascend"),
        (["--layers", "2-5", "--feature-layer", "3"], "feature_layer must be in 0..2"),
        (["--max-distance", "inf"], "a gate must be a finite number"),
        (["--layers", "5", "--max-distance", "inf"], "a gate must be a finite number"),
    ],
)
def test_build_refuses_options_that_make_no_plan_in_one_line(
    build_command: Build, options: list[str], rule: str
) -> None:
    assert rule in one_line_error(build_command(*options))


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("empty.txt", "\n\n", "at least one text"),
        ("texts.csv", "a,b", "must be a .jsonl or .txt file"),
        ("texts.jsonl", '{"text": "one"}\n{"txt": "two"}\n', "texts.jsonl:2 must be an object"),
        ("none.txt", None, "must be readable: No such file"),
    ],
)
def test_build_refuses_a_corpus_without_texts_in_one_line(
    build_command: Build, tmp_path: Path, name: str, content: str | None, rule: str
) -> None:
    corpus = tmp_path / name
    if content is not None:
        corpus.write_text(content)
    assert rule in one_line_error(build_command(corpus=corpus))


def test_build_passes_its_options_on(
    build_command: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []

    def build_store(options: build.BuildOptions, texts: list[Text]) -> Any:
        asked.append((options, texts))
        raise AttnCacheError("enough")

    monkeypatch.setattr(build, "build", build_store)
    corpus = tmp_path / "pairs.jsonl"
    corpus.write_text('{"text": "a", "text_pair": "b"}\n{"text": "c"}\n')
    given = {
        "--layers": "4-5",
        "--feature-layer": 1,
        "--max-entries": 7,
        "--max-bytes": 99,
        "--min-tokens": 2,
        "--max-tokens": 64,
        "--max-distance": 0.5,
        "--factory": "IVF16,Flat",
        "--seed": 3,
    }
    build_command(*(part for option in given.items() for part in option), corpus=corpus)
    build_command(corpus=corpus)
    (options, texts), (defaults, _) = asked
    store = tmp_path / "store"
    assert options == build.BuildOptions(
        "model", store, (4, 5), 1, 7, 99, 2, 64, 0.5, "IVF16,Flat", seed=3
    )
    assert defaults == build.BuildOptions("model", store)
    assert texts == [Text("a", "b"), Text("c")]


@pytest.mark.parametrize("calibrated", [False, True])
def test_build_says_whether_it_trained_or_kept_the_calibration(
    build_command: Build, monkeypatch: pytest.MonkeyPatch, calibrated: bool
) -> None:
    training = {"train_loss": 0.125, "heldout_loss": 0.25, "rank_correlation": 0.0}
    report = {
        "entries": 12,
        "recorded": 2,
        "bytes": 2**20,
        "layers": [1, 2],
        "num_layers": 6,
        "sequences_per_second": 1.5,
        "parity": {},
        "training": None if calibrated else training,
    }
    monkeypatch.setattr(build, "build", lambda *arguments: report)
    result = build_command()
    assert result.exit_code == 0
    assert ("kept as calibrated" in result.stdout) == calibrated
    assert ("0.12500" in result.stdout) == (not calibrated)
    assert ("hardly tells near maps from far ones" in result.stderr) == (not calibrated)


# -- calibrate and rearm -----------------------------------------------------------------------


@pytest.fixture
def calibrate_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """``attncache calibrate`` up to where an engine would start."""

    def start(options: calibrate.CalibrateOptions, texts: object) -> Any:
        raise AssertionError(f"an engine would start for {options}")

    monkeypatch.setattr(calibrate, "calibrate", start)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("one text\n")

    def call(*options: object) -> Any:
        store = tmp_path / "store"
        return attncache("calibrate", "model", "--store", store, "--corpus", corpus, *options)

    return call


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--budget", "rank=2"], "numbers from 0 to 1, got 'rank=2'"),
        (["--budget", "speed=1"], "names among rank, self-retrieval"),
        (["--sources", "prefix"], "sources must be among template, aligned, neighbour"),
        (["--sources", "template,"], "got ['']"),
    ],
)
def test_calibrate_refuses_a_mistake_before_an_engine_starts(
    calibrate_command: Build, options: list[str], rule: str
) -> None:
    assert rule in one_line_error(calibrate_command(*options))


def test_calibrate_passes_its_options_on(
    calibrate_command: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []

    def calibrate_store(options: calibrate.CalibrateOptions, texts: list[Text]) -> Any:
        asked.append((options, texts))
        raise AttnCacheError("enough")

    monkeypatch.setattr(calibrate, "calibrate", calibrate_store)
    given = {
        "--budget": "rank=0.9,self-retrieval=0.8",
        "--sources": "aligned",
        "--min-tokens": 2,
        "--max-tokens": 64,
        "--seed": 3,
    }
    calibrate_command(*(part for option in given.items() for part in option), "--dtype", "half")
    calibrate_command()
    (options, texts), (defaults, _) = asked
    store = tmp_path / "store"
    assert options == calibrate.CalibrateOptions(
        "model",
        store,
        Budget(0.9, 0.8),
        sources=("aligned",),
        min_tokens=2,
        max_tokens=64,
        seed=3,
        serve_options=("--dtype", "half"),
    )
    assert defaults == calibrate.CalibrateOptions("model", store, Budget())
    assert texts == [Text("one text")]


def test_calibrate_shows_what_each_source_keeps(
    calibrate_command: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = {"rank_fidelity": 1.0, "self_retrieval": 1.0}
    measured = {
        "rank_fidelity": 0.99123,
        "self_retrieval": 1.0,
        "ci95": {"rank_fidelity": [0.98, 0.995], "self_retrieval": [1.0, 1.0]},
        "groups_share": 1 / 3,
        "saving": 0.125,
    }
    served = {**exact, "hits": {"template": 9}}
    report = {
        "predicted": {"template": measured, "prefix": exact},
        "rehearsed": {"corpus": {**served, "rank_fidelity": 0.98765}, "edits": served},
    }
    monkeypatch.setattr(calibrate, "calibrate", lambda *arguments: report)
    result = calibrate_command()
    assert result.exit_code == 0 and result.stderr == ""
    names = "template|prefix|as served: corpus|as served: edits"
    shown = re.findall(rf"^\W*({names})[^\w-]+(.*)$", result.stdout, re.MULTILINE)
    rows = {source: re.split(r"[ │]{2,}", rest.strip(" │")) for source, rest in shown}
    assert rows == {
        "template": ["33.3%", "12.5%", "0.9912 (0.9800-0.9950)", "1.0000 (1.0000-1.0000)"],
        "prefix": ["-", "-", "1.0000", "1.0000"],
        "as served: corpus": ["-", "-", "0.9877", "1.0000"],
        "as served: edits": ["-", "-", "1.0000", "1.0000"],
    }
    assert json.loads(calibrate_command("--json").stdout) == report
    monkeypatch.setattr(calibrate, "calibrate", lambda *arguments: {key: {} for key in report})
    assert "nothing can be reused inside this budget" in calibrate_command().stderr


def test_rearm_tells_the_servers_of_a_store(store: Path) -> None:
    assert rearmed_at(store) == 0
    result = attncache("rearm", store)
    assert result.exit_code == 0
    first = rearmed_at(store)
    assert first > 0
    os.utime(store / "rearmed", ns=(0, 0))
    attncache("rearm", store)
    assert rearmed_at(store) >= first
    # Nothing of the store itself has changed.
    assert attncache("verify", store).exit_code == 0


def test_an_interrupted_command_exits_130(
    build_command: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "_record", interrupted)
    assert build_command().exit_code == 130


def test_a_bug_is_not_hidden_behind_a_friendly_line(build_command: Build) -> None:
    result = build_command()
    assert result.exit_code == 1
    assert isinstance(result.exception, AssertionError)
