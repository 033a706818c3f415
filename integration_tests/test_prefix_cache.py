# SPDX-License-Identifier: Apache-2.0
"""Reuse beside vLLM's prefix caching and chunked prefill, with last-token pooling.

What a request may read that another one wrote must be there, and a step that holds a part of a
prompt must never get a map. Stock engines with the same settings give the answers to compare with.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from integration_tests import models, probe
from integration_tests.compare import cosines
from integration_tests.conftest import PATIENT, Texts
from integration_tests.engine import IN_PROCESS, Counted, Engine, TokenIds

BLOCK = 32  # tokens that vLLM's cache shares
CHUNK = 160  # tokens of a step at most
LONGEST = 512
TEXTS = 10
NUM_LAYERS = 4
# Own maps are rounded to bf16; wrong keys or values give far less than 0.99.
LIKE_STOCK = 0.999


@dataclass(frozen=True)
class Prompts:
    """``recorded`` texts are in the store; ``continued`` begin with them and go on otherwise; of
    the ``long`` ones the second shares blocks with the first; ``unrelated`` have no match."""

    recorded: list[TokenIds]
    continued: list[TokenIds]
    long: list[TokenIds]
    unrelated: list[TokenIds]

    @property
    def everything(self) -> list[TokenIds]:
        return [*self.recorded, *self.continued, *self.long, *self.unrelated]


@pytest.fixture(scope="module")
def prompts(model: Path, texts: Texts) -> Prompts:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    recorded, unrelated = (
        [tuple(tokenizer(text).input_ids) for text in chosen]
        for chosen in (texts.recorded[:TEXTS], texts.unrelated[:TEXTS])
    )
    longest, other = texts.lengths[-1], texts.lengths[-2]
    assert len(longest) > 2 * CHUNK
    return Prompts(
        recorded,
        [a + b for a, b in zip(recorded, unrelated, strict=True)],
        [longest, (*longest[: 5 * BLOCK + 7], *other)[:LONGEST]],
        unrelated,
    )


@dataclass(frozen=True)
class Answers:
    """Embeddings ``[B, D]`` of prompts asked one after the other in this order, then all
    together; with what an engine with the backend counted."""

    alone: dict[str, NDArray[np.float32]]
    together: NDArray[np.float32]
    counted: dict[str, dict[str, int]]


KINDS = ("recorded", "continued", "long", "unrelated")


def ask(engine: Engine, prompts: Prompts) -> Answers:
    counters = Counted(engine)
    alone, counted = {}, {}
    for kind in (*KINDS, "again"):
        chosen = prompts.recorded if kind == "again" else getattr(prompts, kind)
        alone[kind] = engine.embed_alone(chosen)
        counted[kind] = counters.since()
    order = random.Random(0).sample(range(len(prompts.everything)), len(prompts.everything))
    mixed = engine.embed([prompts.everything[i] for i in order])
    counted["together"] = counters.since()
    return Answers(alone, mixed[np.argsort(order)], counted)


@dataclass(frozen=True)
class Case:
    """A setting of the two features; ``stock`` and ``reuse`` are answers under it, ``layers`` the
    numbers of layers by treatment."""

    caching: bool
    chunked: bool
    stock: Answers
    reuse: Answers
    layers: dict[str, int]


@pytest.fixture(
    scope="module",
    params=[(True, True), (True, False), (False, True)],
    ids=["caching and chunks", "caching", "chunks"],
)
def case(request: pytest.FixtureRequest, host: Engine, options: Any, prompts: Prompts) -> Case:
    caching, chunked = request.param
    settings = {
        **options,
        "enable_prefix_caching": caching,
        "enable_chunked_prefill": chunked,
        # Without chunks vLLM wants the longest prompt to fit into a step.
        "max_num_batched_tokens": CHUNK if chunked else LONGEST,
    }
    host.replace(**stock_of(settings))
    stock = ask(host, prompts)
    host.probe("probe_forget_layers")
    host.replace(**settings)
    return Case(caching, chunked, stock, ask(host, prompts), host.probe("probe_layers"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small causal model: what is asked here does not depend on the weights."""
    return models.make("llama", tmp_path_factory.mktemp("prefix-cache") / "llama")


@pytest.fixture(scope="module")
def options(small: Path) -> dict[str, Any]:
    """An engine with the backend, pooling the last token."""
    settings = {"store": str(store_of(small)), **PATIENT, "reuse_with_prefix_caching": True}
    return {
        "model": str(small),
        "runner": "pooling",
        "convert": "embed",
        "max_model_len": LONGEST,
        "block_size": BLOCK,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": 2**28,
        "enforce_eager": True,
        "worker_extension_cls": probe.PATH,
        "attention_backend": "attncache",
        "additional_config": {"attncache": settings},
    }


@pytest.fixture(scope="module")
def host(small: Path, options: dict[str, Any], texts: Texts) -> Iterator[Engine]:
    """A process in which engines come and go; the store holds the recorded texts."""
    with Engine(small.with_name("engine.log"), IN_PROCESS, **stock_of(options)) as host:
        layers = tuple(range(NUM_LAYERS))
        host.build(texts.recorded[:TEXTS], model=str(small), store=store_of(small), layers=layers)
        yield host


def store_of(model: Path) -> Path:
    return model.with_name("store")


def stock_of(options: dict[str, Any]) -> dict[str, Any]:
    selected = ("attention_backend", "additional_config")
    return {name: value for name, value in options.items() if name not in selected}


def cached(prompt: TokenIds) -> bool:
    """Whether a part of this prompt is taken from the cache when it is asked again: vLLM shares
    full blocks and computes at least the last token."""
    return len(prompt) > BLOCK


def test_recorded_texts_hit_and_keep_their_embedding(case: Case, prompts: Prompts) -> None:
    assert case.reuse.counted["recorded"]["attncache_sequences_total{hit}"] == len(prompts.recorded)
    reuse, stock = case.reuse.alone["recorded"], case.stock.alone["recorded"]
    assert cosines(reuse, stock).min() >= LIKE_STOCK
    assert not np.array_equal(reuse, stock)


def test_prompt_that_goes_on_from_a_hit_reads_what_the_hit_wrote(
    case: Case, prompts: Prompts
) -> None:
    counts = case.reuse.counted["continued"]
    reuse, stock = case.reuse.alone["continued"], case.stock.alone["continued"]
    assert cosines(reuse, stock).min() >= LIKE_STOCK
    if case.caching:
        begun = sum(cached(prompt) for prompt in prompts.recorded)
        assert counts["attncache_bypasses_total{only a part of the prompt in the step}"] == begun
        assert begun > 0 and not np.array_equal(reuse, stock)  # the hits' keys and values are used
    else:
        assert counts["attncache_sequences_total{hit}"] == 0
        assert np.array_equal(reuse, stock)


def test_long_prompt_is_never_given_a_map_and_counted_once(case: Case, prompts: Prompts) -> None:
    counts = case.reuse.counted["long"]
    assert counts.get("attncache_sequences_total{hit}", 0) == 0
    outcomes = [value for name, value in counts.items() if "sequences_total" in name]
    assert sum(outcomes) == len(prompts.long)
    if case.chunked:
        assert counts["attncache_bypasses_total{only a part of the prompt in the step}"] == 2
    assert np.array_equal(case.reuse.alone["long"], case.stock.alone["long"])


def test_unrelated_text_is_bit_equal_to_stock(case: Case) -> None:
    assert np.array_equal(case.reuse.alone["unrelated"], case.stock.alone["unrelated"])


def test_recorded_text_asked_again_is_like_stock(case: Case, prompts: Prompts) -> None:
    counts = case.reuse.counted["again"]
    begun = sum(cached(prompt) for prompt in prompts.recorded) if case.caching else 0
    assert counts["attncache_sequences_total{hit}"] == len(prompts.recorded) - begun
    assert cosines(case.reuse.alone["again"], case.stock.alone["again"]).min() >= LIKE_STOCK


def test_everything_together_is_as_alone(case: Case, prompts: Prompts) -> None:
    counts = case.reuse.counted["together"]
    outcomes = [value for name, value in counts.items() if "sequences_total" in name]
    assert sum(outcomes) == len(prompts.everything)
    expected = np.concatenate([case.stock.alone[kind] for kind in KINDS])
    assert cosines(case.reuse.together, expected).min() >= LIKE_STOCK


def test_layers_skip_less_where_keys_and_values_are_kept(case: Case) -> None:
    kept = "partly: keys and values are kept for requests with the same prefix"
    assert case.layers == {kept if case.caching else "reused": NUM_LAYERS}
