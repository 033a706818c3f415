# SPDX-License-Identifier: Apache-2.0
"""Classification, scoring, reranking and token embeddings by real models over vLLM's HTTP routes.

The classifier and the cross-encoder are linear heads fitted to real labels on the spot. Stock
engines, which have ended when a server starts, give the answers to compare with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks import assets, classifiers, corpus
from benchmarks.server import MODEL_NAME, Server, serve
from integration_tests import probe
from integration_tests.compare import cosines
from integration_tests.conftest import PATIENT
from integration_tests.engine import IN_PROCESS, Counted, Engine
from integration_tests.processes import shown_on_failure

RECORDED = 12
# Probabilities of own maps; rounding of the maps to bf16 moved them by at most 0.006.
LIKE_STOCK = 0.02
Pair = tuple[str, str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def host(folder: Path) -> Iterator[Engine]:
    """A process in which engines come and go, so that each starts in seconds."""
    with Engine(folder / "engine.log", IN_PROCESS, **stock(assets.ensure("minilm"))) as host:
        yield host


def stock(model: Path, **options: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "runner": "pooling",
        "max_model_len": 256,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": 2**28,
        "worker_extension_cls": probe.PATH,
        **options,
    }


def selected(store: Path) -> dict[str, Any]:
    settings = {"store": str(store), **PATIENT, "min_tokens": 1}
    return {"attention_backend": "attncache", "additional_config": {"attncache": settings}}


@contextmanager
def server_of(model: Path, store: Path, log: Path, *task: str) -> Iterator[Server]:
    options = [
        *("--attention-backend", "attncache", "--enforce-eager", "--max-model-len", "256"),
        *("--additional-config", json.dumps(selected(store)["additional_config"])),
        *("--no-enable-prefix-caching", "--max-num-batched-tokens", "2048"),
    ]
    with serve(model, options, log, task=task) as server, shown_on_failure(log):
        yield server


def post(server: Server, route: str, **body: Any) -> Any:
    answer = httpx.post(f"{server.url}{route}", json={"model": MODEL_NAME, **body}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


@contextmanager
def counting(server: Server, **expected: int) -> Iterator[None]:
    """The server counts just these outcomes while the block runs."""
    before = server.counters("attncache_sequences", "outcome")
    yield
    after = server.counters("attncache_sequences", "outcome")
    counted = {name: int(after[name] - before.get(name, 0)) for name in after}
    assert {name: n for name, n in counted.items() if n} == expected


# -- a classifier ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classifier:
    """A server; the reviews in its store and others, with stock's probabilities ``[B, 2]``."""

    server: Server
    recorded: list[str]
    unrelated: list[str]
    stock: Any


@pytest.fixture(scope="module")
def classifier(folder: Path, host: Engine) -> Iterator[Classifier]:
    model, store = folder / "classifier", folder / "classifier-store"
    report = classifiers.review_classifier(model, train=200, held_out=100)
    assert report["accuracy"] > report["majority"]
    texts = [review.text for review in classifiers.reviews(800)[300:]]
    long = [text for text in texts if len(text.split()) >= 20]
    recorded, unrelated = long[:RECORDED], long[RECORDED : 2 * RECORDED]
    host.build(recorded, model=str(model), store=store, max_tokens=128)
    host.replace(**stock(model))
    probabilities = np.array(host.encode([*recorded, *unrelated]))
    host.end()
    with server_of(model, store, folder / "classify.log") as server:
        yield Classifier(server, recorded, unrelated, probabilities)


def classify(server: Server, texts: Sequence[str]) -> Any:
    answers = [post(server, "/classify", input=text)["data"][0] for text in texts]
    assert {answer["label"] for answer in answers} <= {"positive", "negative"}
    return np.array([answer["probs"] for answer in answers])


def test_recorded_reviews_hit_and_keep_their_class(classifier: Classifier) -> None:
    with counting(classifier.server, hit=RECORDED):
        answers = classify(classifier.server, classifier.recorded)
    expected = classifier.stock[:RECORDED]
    assert np.abs(answers - expected).max() <= LIKE_STOCK
    assert not np.array_equal(answers.astype(np.float32), expected)
    assert np.ptp(expected[:, 0]) > 10 * LIKE_STOCK, "the classifier must tell reviews apart"


def test_other_reviews_miss_and_are_classified_as_by_stock(classifier: Classifier) -> None:
    with counting(classifier.server, miss=RECORDED):
        answers = classify(classifier.server, classifier.unrelated)
    assert np.abs(answers - classifier.stock[RECORDED:]).max() <= 1e-6


def test_reviews_in_one_request_are_classified_as_alone(classifier: Classifier) -> None:
    mixed = [*classifier.unrelated[:3], *classifier.recorded[:3]]
    with counting(classifier.server, hit=3, miss=3):
        answers = post(classifier.server, "/classify", input=mixed)["data"]
    expected = [*classifier.stock[RECORDED : RECORDED + 3], *classifier.stock[:3]]
    assert np.abs(np.array([a["probs"] for a in answers]) - np.array(expected)).max() <= LIKE_STOCK


# -- a cross-encoder ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Scorer:
    """A server; one query with documents of which the first ``RECORDED`` pairs are in its store,
    and stock's scores of all pairs."""

    server: Server
    query: str
    documents: list[str]
    stock: Any


@pytest.fixture(scope="module")
def scorer(folder: Path, host: Engine) -> Iterator[Scorer]:
    model, store = folder / "scorer", folder / "scorer-store"
    report = classifiers.pair_scorer(model, train=300, held_out=100)
    assert report["spearman"] > 0.2, "the scores must mean something"
    sentences = [pair.second for pair in corpus.stsb_pairs("dev")[: 4 * RECORDED]]
    query = corpus.stsb_pairs("dev")[0].first
    documents = sorted(set(sentences))[: 2 * RECORDED]
    pairs = [(query, document) for document in documents]
    layers = tuple(range(6))
    host.build(pairs[:RECORDED], model=str(model), store=store, layers=layers, min_tokens=2)
    host.replace(**stock(model))
    scores = np.array(host.score(pairs))
    host.end()
    with server_of(model, store, folder / "score.log") as server:
        yield Scorer(server, query, documents, scores)


def test_recorded_pairs_hit_and_keep_their_score(scorer: Scorer) -> None:
    with counting(scorer.server, hit=RECORDED):
        answers = post(
            scorer.server, "/score", text_1=scorer.query, text_2=scorer.documents[:RECORDED]
        )
    scores = np.array([item["score"] for item in answers["data"]])
    assert np.abs(scores - scorer.stock[:RECORDED]).max() <= LIKE_STOCK
    assert np.ptp(scorer.stock) > 5 * LIKE_STOCK, "the scorer must tell pairs apart"


def test_other_pairs_miss_and_are_scored_as_by_stock(scorer: Scorer) -> None:
    for document, expected in zip(
        scorer.documents[RECORDED:], scorer.stock[RECORDED:], strict=True
    ):
        with counting(scorer.server, miss=1):
            answer = post(scorer.server, "/score", text_1=scorer.query, text_2=document)
        assert abs(answer["data"][0]["score"] - expected) <= 1e-6


@pytest.mark.parametrize("route", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_reranking_orders_hits_and_misses_as_stock_scores_them(scorer: Scorer, route: str) -> None:
    with counting(scorer.server, hit=RECORDED, miss=RECORDED):
        ranked = post(scorer.server, route, query=scorer.query, documents=scorer.documents)
    scores = {item["index"]: item["relevance_score"] for item in ranked["results"]}
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    expected = dict(enumerate(scorer.stock))
    assert max(abs(scores[i] - expected[i]) for i in expected) <= LIKE_STOCK


# -- token embeddings and ways to pool ---------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """MiniLM, with a store of all its layers of the recorded sentences."""

    model: Path
    store: Path
    recorded: list[str]
    unrelated: list[str]


@pytest.fixture(scope="module")
def encoder(folder: Path, host: Engine) -> Encoder:
    model, store = assets.ensure("minilm"), folder / "encoder-store"
    sentences = list(dict.fromkeys(pair.first for pair in corpus.stsb_pairs("dev")))
    recorded, unrelated = sentences[:RECORDED], sentences[RECORDED : 2 * RECORDED]
    layers = tuple(range(6))
    host.build(recorded, model=str(model), store=store, layers=layers, min_tokens=2)
    return Encoder(model, store, recorded, unrelated)


@pytest.mark.parametrize("pooling", ["MEAN", "CLS", "LAST"])
def test_own_maps_serve_every_way_to_pool(encoder: Encoder, host: Engine, pooling: str) -> None:
    pooled = stock(encoder.model, pooler_config={"seq_pooling_type": pooling})
    prompts = [*encoder.recorded, *encoder.unrelated]
    host.replace(**pooled)
    expected = host.embed_alone(prompts)
    host.replace(**pooled, **selected(encoder.store))
    counters = Counted(host)
    answers = host.embed_alone(prompts)
    counts = counters.since()
    assert counts["attncache_sequences_total{hit}"] == RECORDED
    assert counts["attncache_sequences_total{miss}"] == RECORDED
    assert cosines(answers[:RECORDED], expected[:RECORDED]).min() >= 0.9999
    assert not np.array_equal(answers[:RECORDED], expected[:RECORDED])
    assert np.array_equal(answers[RECORDED:], expected[RECORDED:])


def test_token_embeddings_of_a_hit_are_those_of_stock(
    encoder: Encoder, host: Engine, folder: Path
) -> None:
    task = {"task": "token_embed"}
    host.replace(**stock(encoder.model, pooler_config=task))
    expected = host.encode([*encoder.recorded, *encoder.unrelated])
    host.end()
    options = ("--pooler-config", json.dumps(task))
    log = folder / "token-embed.log"
    with (
        server_of(encoder.model, encoder.store, log, *options) as server,
        counting(server, hit=RECORDED, miss=RECORDED),
    ):
        answers = [
            np.array(post(server, "/pooling", input=text, **task)["data"][0]["data"])
            for text in (*encoder.recorded, *encoder.unrelated)
        ]
    for answer, own in zip(answers, expected, strict=True):
        assert answer.shape == own.shape
        assert cosines(answer, own).min() >= 0.9995  # of every token
