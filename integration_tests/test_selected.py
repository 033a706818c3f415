# SPDX-License-Identifier: Apache-2.0
"""``LLM(attention_backend="attncache")`` with a store of every layer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from integration_tests.compare import cosines
from integration_tests.conftest import NUM_LAYERS, PATIENT, Stock, Texts
from integration_tests.engine import Counted, Engine, Prompt


@pytest.fixture(scope="module")
def engine(
    store: Path,
    embedder: dict[str, Any],
    stock: Stock,  # first, because it ends before this engine starts
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Engine]:
    settings = {"store": str(store), **PATIENT}
    with Engine(
        tmp_path_factory.mktemp("selected") / "engine.log",
        attention_backend="AttnCache",
        additional_config={"attncache": settings},
        **embedder,
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(engine: Engine, texts: Texts) -> dict[Prompt, NDArray[np.float32]]:
    """The engine's answer to each prompt when it is the only one."""
    return dict(zip(texts.everything, engine.embed_alone(texts.everything), strict=True))


def test_every_layer_of_the_model_has_reuse(engine: Engine) -> None:
    assert engine.probe("probe_counters")["attncache_layers{reused}"] == NUM_LAYERS


def test_recorded_text_hits_and_keeps_its_embedding_with_all_layers_reused(
    engine: Engine, stock: Stock, texts: Texts
) -> None:
    counted = Counted(engine)
    embeddings = engine.embed_alone(texts.recorded)
    assert counted.since()["attncache_sequences_total{hit}"] == len(texts.recorded)
    assert cosines(embeddings, stock.of(texts.recorded)).min() >= 0.999


def test_hit_is_not_computed_exactly(engine: Engine, stock: Stock, texts: Texts) -> None:
    # Guards the test above against an engine that counts hits and computes them all the same.
    embeddings = engine.embed_alone(texts.recorded)
    assert not np.array_equal(embeddings, stock.of(texts.recorded))


def test_unrelated_text_misses_and_is_bit_equal_to_stock(
    engine: Engine, stock: Stock, texts: Texts
) -> None:
    counted = Counted(engine)
    prompts: tuple[Prompt, ...] = (*texts.unrelated, *texts.lengths)
    embeddings = engine.embed_alone(prompts)
    assert counted.since()["attncache_misses_total{nothing close enough}"] == len(prompts)
    assert np.array_equal(embeddings, stock.of(prompts))


def test_short_sequence_is_bypassed_and_bit_equal_to_stock(
    engine: Engine, stock: Stock, texts: Texts
) -> None:
    counted = Counted(engine)
    embeddings = engine.embed_alone(texts.short)
    assert counted.since()["attncache_bypasses_total{shorter than min_tokens}"] == len(texts.short)
    assert np.array_equal(embeddings, stock.of(texts.short))


@pytest.mark.parametrize("seed", range(4))
def test_mixed_batch_gives_each_sequence_its_answer_alone(
    engine: Engine, alone: dict[Prompt, NDArray[np.float32]], texts: Texts, seed: int
) -> None:
    prompts = list(texts.everything)
    random.Random(seed).shuffle(prompts)
    counted = Counted(engine)
    together = engine.embed(prompts)
    counts = counted.since()
    assert counts["attncache_sequences_total{hit}"] == len(texts.recorded)
    assert counts["attncache_sequences_total{miss}"] == len(texts.unrelated) + len(texts.lengths)
    assert counts["attncache_sequences_total{bypass}"] == len(texts.short)
    # One lookup per step: the sequences really shared steps.
    assert counts["attncache_lookup_seconds_count{}"] <= len(prompts) / 4
    # Not bit-equal: a matrix product rounds differently when it has other rows beside it. A
    # sequence that had got another one's rows, map or metadata would be far below this.
    expected = np.stack([alone[prompt] for prompt in prompts])
    assert cosines(together, expected).min() >= 0.9999


@pytest.mark.parametrize("kind", ["recorded", "unrelated", "short"])
def test_batch_of_one_kind_gives_each_sequence_its_answer_alone(
    engine: Engine, alone: dict[Prompt, NDArray[np.float32]], texts: Texts, kind: str
) -> None:
    prompts = getattr(texts, kind)
    expected = np.stack([alone[prompt] for prompt in prompts])
    assert cosines(engine.embed(prompts), expected).min() >= 0.9999


def test_start_is_announced_in_one_line(engine: Engine, texts: Texts) -> None:
    lines = [line for line in engine.log.splitlines() if "attncache: active" in line]
    assert len(lines) == 1
    for part in ("namespace ", f"{len(texts.recorded)} entries", "30 of 30 layers", "MiB"):
        assert part in lines[0]
