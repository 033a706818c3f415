# SPDX-License-Identifier: Apache-2.0
"""Installed but not selected: vLLM is as it would be without the plugin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from integration_tests.conftest import NUM_LAYERS, Stock, Texts, stock_engine


@pytest.fixture(scope="module")
def without_plugin(
    embedder: dict[str, Any], texts: Texts, tmp_path_factory: pytest.TempPathFactory
) -> Stock:
    """vLLM that is told to load no plugins at all."""
    log = tmp_path_factory.mktemp("without-plugin") / "engine.log"
    return stock_engine(log, {"VLLM_PLUGINS": ""}, embedder, texts)


def test_attention_is_vllms_own(stock: Stock) -> None:
    assert len(stock.attention) == NUM_LAYERS
    for layer in stock.attention:
        assert layer["backend"] == "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"
        assert all(path.startswith("vllm.") for path in (*layer["classes"], layer["builder"]))
        assert not layer["forward_replaced"]
        assert layer["attributes"] == []


def test_plugin_is_loaded_but_not_its_engine_parts(stock: Stock) -> None:
    assert "attncache_vllm.plugin" in stock.plugin_modules
    hooks = {f"attncache_vllm.engine.{name}" for name in ("startup", "ops", "layer", "runtime")}
    assert hooks.isdisjoint(stock.plugin_modules)


def test_answers_and_layers_are_those_of_vllm_without_the_plugin(
    stock: Stock, without_plugin: Stock, texts: Texts
) -> None:
    assert without_plugin.plugin_modules == []
    assert stock.attention == without_plugin.attention
    assert np.array_equal(stock.of(texts.everything), without_plugin.of(texts.everything))
