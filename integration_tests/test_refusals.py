# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` refuses what cannot work: it exits with a message instead of serving without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from integration_tests.processes import Exit, run, script

Serve = Callable[..., Exit]


@pytest.fixture
def serve_in_vain(tmp_path: Path) -> Serve:
    """``vllm serve`` with the backend and settings, until it exits."""

    def serve(model: Path, additional_config: dict[str, Any] | None) -> Exit:
        command = [script("vllm"), "serve", str(model), "--attention-backend", "attncache"]
        command += ["--runner", "pooling", "--convert", "embed", "--enforce-eager"]
        command += ["--pooler-config", '{"seq_pooling_type": "MEAN"}', "--max-model-len", "256"]
        if additional_config is not None:
            command += ["--additional-config", json.dumps(additional_config)]
        ended = run(command, tmp_path)
        assert ended.code not in (0, None)
        return ended

    return serve


def llama(folder: Path, tokenizer_of: Path, **changes: int) -> Path:
    """A model of the architecture of ``tokenizer_of`` with random weights, and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(tokenizer_of, **changes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return folder


def refused_before_an_engine_starts(ended: Exit, *parts: str) -> None:
    output = ended.stdout + ended.log
    for part in parts:
        assert part in output, output[-3000:]
    assert "EngineCore" not in output


def test_missing_settings_are_refused(model: Path, serve_in_vain: Serve) -> None:
    ended = serve_in_vain(model, None)
    refused_before_an_engine_starts(ended, "needs its settings", "attncache build")


def test_unknown_setting_is_refused(model: Path, store: Path, serve_in_vain: Serve) -> None:
    settings = {"store": str(store), "max_distanse": 0.1}
    ended = serve_in_vain(model, {"attncache": settings})
    refused_before_an_engine_starts(ended, "unknown setting 'max_distanse'", "max_distance")


def test_missing_store_is_refused(model: Path, tmp_path: Path, serve_in_vain: Serve) -> None:
    ended = serve_in_vain(model, {"attncache": {"store": str(tmp_path / "none")}})
    refused_before_an_engine_starts(ended, str(tmp_path / "none"), "attncache build")


def test_store_of_a_model_of_other_shapes_is_refused(
    model: Path, store: Path, tmp_path: Path, serve_in_vain: Serve
) -> None:
    other = llama(tmp_path / "other", model, num_hidden_layers=2)
    ended = serve_in_vain(other, {"attncache": {"store": str(store)}})
    refused_before_an_engine_starts(
        ended, "another namespace", "num_layers: store has 30, server has 2"
    )


def test_store_of_a_model_of_other_weights_is_refused(
    model: Path, store: Path, tmp_path: Path, serve_in_vain: Serve
) -> None:
    # Only the worker knows the weights.
    other = llama(tmp_path / "other", model)
    ended = serve_in_vain(other, {"attncache": {"store": str(store)}})
    output = ended.stdout + ended.log
    assert "another namespace" in output and "weights: store has" in output
    assert "num_layers" not in output.split("another namespace")[1].splitlines()[0]
