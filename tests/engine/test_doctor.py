# SPDX-License-Identifier: Apache-2.0
"""What the doctor says of a model's layers."""

from __future__ import annotations

from typing import Any

import pytest
from attention_samples import Shape, make_config, make_model, make_module
from torch import nn

from attncache_vllm import doctor
from attncache_vllm.doctor import Check
from attncache_vllm.engine import compat


def layer_checks(model: nn.Module, monkeypatch: pytest.MonkeyPatch, layers: int) -> list[Check]:
    config = make_config()
    config.model_config.hf_text_config.num_hidden_layers = layers
    monkeypatch.setattr(
        compat, "build_without_weights", lambda given: {id(config): model}[id(given)]
    )
    return list(doctor._layers(config))


def test_every_layer_is_told_with_its_mask_and_what_stands_in_its_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(4)
    layers = model.model.layers
    layers[1].self_attn = make_module(shape=Shape(window=8))
    layers[1].self_attn.gate = nn.Identity()
    layers[2].self_attn.attn.has_sink = True
    layers[3].self_attn = nn.Identity()
    unknown = "unknown part of the attention module: gate"
    missing = "no attention layer with queries and keys of its own was found"
    assert layer_checks(model, monkeypatch, 4) == [
        Check("layer 0", "ok", "reusable (causal)"),
        Check(
            "layer 1",
            "info",
            f"partly reusable, q, k and v are computed: {unknown} (causal, window 8)",
        ),
        Check("layer 2", "info", "not reusable: attention sinks (causal)"),
        Check("layer 3", "info", f"not reusable: {missing} (no attention)"),
    ]


def test_a_model_of_which_no_layer_can_reuse_maps_is_a_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(2)
    for layer in model.model.layers:
        layer.self_attn.attn.has_sink = True
    checks = layer_checks(model, monkeypatch, 2)
    assert checks[-1] == Check("layers", "problem", "no layer of this model can reuse maps")
    assert len(checks) == 3


def test_a_model_that_cannot_be_built_without_weights_is_a_finding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(config: Any) -> Any:
        raise NotImplementedError("Cannot copy out of meta tensor\n")

    monkeypatch.setattr(compat, "build_without_weights", fail)
    [check] = doctor._layers(make_config())
    assert (check.what, check.state) == ("layers", "problem")
    assert check.finding == "the model cannot be looked into: Cannot copy out of meta tensor"
