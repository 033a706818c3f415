# SPDX-License-Identifier: Apache-2.0
"""An engine that finds out at its start what reuse costs: layers as start-up hooks them, over a
standard backend that takes its time."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_samples import make_config, make_model, run_model, text, whole
from batches import BLOCK_SIZE, Backend, StandardImpl
from recorded_stores import IDS, TEXTS, WHOLE, plan_of, settings, with_templates

from attncache_vllm.engine.startup import attach
from attncache_vllm.reuse.plan import SourcePlan

KERNEL_SECONDS = 0.01
LONGEST = 150


@pytest.fixture
def slow_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = StandardImpl.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(KERNEL_SECONDS)
        return fast(self, *args, **kwargs)

    monkeypatch.setattr(StandardImpl, "forward", forward)


def started(store: Path, **changes: Any) -> tuple[Any, Any]:
    """A model whose engine is ready, and what its worker holds."""
    config = make_config(
        settings(store, **changes),
        model_config__max_model_len=LONGEST,
        scheduler_config__max_num_batched_tokens=10_000,
    )
    model = make_model()
    attach(model, config)
    layers = [layer.self_attn.attn for layer in model.model.layers]
    config.compilation_config.static_forward_context.update(
        {layer.layer_name: layer for layer in layers}
    )
    spec = SimpleNamespace(block_size=BLOCK_SIZE)
    names = [layer.layer_name for layer in layers]
    builder = Backend.get_builder_cls()(spec, names, config, torch.device("cpu"))
    feature = layers[0]
    if hasattr(feature, "attncache_ready"):
        feature.attncache_ready(dict.fromkeys(names, builder))
    return model, feature.attncache_observer.__self__


EVERY = plan_of(
    template=SourcePlan(WHOLE),
    neighbour=SourcePlan(WHOLE, 0.5),
    aligned=SourcePlan(((), (0, 1), ()), 0.3),
    prefix=SourcePlan(((), (), (0, 1))),
)


@pytest.mark.usefixtures("slow_kernel")
def test_every_layer_and_source_is_measured_at_lengths_that_can_come(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        _, serving = started(with_templates(tmp_path / "store", EVERY))
    longest_template = len(TEXTS[2])
    expected = {
        (1, "template"): longest_template,
        (2, "template"): longest_template,
        (1, "neighbour"): LONGEST,
        (2, "neighbour"): LONGEST,
        (1, "aligned"): LONGEST,
        (1, "own"): LONGEST,
        (2, "prefix"): LONGEST,
        (2, "own"): LONGEST,
    }
    found = serving.costs.measured
    assert {key: [cost.length for cost in costs] for key, costs in found.items()} == {
        key: [n for n in (16, 32, 64, 128) if n <= longest] for key, longest in expected.items()
    }
    # Whatever is computed of a layer waits for the kernel, and around a module nothing is.
    for costs in found.values():
        assert min(cost.exact for cost in costs) > KERNEL_SECONDS
    for around in ((1, "neighbour"), (1, "own"), (2, "own")):
        assert max(cost.reused for cost in found[around]) < KERNEL_SECONDS
    assert 0 < serving.costs.lookup < 1
    [line] = [m for m in caplog.messages if "reuse pays" in m]
    assert "neighbour from 16 tokens" in line


@pytest.mark.usefixtures("slow_kernel")
def test_measuring_leaves_answers_as_they_are(tmp_path: Path) -> None:
    store = with_templates(tmp_path / "store", EVERY)
    answers = []
    for measured in (True, False):
        model, serving = started(store, only_where_it_pays=measured)
        assert bool(serving.costs.measured) is measured
        answers.append([run_model(model, [whole(TEXTS[2], IDS[2])]) for _ in range(2)])
    for measured, plain in zip(*answers, strict=True):
        assert torch.equal(measured, plain)


def test_where_nothing_is_saved_nothing_is_served(tmp_path: Path) -> None:
    model, serving = started(with_templates(tmp_path / "store"))
    for costs in serving.costs.measured.values():
        costs[:] = [type(cost)(cost.length, 0.0, 1.0) for cost in costs]
    serving.costs = type(serving.costs)(serving.costs.measured)
    exact = make_model()
    assert torch.equal(
        run_model(model, [whole(text(5, 40))]), run_model(exact, [whole(text(5, 40))])
    )
    assert serving.outcomes.reasons == {"bypass: reuse would not pay at its length": 1}


def test_a_batch_that_would_be_parted_for_too_little_is_computed(tmp_path: Path) -> None:
    model, serving = started(with_templates(tmp_path / "store"))
    for costs in serving.costs.measured.values():
        costs[:] = [type(cost)(cost.length, 1.0, 0.0, parting=1.5) for cost in costs]
    serving.costs = type(serving.costs)(serving.costs.measured)
    short, exact = whole(text(5, 40)), make_model()
    long = whole(text(6, 140))  # no template is so long
    alone = run_model(model, [short])
    assert not torch.equal(alone, run_model(exact, [short]))
    assert torch.equal(run_model(model, [short, long]), run_model(exact, [short, long]))


@pytest.mark.parametrize("step", ["metadata_of_prompts", "most_tokens"])
def test_an_engine_that_cannot_be_measured_takes_every_hit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: str
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(f"attncache_vllm.engine.compat.{step}", fail)
    model, serving = started(with_templates(tmp_path / "store"))
    assert "costs could not be measured" in caplog.text
    run_model(model, [whole(text(5, 40))])
    assert serving.outcomes.sequences == {"hit": 1}
