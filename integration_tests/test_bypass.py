# SPDX-License-Identifier: Apache-2.0
"""Engines that cannot reuse maps yet: selected, they run as stock and say why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from integration_tests import probe
from integration_tests.conftest import Texts
from integration_tests.engine import Engine, Prompt

NEW_TOKENS = 12


def selected(store: Path) -> dict[str, Any]:
    return {
        "attention_backend": "ATTNCACHE",
        "additional_config": {"attncache": {"store": str(store)}},
    }


def bypassed(engine: Engine, reason: str) -> int:
    """Sequences counted as bypassed for a reason that begins with ``reason``."""
    counters: dict[str, float] = engine.probe("probe_counters")
    assert "attncache_sequences_total{hit}" not in counters
    assert "attncache_sequences_total{miss}" not in counters
    prefix = f"attncache_bypasses_total{{{reason}"
    return int(sum(value for name, value in counters.items() if name.startswith(prefix)))


def warnings(engine: Engine) -> list[str]:
    return [line for line in engine.log.splitlines() if "layers bypassed" in line]


def test_generation_is_that_of_stock_and_counted_as_bypass(
    model: Path, store: Path, texts: Texts, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "model": str(model),
        "max_model_len": 256,
        "enforce_eager": True,
        "worker_extension_cls": probe.PATH,
    }
    # One prompt at a time: what shares a step with what is up to the clock.
    prompts: tuple[Prompt, ...] = (*texts.recorded[:3], *texts.unrelated[:2], texts.short[0])
    with Engine(tmp_path / "stock.log", **options) as engine:
        expected = [engine.generate([prompt], NEW_TOKENS) for prompt in prompts]
    with Engine(tmp_path / "selected.log", **options, **selected(store)) as engine:
        assert [engine.generate([prompt], NEW_TOKENS) for prompt in prompts] == expected
        assert bypassed(engine, "generation runner") == len(prompts)
        assert len(warnings(engine)) == 1


def test_last_token_pooling_in_chunks_with_cached_prefixes_is_that_of_stock(
    embedder: dict[str, Any], store: Path, texts: Texts, tmp_path: Path
) -> None:
    options = {
        **embedder,
        "pooler_config": {"seq_pooling_type": "LAST"},
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 4,
    }
    longest = texts.lengths[-1]
    edited = (*longest[:300], *texts.lengths[-2])[:400]  # shares whole blocks with the longest
    prompts: tuple[Prompt, ...] = (*texts.recorded[:4], *texts.unrelated[:4], longest, edited)
    with Engine(tmp_path / "stock.log", **options) as engine:
        expected = engine.embed_alone(prompts)
    with Engine(tmp_path / "selected.log", **options, **selected(store)) as engine:
        assert np.array_equal(engine.embed_alone(prompts), expected)
        # The edited one begins with a cached prefix and is not told from a later chunk.
        assert bypassed(engine, "prefix caching") == len(prompts) - 1
        assert len(warnings(engine)) == 1
