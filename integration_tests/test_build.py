# SPDX-License-Identifier: Apache-2.0
"""``attncache build`` and the commands that look at its store."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from integration_tests.conftest import NUM_LAYERS, ResumedBuild, Texts
from integration_tests.processes import Exit

Command = Callable[..., Exit]


def test_every_layer_reproduces_its_own_answer_from_its_own_map(
    resumed_build: ResumedBuild,
) -> None:
    parity = {int(layer): error for layer, error in resumed_build.report["parity"].items()}
    assert sorted(parity) == list(range(NUM_LAYERS))
    # Relative error of the module's output: bf16 has 8 bits, 2**-8 is 0.4 %.
    assert max(parity.values()) <= 0.01


def test_killed_build_goes_on_where_it_stopped(resumed_build: ResumedBuild, texts: Texts) -> None:
    assert 0 < resumed_build.committed < len(texts.recorded)
    report = resumed_build.report
    assert report["skipped"] == resumed_build.committed
    assert report["recorded"] == len(texts.recorded) - resumed_build.committed
    assert report["entries"] == len(texts.recorded)


def test_building_again_records_nothing(
    resumed_build: ResumedBuild, texts: Texts, attncache: Command
) -> None:
    ended = attncache(*resumed_build.arguments)
    assert ended.code == 0, ended.log
    report = json.loads(ended.stdout)
    assert (report["recorded"], report["skipped"]) == (0, len(texts.recorded))
    assert (report["entries"], report["bytes"]) == (
        resumed_build.report["entries"],
        resumed_build.report["bytes"],
    )


def test_verify_passes_a_sound_store(store: Path, texts: Texts, attncache: Command) -> None:
    ended = attncache("verify", store, "--json")
    assert ended.code == 0, ended.stdout
    assert json.loads(ended.stdout) == {
        "entries": len(texts.recorded),
        "damaged": [],
        "problems": [],
        "unpublished": 0,
    }


def test_verify_exits_1_and_names_the_entry_of_a_flipped_bit(
    store: Path, tmp_path: Path, attncache: Command
) -> None:
    copy = shutil.copytree(store, tmp_path / "copy")
    with (copy / "maps-000000").open("r+b") as segment:
        segment.seek(500_000)
        byte = segment.read(1)[0]
        segment.seek(500_000)
        segment.write(bytes([byte ^ 1]))
    ended = attncache("verify", copy, "--json")
    assert ended.code == 1
    assert [entry for entry, _ in json.loads(ended.stdout)["damaged"]] == [0]


def test_inspect_shows_entries_plan_and_namespace(
    store: Path, texts: Texts, attncache: Command
) -> None:
    ended = attncache("inspect", store, "--json")
    assert ended.code == 0, ended.log
    shown = json.loads(ended.stdout)
    assert shown["entries"] == shown["findable"] == len(texts.recorded)
    assert shown["layers_reused"] == list(range(NUM_LAYERS))
    assert shown["namespace"]["architecture"] == "LlamaForCausalLM"
    assert shown["bytes"] <= sum(segment["size"] for segment in shown["segments"])


def test_doctor_approves_of_a_sound_store(store: Path, attncache: Command) -> None:
    ended = attncache("doctor", "--store", store, "--json")
    assert ended.code == 0, ended.stdout
    states = {check["what"]: check["state"] for check in json.loads(ended.stdout)}
    assert states["plugin"] == states["store"] == states["vLLM version"] == "ok"


def test_doctor_says_for_each_layer_of_a_model_what_a_hit_skips(
    store: Path, model: Path, attncache: Command
) -> None:
    pooling = ("--pooler-config", '{"seq_pooling_type": "MEAN"}')
    ended = attncache("doctor", model, "--store", store, "--json", *pooling)
    assert ended.code == 0, ended.log
    findings = {check["what"]: check["finding"] for check in json.loads(ended.stdout)}
    layers = {what: finding for what, finding in findings.items() if what.startswith("layer ")}
    assert layers == {f"layer {i}": "reusable (causal)" for i in range(NUM_LAYERS)}


def test_doctor_says_why_every_request_of_a_model_would_be_bypassed(
    store: Path, model: Path, attncache: Command
) -> None:
    # The model's own pooling takes the last token, for which vLLM caches prefixes.
    ended = attncache("doctor", model, "--store", store, "--json")
    assert ended.code == 1, ended.log
    findings = {check["what"]: check["finding"] for check in json.loads(ended.stdout)}
    assert "prefix caching" in findings["engine"]
    assert "partly reusable" in findings["layer 0"]


def test_doctor_exits_1_without_the_store(tmp_path: Path, attncache: Command) -> None:
    ended = attncache("doctor", "--store", tmp_path / "none", "--json")
    assert ended.code == 1
    assert {"what": "store", "state": "problem"}.items() <= json.loads(ended.stdout)[-1].items()


MISTAKES = {
    "missing corpus": ("build {model} --corpus {tmp}/none.jsonl --store {tmp}/s", "none.jsonl"),
    "other corpus format": ("build {model} --corpus {tmp}/x.csv --store {tmp}/s", "x.csv"),
    "malformed layers": ("build {model} --corpus {corpus} --store {tmp}/s --layers 9-3", "9-3"),
    "unknown layer": ("build {model} --corpus {corpus} --store {tmp}/s --layers 29-30", "[30]"),
    "missing model": ("build {tmp}/none --corpus {corpus} --store {tmp}/s", "none"),
    "no store to inspect": ("inspect {tmp}/none", "none"),
    "no store to verify": ("verify {tmp}/none", "none"),
}


@pytest.mark.parametrize(("arguments", "said"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_of_the_user_is_one_message_and_exit_code_2(
    arguments: str, said: str, model: Path, corpus_file: Path, tmp_path: Path, attncache: Command
) -> None:
    (tmp_path / "x.csv").touch()
    words = arguments.format(model=model, corpus=corpus_file, tmp=tmp_path).split()
    ended = attncache(*words)
    assert ended.code == 2, ended.log
    assert "error:" in ended.log and said in ended.log
    assert "Traceback" not in ended.log + ended.stdout
    assert not (tmp_path / "s").exists()


def test_doctor_measures_from_which_length_on_reuse_pays(
    store: Path, model: Path, attncache: Command
) -> None:
    pooling = ("--pooler-config", '{"seq_pooling_type": "MEAN"}', "--max-model-len", "128")
    eager = ("--enforce-eager", "--costs", "--json")
    ended = attncache("doctor", model, "--store", store, *eager, *pooling)
    assert ended.code == 0, ended.log
    findings = {check["what"]: check["finding"] for check in json.loads(ended.stdout)}
    # Whether it pays is the machine's business; that it was measured up to 128 tokens is not.
    assert re.search(r"pays.*; saves .* ms at 16, .* ms at 128$", findings["costs: neighbour"])
    assert re.match(r"\d+\.\d\d ms for one text", findings["lookup"])
