# SPDX-License-Identifier: Apache-2.0
"""The commands without an engine: output, exit codes, and one line for a mistake."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_samples import NAMESPACE, make_features, make_record
from typer.testing import CliRunner

from attncache_vllm import cli, doctor
from attncache_vllm.calibrate import build, calibrate
from attncache_vllm.calibrate.budget import Budget
from attncache_vllm.calibrate.corpus import Text
from attncache_vllm.cli.build import parse_layers
from attncache_vllm.cli.common import ranges
from attncache_vllm.errors import AttnCacheError
from attncache_vllm.reuse.plan import Plan
from attncache_vllm.store import LocalStore
from attncache_vllm.store.rearm import rearmed_at

COMMANDS = ("build", "calibrate", "rearm", "inspect", "verify", "doctor", "evaluate")
ENTRIES = 5
LENGTHS = sorted(make_record(number).length for number in range(ENTRIES))
PLAN = Plan.reusing(NAMESPACE.num_layers, 3, (1, 3), 0.25, feature_layer=1).to_dict()
ARTIFACTS = {"templates": b"maps", "corrections": b"matrices"}
REPORT = {"train_loss": 0.125, "heldout_loss": 0.5, "curve": [[0.5, 0.25]]}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # The commands set it for the processes they start, and so for this one.
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")


def published(path: Path, plan: dict[str, Any] = PLAN) -> Path:
    with LocalStore.create(path, NAMESPACE, {"slots": 2}) as store:
        for number in range(ENTRIES):
            store.put(make_record(number))
        store.publish(plan, b"projector", REPORT, make_features(ENTRIES), artifacts=ARTIFACTS)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return published(tmp_path / "store")


def attncache(*arguments: object) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [str(part) for part in arguments])


def one_line_error(result: Any) -> str:
    """The message of a refused call: exit code 2, one line, nothing on stdout, no traceback."""
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return str(result.stderr)


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# -- help --------------------------------------------------------------------------------------


def test_help_lists_every_command() -> None:
    result = attncache("--help")
    assert result.exit_code == 0
    assert {
        command.name or command.callback.__name__ for command in cli.app.registered_commands
    } == {*COMMANDS}
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_an_example_of_it(command: str) -> None:
    result = attncache(command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert f"attncache {command} " in result.stdout.split("Example")[1]


# -- inspect -----------------------------------------------------------------------------------


def test_inspect_as_json_tells_all_of_a_store(store: Path) -> None:
    result = attncache("inspect", store, "--json")
    assert result.exit_code == 0
    segment_bytes = sum(path.stat().st_size for path in store.glob("maps-*"))
    assert json.loads(result.stdout) == {
        "namespace": {**NAMESPACE.to_dict(), "digest": NAMESPACE.digest()},
        "build": {"slots": 2},
        "entries": ENTRIES,
        "bytes": segment_bytes,
        "tokens": {"min": LENGTHS[0], "median": LENGTHS[2], "max": LENGTHS[-1]},
        "segments": [{"name": "maps-000000", "size": segment_bytes}],
        "findable": ENTRIES,
        "layers_reused": [1, 3],
        "feature_layer": 1,
        "sources": {"neighbour": {"layers": [1, 3], "kv_groups": 6, "gate": 0.25, "corrected": []}},
        "artifacts": {"corrections": 8, "templates": 4},
        "training": {"train_loss": 0.125, "heldout_loss": 0.5},
    }


def test_inspect_shows_the_same_as_a_table(store: Path) -> None:
    result = attncache("inspect", store)
    assert result.exit_code == 0
    rows = {
        cells[0]: cells[1]
        for line in result.stdout.splitlines()
        if len(cells := [cell.strip() for cell in line.strip("│ ").split("│")]) == 2
    }
    assert rows["entries"] == str(ENTRIES)
    assert rows["layers_reused"] == rows["sources.neighbour.layers"] == "1, 3"
    assert rows["artifacts.templates"] == "4"
    assert rows["training.train_loss"] == "0.125"
    assert rows["namespace.digest"] == NAMESPACE.digest()


def test_inspect_shows_a_store_that_is_still_empty(tmp_path: Path) -> None:
    LocalStore.create(tmp_path / "new", NAMESPACE, {}).close()
    result = attncache("inspect", tmp_path / "new", "--json")
    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    assert summary["entries"] == summary["bytes"] == summary["findable"] == 0
    assert summary["tokens"] == {"min": None, "median": None, "max": None}
    assert summary["training"] is None
    assert summary["sources"] == summary["artifacts"] == {}
    assert attncache("inspect", tmp_path / "new").exit_code == 0


def test_inspect_prints_a_plan_that_can_be_read_back(store: Path) -> None:
    result = attncache("inspect", store, "--plan")
    assert result.exit_code == 0
    assert Plan.from_dict(json.loads(result.stdout)).to_dict() == PLAN


def test_inspect_refuses_to_print_a_plan_that_is_not_there(tmp_path: Path) -> None:
    LocalStore.create(tmp_path / "new", NAMESPACE, {}).close()
    assert "must have a plan" in one_line_error(attncache("inspect", tmp_path / "new", "--plan"))


def test_inspect_refuses_a_plan_it_cannot_read(tmp_path: Path) -> None:
    result = attncache("inspect", published(tmp_path / "store", {"layers": "all"}))
    assert "plan" in one_line_error(result)


# -- verify ------------------------------------------------------------------------------------


def test_verify_passes_a_sound_store(store: Path) -> None:
    result = attncache("verify", store)
    assert (result.exit_code, result.stdout) == (0, f"{ENTRIES} entries read: sound\n")
    result = attncache("verify", store, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "entries": ENTRIES,
        "damaged": [],
        "problems": [],
        "unpublished": 0,
    }


def test_verify_names_a_damaged_entry_and_exits_1(store: Path) -> None:
    flip_last_byte(next(store.glob("maps-*")))
    result = attncache("verify", store)
    assert result.exit_code == 1
    assert f"entry {ENTRIES - 1}: the section at byte" in result.stdout
    assert result.stdout.endswith(f"{ENTRIES} entries read: damaged\n")
    result = attncache("verify", store, "--json")
    assert result.exit_code == 1
    [(entry_id, reason)] = json.loads(result.stdout)["damaged"]
    assert entry_id == ENTRIES - 1
    assert "checksum" in reason


@pytest.mark.parametrize(
    "kind", ["features", "projector", "sketches", "artifact-templates", "manifest"]
)
def test_verify_names_a_damaged_file_and_exits_1(store: Path, kind: str) -> None:
    flip_last_byte(next(store.glob(f"{kind}*")))
    result = attncache("verify", store, "--json")
    assert result.exit_code == 1
    [problem] = json.loads(result.stdout)["problems"]
    assert kind in problem
    assert "checksum" in problem
    result = attncache("verify", store)
    assert result.exit_code == 1
    assert problem in result.stdout


# -- doctor ------------------------------------------------------------------------------------


@pytest.fixture
def sound_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares importing vLLM, which the integration tests' doctor does."""
    monkeypatch.setattr(doctor, "_plugin", lambda: doctor.Check("plugin", "ok", "selectable"))


def findings(result: Any, what: str) -> list[tuple[str, str]]:
    checks = json.loads(result.stdout)
    assert all(check.keys() == {"what", "state", "finding"} for check in checks)
    return [(check["state"], check["finding"]) for check in checks if check["what"] == what]


@pytest.mark.usefixtures("sound_plugin")
def test_doctor_says_what_of_a_sound_store_would_not_be_reused(store: Path) -> None:
    result = attncache("doctor", "--store", store, "--json")
    assert result.exit_code == 0
    assert [state for state, _ in findings(result, "store")] == ["ok"]
    assert findings(result, "not reused: layers") == [("info", "all but [1, 3] are exact")]
    assert str(LENGTHS[-1]) in findings(result, "not reused: length")[0][1]
    assert "0.25" in findings(result, "plan: neighbour")[0][1]
    assert attncache("doctor", "--store", store).exit_code == 0


@pytest.mark.usefixtures("sound_plugin")
def test_doctor_exits_1_when_the_store_cannot_be_read(tmp_path: Path) -> None:
    result = attncache("doctor", "--store", tmp_path / "none", "--json")
    assert result.exit_code == 1
    [(state, finding)] = findings(result, "store")
    assert state == "problem"
    assert str(tmp_path / "none") in finding
    table = attncache("doctor", "--store", tmp_path / "none")
    assert table.exit_code == 1
    assert "!!" in table.stdout


@pytest.mark.usefixtures("sound_plugin")
def test_doctor_exits_1_when_no_layer_reuses_maps(tmp_path: Path) -> None:
    plan = Plan(0, NAMESPACE.num_layers, {}).to_dict()
    result = attncache("doctor", "--store", published(tmp_path / "store", plan), "--json")
    assert result.exit_code == 1
    assert findings(result, "plan")[0][0] == "problem"


def test_doctor_exits_1_when_vllm_would_not_find_the_plugin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor.metadata, "entry_points", lambda group: [])
    result = attncache("doctor", "--json")
    assert result.exit_code == 1
    assert findings(result, "plugin")[0][0] == "problem"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (None, None, [], False)),
        (["model"], (None, "model", [], False)),
        (["--store", "maps", "model"], (Path("maps"), "model", [], False)),
        (
            ["model", "--dtype", "half", "--store", "maps", "--no-enable-prefix-caching"],
            (Path("maps"), "model", ["--dtype", "half", "--no-enable-prefix-caching"], False),
        ),
        (["model", "-tp", "2", "--json", "-O3"], (None, "model", ["-tp", "2", "-O3"], False)),
        (
            ["model", "--pooler-config.seq_pooling_type=MEAN"],
            (None, "model", ["--pooler-config.seq_pooling_type=MEAN"], False),
        ),
        (["model", "--costs", "--store", "maps"], (Path("maps"), "model", [], True)),
    ],
)
def test_doctor_takes_options_it_does_not_know_as_those_of_vllm(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: Any
) -> None:
    asked: list[Any] = []

    def examine(*arguments: Any) -> list[doctor.Check]:
        asked.append(arguments)
        return []

    monkeypatch.setattr(doctor, "examine", examine)
    assert attncache("doctor", *arguments).exit_code == 0
    assert asked == [expected]


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        (["--dtype", "half", "model"], "--dtype"),
        (["--dtype=half", "model"], "--dtype=half"),
        (["--store", "maps", "-tp", "2", "model", "--json"], "-tp"),
    ],
)
def test_doctor_refuses_options_of_vllm_before_the_model(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], first: str
) -> None:
    # Which of the words that follow an unknown option is its value, nobody can tell.
    def examine(*arguments: Any) -> Any:
        raise AssertionError(f"examined {arguments}")

    monkeypatch.setattr(doctor, "examine", examine)
    message = one_line_error(attncache("doctor", *arguments))
    assert "the model must come before the options of `vllm serve`" in message
    assert f"got {first!r} first" in message


def test_doctor_shows_layers_of_one_finding_in_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {
        0: ("ok", "reusable (causal)"),
        1: ("info", "not reusable: ALiBi (causal)"),
        2: ("ok", "reusable (causal)"),
        3: ("ok", "reusable (causal)"),
        4: ("ok", "reusable (causal, window 8)"),
    }
    checks = [
        doctor.Check("engine", "ok", "can reuse maps"),
        *(doctor.Check(f"layer {index}", *found) for index, found in layers.items()),
    ]
    monkeypatch.setattr(doctor, "examine", lambda *arguments: checks)
    result = attncache("doctor", "model")
    assert [re.split("  +", line.strip()) for line in result.stdout.splitlines()] == [
        ["ok", "engine", "can reuse maps"],
        ["ok", "layers 0, 2-3", "reusable (causal)"],
        ["--", "layer 1", "not reusable: ALiBi (causal)"],
        ["ok", "layer 4", "reusable (causal, window 8)"],
    ]
    assert result.exit_code == 0
    # As JSON every layer stands for itself.
    shown = json.loads(attncache("doctor", "model", "--json").stdout)
    assert [check["what"] for check in shown] == ["engine", *(f"layer {i}" for i in range(5))]


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


# -- layers ------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 60), min_size=1))
def test_layers_are_read_back_from_how_they_are_shown(layers: set[int]) -> None:
    ascending = sorted(layers)
    assert parse_layers(ranges(ascending)) == tuple(ascending)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), min_size=1))
def test_layers_are_the_ascending_union_of_their_parts(parts: list[tuple[int, int]]) -> None:
    text = " , ".join(f"{first}-{first + more}" if more else str(first) for first, more in parts)
    union = {layer for first, more in parts for layer in range(first, first + more + 1)}
    assert parse_layers(text) == tuple(sorted(union))


@given(st.integers(1, 60), st.integers(0, 60), st.booleans())
def test_a_descending_range_of_layers_is_refused(first: int, last: int, alone: bool) -> None:
    last = min(last, first - 1)
    text = f"{first}-{last}" if alone else f"0,{first}-{last},3"
    with pytest.raises(AttnCacheError, match="must ascend"):
        parse_layers(text)


@pytest.mark.parametrize("text", ["", ",", "1,", "-1", "1-", "1--3", "1-3-5", "a", "1.5", "1 2"])
def test_layers_that_are_no_numbers_or_ranges_are_refused_with_the_text(text: str) -> None:
    with pytest.raises(AttnCacheError, match="numbers and ranges like") as caught:
        parse_layers(text)
    assert f"got {text!r}" in str(caught.value)


def test_logs_of_vllm_are_kept_off_the_output(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_LOGGING_STREAM")
    attncache("inspect", store)
    assert os.environ["VLLM_LOGGING_STREAM"] == "ext://sys.stderr"
