# SPDX-License-Identifier: Apache-2.0
"""A compiled engine with CUDA graphs: what was captured must not decide what is computed.

Skipped where there is no GPU. Steps of up to 512 tokens replay graphs, longer ones do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from integration_tests.compare import cosines
from integration_tests.conftest import NUM_LAYERS, PATIENT, Stock, Texts, stock_engine
from integration_tests.engine import Counted, Engine, Prompt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(scope="module")
def compiled(embedder: dict[str, Any]) -> dict[str, Any]:
    return {**embedder, "enforce_eager": False}


@pytest.fixture(scope="module")
def stock(
    compiled: dict[str, Any], texts: Texts, tmp_path_factory: pytest.TempPathFactory
) -> Stock:
    return stock_engine(tmp_path_factory.mktemp("stock") / "engine.log", {}, compiled, texts)


@pytest.fixture(scope="module")
def engine(
    store: Path,
    compiled: dict[str, Any],
    stock: Stock,  # first, because it ends before this engine starts
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Engine]:
    with Engine(
        tmp_path_factory.mktemp("cuda") / "engine.log",
        attention_backend="AttnCache",
        additional_config={"attncache": {"store": str(store), **PATIENT}},
        **compiled,
    ) as engine:
        yield engine


def answers(
    engine: Engine, prompts: Sequence[Prompt], hits: int, together: bool = False
) -> NDArray[np.float32]:
    """Embeddings of prompts of which ``hits`` are served from maps."""
    counted = Counted(engine)
    embeddings = engine.embed(prompts) if together else engine.embed_alone(prompts)
    assert counted.since().get("attncache_sequences_total{hit}", 0) == hits
    return embeddings


def test_every_layer_has_reuse_beside_captured_graphs(engine: Engine) -> None:
    assert engine.probe("probe_counters")["attncache_layers{reused}"] == NUM_LAYERS
    assert "Graph capturing finished" in engine.log


def test_recorded_texts_hit_and_keep_their_embeddings(
    engine: Engine, stock: Stock, texts: Texts
) -> None:
    embeddings = answers(engine, texts.recorded, len(texts.recorded))
    exact = stock.of(texts.recorded)
    assert cosines(embeddings, exact).min() >= 0.999
    assert not np.array_equal(embeddings, exact)


def test_other_texts_keep_their_embeddings(engine: Engine, stock: Stock, texts: Texts) -> None:
    prompts: tuple[Prompt, ...] = (*texts.unrelated, *texts.short, *texts.lengths)
    # Not bit-equal: the layers of the two engines are compiled in other pieces.
    assert cosines(answers(engine, prompts, 0), stock.of(prompts)).min() >= 0.999


def test_an_answer_does_not_depend_on_what_was_asked_before(engine: Engine, texts: Texts) -> None:
    first = answers(engine, texts.recorded[:4], 4)
    answers(engine, (*texts.unrelated, *texts.lengths), 0)
    # Not bit-equal: a pooler on a GPU adds up in no fixed order.
    np.testing.assert_allclose(answers(engine, texts.recorded[:4], 4), first, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [2, 5, 1000], ids=["in a graph", "at its edge", "in no graph"])
def test_a_mixed_batch_gives_each_text_its_own_answer(
    engine: Engine, stock: Stock, texts: Texts, size: int
) -> None:
    pairs = zip(texts.recorded, texts.unrelated, strict=False)
    prompts = [text for pair in pairs for text in pair][:size]
    hits = sum(prompt in texts.recorded for prompt in prompts)
    together = answers(engine, prompts, hits, together=True)
    assert cosines(together, stock.of(prompts)).min() >= 0.999
