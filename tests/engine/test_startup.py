# SPDX-License-Identifier: Apache-2.0
"""From settings to a model that records and reuses, without an engine: what is put where, what is
counted, what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_samples import (
    Row,
    make_config,
    make_model,
    run_model,
    text,
    whole,
)
from batches import counted, describe, make_builder
from torch import Tensor

from attncache_vllm.engine import compat, metrics, record
from attncache_vllm.engine.record import RecorderExtension
from attncache_vllm.engine.startup import attach, check_before_start
from attncache_vllm.errors import AttnCacheError, NamespaceMismatch, SettingsError, StoreError
from attncache_vllm.reuse.feature import Projector
from attncache_vllm.reuse.plan import Plan
from attncache_vllm.store import LocalStore

# The package silences it where it is loaded; pytest has filters of its own.
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")

SLOTS = 4
TEXTS = [text(seed, length) for seed, length in enumerate((20, 33, 70))]
OTHER = text(9, 33)
PLAN = Plan.reusing(3, (1, 2), max_distance=1e-3)
RECORD = {"layers": [1, 2], "slots": SLOTS}
# Of the map, which is kept in bfloat16, in each of two layers.
TOLERANCE = 4 * 2**-9


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_active", None)
    metrics.LAYERS.clear()


def settings(store: Path, **changes: Any) -> dict[str, Any]:
    return {"store": str(store), "lookup_deadline_ms": 60_000.0, "min_tokens": 4, **changes}


def recorded(path: Path) -> Path:
    """A store of the maps of ``TEXTS`` in layers 1 and 2, not published yet."""
    model = make_model()
    attach(model, make_config(settings(path, record=RECORD)))
    worker = RecorderExtension()
    for number, rows in enumerate(TEXTS):
        run_model(model, [whole(rows)])
        worker.attncache_commit(bytes([number]) * 32)
    worker.attncache_close()
    return path


def publish(path: Path, plan: Plan = PLAN, hidden_size: int = 48) -> Path:
    torch.manual_seed(1)
    projector = Projector(hidden_size, SLOTS, width=32, dim=8)
    with LocalStore.open(path, writable=True) as store, torch.no_grad():
        pooled = torch.stack([torch.tensor(found.pooled) for _, found in store.records()])
        features = torch.zeros(len(pooled), 8) if hidden_size != 48 else projector(pooled)
        store.publish(plan.to_dict(), projector.to_bytes(), {}, features.numpy())
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return publish(recorded(tmp_path / "store"))


def outcomes() -> dict[str, float]:
    names = ("hit", "miss", "bypass")
    return {name: counted("attncache_sequences_total", outcome=name) for name in names}


def since(before: dict[str, float]) -> dict[str, float]:
    return {
        name: count - before[name] for name, count in outcomes().items() if count - before[name]
    }


def layers_treated() -> dict[str, float]:
    [family] = metrics.LAYERS.collect()
    return {sample.labels["treatment"]: sample.value for sample in family.samples}


def tokens_computed(model: Any) -> list[int]:
    """Tokens that each layer has projected to queries, keys and values since it was asked last."""
    projections = [layer.self_attn.qkv_proj for layer in model.model.layers]
    computed = [projection.tokens_computed for projection in projections]
    for projection in projections:
        projection.tokens_computed = 0
    return computed


def exact(rows: Tensor) -> Tensor:
    return run_model(make_model(), [whole(rows)])


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


# -- reuse -------------------------------------------------------------------------------------


def test_what_was_recorded_is_reused_and_nothing_else(store: Path) -> None:
    model = make_model()
    attach(model, make_config(settings(store)))
    assert layers_treated() == {"exact": 1, "reused": 2}
    for rows in TEXTS:
        before = outcomes()
        answer = run_model(model, [whole(rows)])
        assert since(before) == {"hit": 1}
        assert 0 < relative(answer, exact(rows)) <= TOLERANCE
        assert tokens_computed(model) == [len(rows), 0, 0]
    before = outcomes()
    assert torch.equal(run_model(model, [whole(OTHER)]), exact(OTHER))
    assert since(before) == {"miss": 1}
    assert tokens_computed(model) == [33, 33, 33]


def test_a_step_of_hits_misses_and_bypasses_answers_as_each_alone(store: Path) -> None:
    model = make_model()
    attach(model, make_config(settings(store), scheduler_config__enable_chunked_prefill=True))
    long = text(5, 60)
    # The beginning of a long text in a step of its own.
    run_model(model, [Row(TEXTS[0], 0, 0), Row(long, 0, 40)])
    before = outcomes()
    rows = [TEXTS[2], Row(long, 40, 60), OTHER, text(6, 3), TEXTS[0]]
    step = [row if isinstance(row, Row) else whole(row) for row in rows]
    together = run_model(model, step)
    # The end of the long text and the short text are the bypasses.
    assert since(before) == {"hit": 2, "miss": 1, "bypass": 2}
    answers = together.split([row.stop - row.start for row in step])
    for answer, row in zip(answers, step, strict=True):
        assert relative(answer, exact(row.text)[row.start : row.stop]) <= TOLERANCE


def test_with_prefix_caching_a_hit_computes_keys_and_values(store: Path) -> None:
    model = make_model()
    config = make_config(
        settings(store, reuse_with_prefix_caching=True), cache_config__enable_prefix_caching=True
    )
    attach(model, config)
    reason = "keys and values are kept for requests with the same prefix"
    assert layers_treated() == {"exact": 1, f"partly: {reason}": 2}
    before = outcomes()
    answer = run_model(model, [whole(TEXTS[1])])
    assert since(before) == {"hit": 1}
    assert 0 < relative(answer, exact(TEXTS[1])) <= TOLERANCE
    assert tokens_computed(model) == [33, 33, 33]
    for layer, calls in zip(model.model.layers, (1, 0, 0), strict=True):
        impl = layer.self_attn.attn.impl
        assert len(impl.calls) == calls
        assert len(impl.slots_written) == 33


def test_a_layer_that_cannot_reuse_leaves_the_others_to(store: Path) -> None:
    model = make_model()
    model.model.layers[1].self_attn.attn.has_sink = True
    attach(model, make_config(settings(store)))
    assert layers_treated() == {"exact": 1, "bypassed: attention sinks": 1, "reused": 1}
    answer = run_model(model, [whole(TEXTS[2])])
    assert tokens_computed(model) == [70, 70, 0]
    assert 0 < relative(answer, exact(TEXTS[2])) <= TOLERANCE


def test_the_settings_gate_stands_in_for_the_plans(store: Path) -> None:
    model = make_model()
    attach(model, make_config(settings(store, max_distance=1e9)))
    before = outcomes()
    answer = run_model(model, [whole(OTHER)])
    assert since(before) == {"hit": 1}
    assert relative(answer, exact(OTHER)) > 10 * TOLERANCE


# -- bypasses ----------------------------------------------------------------------------------


def without_reuse(model: Any) -> None:
    for layer in model.model.layers[1:]:
        layer.self_attn.attn.has_sink = True


@pytest.mark.parametrize(
    ("prepare", "changes", "reason"),
    [
        (
            lambda model: None,
            {"cache_config__enable_prefix_caching": True},
            "prefix caching: start with --no-enable-prefix-caching or set "
            "reuse_with_prefix_caching",
        ),
        (without_reuse, {}, "attention sinks"),
    ],
    ids=["engine", "every layer of the plan"],
)
def test_a_bypassed_model_is_left_alone_and_its_prompts_counted(
    store: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[[Any], None],
    changes: dict[str, Any],
    reason: str,
) -> None:
    model = make_model()
    prepare(model)
    layers = {layer.self_attn.attn.layer_name: layer.self_attn.attn for layer in model.model.layers}
    config = make_config(
        settings(store), **changes, compilation_config__static_forward_context=layers
    )
    with caplog.at_level(logging.WARNING, logger="vllm.attncache_vllm"):
        attach(model, config)
    assert f"layers bypassed: {reason}" in caplog.text
    assert layers_treated()[f"bypassed: {reason}"] >= 2
    assert torch.equal(run_model(model, [whole(TEXTS[0])]), exact(TEXTS[0]))
    for layer in model.model.layers:
        assert "forward" not in vars(layer.self_attn)

    # A whole prompt, the end of one and the beginning of one.
    prompts = SimpleNamespace(num_prompt_tokens_cpu_tensor=torch.tensor([3, 9, 9]))
    monkeypatch.setattr(compat, "_runner", SimpleNamespace(input_batch=prompts))
    before, reasons = outcomes(), counted("attncache_bypasses_total", reason=reason)
    make_builder(layers, list(layers)).build(0, describe([3, 2, 4], context=[3, 9, 4]))
    assert since(before) == {"bypass": 2}
    assert counted("attncache_bypasses_total", reason=reason) == reasons + 2


def test_an_exact_plan_bypasses_every_text(tmp_path: Path) -> None:
    path = publish(recorded(tmp_path / "store"), Plan.reusing(3, (), max_distance=1.0))
    model = make_model()
    attach(model, make_config(settings(path)))
    assert layers_treated() == {"exact": 3}
    assert torch.equal(run_model(model, [whole(TEXTS[0])]), exact(TEXTS[0]))


# -- refusals ----------------------------------------------------------------------------------


def refusal(kind: type[AttnCacheError], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def test_a_plan_of_another_number_of_layers_is_refused(tmp_path: Path) -> None:
    plan = Plan.reusing(4, (1, 2), max_distance=1.0)
    path = publish(recorded(tmp_path / "store"), plan)
    config = make_config(settings(path))
    message = refusal(StoreError, lambda: attach(make_model(), config))
    assert "each of the model's 3 layers, got 4; build the store again" in message


def test_a_projector_of_another_width_is_refused(tmp_path: Path) -> None:
    path = publish(recorded(tmp_path / "store"), hidden_size=40)
    message = refusal(StoreError, lambda: attach(make_model(), make_config(settings(path))))
    assert "inputs of width 40, the model has 48" in message


def test_a_store_of_other_weights_is_refused_by_the_worker(store: Path) -> None:
    model = make_model()
    model.model.layers[2].mlp.weight.data += 1
    message = refusal(NamespaceMismatch, lambda: attach(model, make_config(settings(store))))
    assert "weights: store has" in message


def test_a_store_of_another_model_is_refused_before_start(store: Path) -> None:
    check_before_start(make_config(settings(store)))
    config = make_config(settings(store), model_config__dtype=torch.bfloat16)
    message = refusal(NamespaceMismatch, lambda: check_before_start(config))
    assert "dtype: store has 'float32', server has 'bfloat16'" in message


def test_a_store_that_was_not_published_is_refused_before_start(tmp_path: Path) -> None:
    config = make_config(settings(recorded(tmp_path / "store")))
    assert refusal(StoreError, lambda: check_before_start(config))


@pytest.mark.parametrize(
    ("layers", "rule"),
    [
        ([1, 7], r"must be attention layers of the model, got [7]; it has [0, 1, 2]"),
        ([0, 2], "layer 2 cannot be recorded: attention sinks; leave it out with --layers"),
    ],
)
def test_layers_that_cannot_be_recorded_are_refused(
    tmp_path: Path, layers: list[int], rule: str
) -> None:
    model = make_model()
    model.model.layers[2].self_attn.attn.has_sink = True
    config = make_config(settings(tmp_path / "store", record={"layers": layers}))
    assert rule in refusal(SettingsError, lambda: attach(model, config))
    assert not (tmp_path / "store").exists()


def test_a_module_that_does_more_than_its_children_show_ends_the_recording(tmp_path: Path) -> None:
    model = make_model()
    module = model.model.layers[2].self_attn
    attend = module.attend
    module.attend = lambda states, positions: 1.1 * attend(states, positions)
    attach(model, make_config(settings(tmp_path / "store", record=RECORD)))
    message = refusal(AttnCacheError, lambda: run_model(model, [whole(TEXTS[0])]))
    assert message.startswith("layer 2 does not give its own answer from its own map")


def test_a_feature_layer_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    asked = {"layers": [1], "feature_layer": 5}
    config = make_config(settings(tmp_path / "store", record=asked))
    message = refusal(SettingsError, lambda: attach(make_model(), config))
    assert "must be an attention layer of the model, got 5; it has [0, 1, 2]" in message
    assert not (tmp_path / "store").exists()


def test_an_engine_that_parts_its_prompts_cannot_record(tmp_path: Path) -> None:
    config = make_config(
        settings(tmp_path / "store", record=RECORD), cache_config__enable_prefix_caching=True
    )
    message = refusal(SettingsError, lambda: check_before_start(config))
    assert message.startswith("maps cannot be recorded by this engine: prefix caching")


def test_a_store_is_extended_with_the_settings_it_was_begun_with(store: Path) -> None:
    check_before_start(make_config(settings(store, record=RECORD)))
    other = make_config(settings(store, record={**RECORD, "layers": [2]}))
    for refuse in (check_before_start, lambda config: attach(make_model(), config)):
        message = refusal(SettingsError, lambda refuse=refuse: refuse(other))
        assert "a store is extended with the settings it was begun with" in message
