# SPDX-License-Identifier: Apache-2.0
"""Engines that are bypassed as a whole: selected, they run as stock and say why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from integration_tests import models, probe
from integration_tests.conftest import PATIENT, Texts
from integration_tests.engine import IN_PROCESS, Counted, Engine, Prompt

NEW_TOKENS = 12
NUM_LAYERS = 4


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small causal model: what is asked here does not depend on the weights."""
    return models.make("llama", tmp_path_factory.mktemp("bypass") / "llama")


@pytest.fixture(scope="module")
def options(small: Path) -> dict[str, Any]:
    return {
        "model": str(small),
        "max_model_len": 512,
        "kv_cache_memory_bytes": 2**28,
        "enforce_eager": True,
        "worker_extension_cls": probe.PATH,
    }


@pytest.fixture(scope="module")
def selected(small: Path) -> dict[str, Any]:
    settings = {"store": str(small.with_name("store")), **PATIENT}
    return {"attention_backend": "ATTNCACHE", "additional_config": {"attncache": settings}}


@pytest.fixture(scope="module")
def host(small: Path, options: dict[str, Any], texts: Texts) -> Iterator[Engine]:
    """A process in which engines come and go; the store holds the recorded texts."""
    with Engine(small.with_name("engine.log"), IN_PROCESS, **options) as host:
        layers = tuple(range(NUM_LAYERS))
        store = small.with_name("store")
        host.build(texts.recorded, model=str(small), store=store, layers=layers)
        yield host


def bypassed(counts: dict[str, int], reason: str) -> int:
    """Sequences counted as bypassed for a reason that begins with ``reason``, and no others."""
    prefix = f"attncache_bypasses_total{{{reason}"
    count = sum(value for name, value in counts.items() if name.startswith(prefix))
    assert count == sum(v for name, v in counts.items() if "sequences_total" in name)
    return count


def test_generation_is_that_of_stock_and_counted_as_bypass(
    host: Engine, options: dict[str, Any], selected: dict[str, Any], texts: Texts
) -> None:
    # One prompt at a time: what shares a step with what is up to the clock.
    prompts: tuple[Prompt, ...] = (*texts.recorded[:3], *texts.unrelated[:2], texts.short[0])
    host.replace(**options)
    expected = [host.generate([prompt], NEW_TOKENS) for prompt in prompts]
    host.replace(**options, **selected)
    warned = host.log.count(f"{NUM_LAYERS} layers bypassed: generation runner")
    counters = Counted(host)
    assert [host.generate([prompt], NEW_TOKENS) for prompt in prompts] == expected
    assert bypassed(counters.since(), "generation runner") == len(prompts)
    assert warned == 1


def test_last_token_pooling_in_chunks_with_cached_prefixes_is_that_of_stock(
    host: Engine, options: dict[str, Any], selected: dict[str, Any], texts: Texts
) -> None:
    pooling = {
        **options,
        "runner": "pooling",
        "convert": "embed",
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "block_size": 32,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 4,
    }
    longest = texts.lengths[-1]
    edited = (*longest[:300], *texts.lengths[-2])[:400]  # shares whole blocks with the longest
    prompts: tuple[Prompt, ...] = (*texts.recorded[:4], *texts.unrelated[:4], longest, edited)
    host.replace(**pooling)
    expected = host.embed_alone(prompts)
    host.replace(**pooling, **selected)
    warned = host.log.count(f"{NUM_LAYERS} layers bypassed: prefix caching")
    counters = Counted(host)
    assert np.array_equal(host.embed_alone(prompts), expected)
    # Each once, however many chunks it had and whether it began with a cached prefix.
    assert bypassed(counters.since(), "prefix caching") == len(prompts)
    assert warned == 1
