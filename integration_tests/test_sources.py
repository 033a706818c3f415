# SPDX-License-Identifier: Apache-2.0
"""Templates, corrections and aligned entries, made by hand, in a served model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from attncache_vllm.reuse.codecs import decode_blocks
from attncache_vllm.reuse.correct import Correction, corrections_to_bytes
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.plan import Plan, SourcePlan
from attncache_vllm.reuse.template import Templates
from attncache_vllm.store import LocalStore
from integration_tests import models, probe
from integration_tests.compare import cosines
from integration_tests.conftest import PATIENT, Texts
from integration_tests.engine import IN_PROCESS, Counted, Engine, TokenIds

RECORDED = 8
NUM_LAYERS, HEADS, KV_HEADS, HEAD_SIZE = 4, 4, 2, 32
LAYOUT = MapLayout(HEADS, KV_HEADS, Mask())
WHOLE = ((0, 1),) * NUM_LAYERS
# A map in bf16 costs up to 0.00006, that of another text 0.08 and more.
LIKE_STOCK = 0.9995


@dataclass(frozen=True)
class Prompts:
    """``recorded`` texts are in the store. ``beginnings`` are those of ``longest``, the longest of
    them, and the whole. Of the ``edited`` ones every tenth token was replaced."""

    recorded: list[TokenIds]
    longest: int
    beginnings: list[TokenIds]
    edited: list[TokenIds]

    @property
    def everything(self) -> list[TokenIds]:
        return [*self.recorded, *self.beginnings, *self.edited]


@dataclass(frozen=True)
class Served:
    """Embeddings ``[B, D]`` of an engine and what it counted, alone and all together."""

    beginnings: NDArray[np.float32]
    recorded: NDArray[np.float32]
    edited: NDArray[np.float32]
    together: NDArray[np.float32]
    counted: dict[str, dict[str, int]]

    @property
    def alone(self) -> NDArray[np.float32]:
        return np.concatenate([self.recorded, self.beginnings, self.edited])


def ask(engine: Engine, prompts: Prompts) -> Served:
    counters, answers, counted = Counted(engine), {}, {}
    for kind in ("beginnings", "recorded", "edited"):
        answers[kind] = engine.embed_alone(getattr(prompts, kind))
        counted[kind] = counters.since()
    together = engine.embed(prompts.everything)
    counted["together"] = counters.since()
    return Served(**answers, together=together, counted=counted)


@pytest.fixture(scope="module")
def prompts(model: Path, texts: Texts) -> Prompts:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    recorded = [tuple(tokenizer(text).input_ids) for text in texts.recorded[:RECORDED]]
    longest = max(range(RECORDED), key=lambda i: len(recorded[i]))
    own = recorded[longest]
    edited = [
        tuple(token + 1 if i % 10 == 5 else token for i, token in enumerate(ids))
        for ids in recorded
    ]
    return Prompts(recorded, longest, [own[:16], own[: len(own) // 2], own], edited)


@pytest.fixture(scope="module")
def served(
    prompts: Prompts, texts: Texts, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Served]]:
    """Answers of a stock engine, of one with templates in every layer, which are the maps of the
    longest recorded text, and of one that serves every layer from aligned entries."""
    folder = tmp_path_factory.mktemp("sources")
    small, store = models.make("llama", folder / "llama"), folder / "store"
    stock: dict[str, Any] = {
        "model": str(small),
        "runner": "pooling",
        "convert": "embed",
        "pooler_config": {"seq_pooling_type": "MEAN"},
        "max_model_len": 512,
        "max_num_batched_tokens": 4096,
        "kv_cache_memory_bytes": 2**26,
        "enforce_eager": True,
        "worker_extension_cls": probe.PATH,
    }
    with Engine(folder / "engine.log", IN_PROCESS, **stock) as host:
        found = {"stock": ask(host, prompts)}
        layers = tuple(range(NUM_LAYERS))
        host.build(texts.recorded[:RECORDED], model=str(small), store=store, layers=layers)
        for name, plan in publish(store, prompts).items():
            file = folder / f"{name}.json"
            file.write_text(json.dumps(plan.to_dict()))
            settings = {"store": str(store), **PATIENT, "plan": str(file)}
            selected = {"additional_config": {"attncache": settings}}
            host.replace(**stock, attention_backend="attncache", **selected)
            found[name] = ask(host, prompts)
    yield found


def publish(store: Path, prompts: Prompts) -> dict[str, Plan]:
    """Publish templates and corrections, and give the plans to serve by."""
    with LocalStore.open(store, writable=True) as opened:
        longest = prompts.recorded[prompts.longest]
        record = next(r for _, r in opened.records() if tuple(r.token_ids) == longest)
        maps = {
            layer: {
                record.length: decode_blocks(
                    record.codec, torch.tensor(encoded), LAYOUT, record.length
                )
            }
            for layer, encoded in record.maps.items()
        }
        # Corrections that change nothing: what they are folded into is the model's own projection.
        every, size = tuple(range(HEADS)), HEADS * HEAD_SIZE
        given = size + KV_HEADS * HEAD_SIZE  # the outputs of all heads, and own values
        nothing = Correction(every, torch.zeros(given, size), torch.zeros(size))
        corrections = corrections_to_bytes({("template", 1): nothing, ("template", 2): nothing})
        artifacts = {"templates": Templates(maps).to_bytes(), "corrections": corrections}
        opened.publish_plan(opened.plan, {}, artifacts)
    # Around the module, the same corrected, inside corrected, inside.
    groups = ((0, 1), (0, 1), (1,), (0,))
    return {
        "template": Plan(0, NUM_LAYERS, {"template": SourcePlan(groups, corrected=(1, 2))}),
        "aligned": Plan(0, NUM_LAYERS, {"aligned": SourcePlan(WHOLE, gate=1.0)}),
    }


def hits(counted: dict[str, int]) -> dict[str, int]:
    prefix = "attncache_hits_total{"
    return {
        name.removeprefix(prefix).removesuffix("}"): count
        for name, count in counted.items()
        if name.startswith(prefix) and count
    }


def test_a_texts_own_maps_as_templates_serve_it_and_its_beginnings_like_stock(
    served: dict[str, Served], prompts: Prompts
) -> None:
    reused, exact = served["template"].beginnings, served["stock"].beginnings
    assert hits(served["template"].counted["beginnings"]) == {"template": len(prompts.beginnings)}
    assert cosines(reused, exact).min() >= LIKE_STOCK
    assert not (reused == exact).all(axis=1).any()
    # Other texts take them too, and are not like stock: the maps decide.
    others = [i for i in range(RECORDED) if i != prompts.longest]
    reused, exact = served["template"].recorded[others], served["stock"].recorded[others]
    assert cosines(reused, exact).max() <= 0.99


def test_an_entry_of_the_same_text_serves_it_like_stock(
    served: dict[str, Served], prompts: Prompts
) -> None:
    reused, exact = served["aligned"].recorded, served["stock"].recorded
    assert hits(served["aligned"].counted["recorded"]) == {"aligned": len(prompts.recorded)}
    assert cosines(reused, exact).min() >= LIKE_STOCK
    assert not (reused == exact).all(axis=1).any()


def test_an_edited_text_is_closer_to_stock_when_its_edits_are_computed_and_seen(
    served: dict[str, Served], prompts: Prompts
) -> None:
    assert hits(served["aligned"].counted["edited"]) == {"aligned": len(prompts.edited)}
    # The maps of the text before the edits, laid over it as they are, even in fewer layers.
    at, exact = prompts.longest, served["stock"].edited
    unaware = cosines(served["template"].edited, exact)[at]
    assert cosines(served["aligned"].edited, exact)[at] > unaware
    # All edited texts are closer to stock than their originals are.
    aware = cosines(served["aligned"].edited, exact)
    assert (aware > cosines(served["stock"].recorded, exact)).all()


@pytest.mark.parametrize("name", ["template", "aligned"])
def test_a_mixed_batch_gives_each_sequence_its_answer_alone(
    served: dict[str, Served], name: str
) -> None:
    assert cosines(served[name].together, served[name].alone).min() >= 0.9999


@pytest.mark.parametrize("name", ["template", "aligned"])
def test_every_row_of_every_map_is_reused_or_computed(
    served: dict[str, Served], prompts: Prompts, name: str
) -> None:
    counted = served[name].counted["together"]
    rows = {kind: counted[f"attncache_map_rows_total{{{kind}}}"] for kind in ("reused", "computed")}
    tokens = sum(map(len, prompts.everything))
    assert sum(rows.values()) == NUM_LAYERS * KV_HEADS * tokens
    share = rows["reused"] / sum(rows.values())
    if name == "aligned":
        assert 0.8 < share < 1
    else:
        assert share == 6 / 8  # no text is longer than the templates
