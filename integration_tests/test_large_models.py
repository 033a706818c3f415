# SPDX-License-Identifier: Apache-2.0
"""Real models of other families, with all layers reused: ``make test-large``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import assets, corpus
from integration_tests import probe
from integration_tests.compare import cosines
from integration_tests.conftest import PATIENT
from integration_tests.engine import IN_PROCESS, Counted, Engine

pytestmark = [pytest.mark.large, pytest.mark.timeout(1800)]
WINDOW = 512  # of Gemma 3; the longest texts must be longer
MAX_TOKENS = 700
RECORDED = 8


@dataclass(frozen=True)
class Answers:
    """Embeddings ``[B, D]`` of the recorded texts, then of as many others; with counters."""

    stock: NDArray[np.float32]
    reuse: NDArray[np.float32]
    counted: dict[str, int]
    layers: dict[str, int]
    parity: dict[int, float]


@pytest.fixture(scope="module", params=["qwen25-coder", "gemma3-270m"])
def answers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Answers]:
    model, folder = assets.ensure(request.param), tmp_path_factory.mktemp(request.param)
    articles = corpus.news(2 * RECORDED, min_chars=5000, seed=3)
    lengths = [40 * 2**i for i in range(4)] + [600, 700]  # words
    texts = [" ".join(text.split()[: lengths[i % len(lengths)]]) for i, text in enumerate(articles)]
    options: dict[str, Any] = {
        "model": str(model),
        "runner": "pooling",
        "pooler_config": {"seq_pooling_type": "MEAN"},
        "max_model_len": 2048,
        "kv_cache_memory_bytes": 2**30,
        "enforce_eager": True,
        "worker_extension_cls": probe.PATH,
    }
    with Engine(folder / "engine.log", IN_PROCESS, **options) as host:
        prompts = host.tokenize(texts, MAX_TOKENS)
        assert max(map(len, prompts[:RECORDED])) > WINDOW
        stock = host.embed_alone(prompts)
        layers = tuple(range(host.probe("probe_num_layers")))
        store = folder / "store"
        report = host.build(
            texts[:RECORDED],
            model=str(model),
            store=store,
            layers=layers,
            max_tokens=MAX_TOKENS,
        )
        settings = {"store": str(store), **PATIENT}
        selected = {"attention_backend": "attncache", "additional_config": {"attncache": settings}}
        host.replace(**options, **selected)
        counters = Counted(host)
        reuse = host.embed_alone(prompts)
        yield Answers(stock, reuse, counters.since(), host.probe("probe_layers"), report["parity"])


def test_every_layer_is_reused_and_reproduces_its_own_answer(answers: Answers) -> None:
    assert answers.layers == {"reused": len(answers.parity)}
    assert max(answers.parity.values()) <= 0.02


def test_recorded_texts_hit_and_keep_their_embedding(answers: Answers) -> None:
    assert answers.counted["attncache_sequences_total{hit}"] == RECORDED
    reuse, stock = answers.reuse[:RECORDED], answers.stock[:RECORDED]
    assert cosines(reuse, stock).min() >= 0.999
    assert not np.array_equal(reuse, stock)


def test_other_texts_miss_and_are_bit_equal_to_stock(answers: Answers) -> None:
    assert answers.counted["attncache_sequences_total{miss}"] == RECORDED
    assert np.array_equal(answers.reuse[RECORDED:], answers.stock[RECORDED:])
