# SPDX-License-Identifier: Apache-2.0
"""The command line: help, inspect, verify, doctor."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from cli_samples import (
    ENTRIES,
    PLAN,
    attncache,
    one_line_error,
    published,
)
from hypothesis import given
from hypothesis import strategies as st
from store_samples import NAMESPACE, make_record

from attncache_vllm import cli, doctor
from attncache_vllm.cli.build import parse_layers
from attncache_vllm.cli.common import ranges
from attncache_vllm.errors import AttnCacheError
from attncache_vllm.reuse.plan import Plan
from attncache_vllm.store import LocalStore

COMMANDS = ("build", "calibrate", "rearm", "inspect", "verify", "doctor", "evaluate")

LENGTHS = sorted(make_record(number).length for number in range(ENTRIES))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # The commands set it for the processes they start, and so for this one.
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return published(tmp_path / "store")


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
