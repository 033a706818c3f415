# SPDX-License-Identifier: Apache-2.0
"""From settings to a model that reuses maps: what is put where, and what is counted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
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
from recorded_stores import (
    IDS,
    OTHER,
    RECORD,
    TEXTS,
    WHOLE,
    plan_of,
    publish,
    recorded,
    settings,
    with_templates,
)
from startup_samples import (
    TOLERANCE,
    exact,
    outcomes,
    refusal,
    relative,
    since,
    tokens_computed,
)

from attncache_vllm.engine import compat, metrics, startup
from attncache_vllm.engine.startup import attach, check_before_start
from attncache_vllm.errors import (
    SettingsError,
)
from attncache_vllm.reuse.plan import Plan, SourcePlan
from attncache_vllm.store import LocalStore, MapStore, ServedStore
from attncache_vllm.tenants import SHARED_TENANT, tenant_of

# The package silences it where it is loaded; pytest has filters of its own.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable"),
    pytest.mark.usefixtures("clean_slate"),
]


def layers_treated() -> dict[str, float]:
    [family] = metrics.LAYERS.collect()
    return {sample.labels["treatment"]: sample.value for sample in family.samples}


# -- reuse -------------------------------------------------------------------------------------


def test_what_was_recorded_is_reused_and_nothing_else(published_store: Path) -> None:
    model = make_model()
    attach(model, make_config(settings(published_store)))
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


def test_a_step_of_hits_misses_and_bypasses_answers_as_each_alone(published_store: Path) -> None:
    model = make_model()
    attach(
        model, make_config(settings(published_store), scheduler_config__enable_chunked_prefill=True)
    )
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


def test_with_prefix_caching_a_hit_computes_keys_and_values(published_store: Path) -> None:
    model = make_model()
    config = make_config(
        settings(published_store, reuse_with_prefix_caching=True),
        cache_config__enable_prefix_caching=True,
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


def test_a_layer_that_cannot_reuse_leaves_the_others_to(published_store: Path) -> None:
    model = make_model()
    model.model.layers[1].self_attn.attn.has_sink = True
    attach(model, make_config(settings(published_store)))
    assert layers_treated() == {"exact": 1, "bypassed: attention sinks": 1, "reused": 1}
    answer = run_model(model, [whole(TEXTS[2])])
    assert tokens_computed(model) == [70, 70, 0]
    assert 0 < relative(answer, exact(TEXTS[2])) <= TOLERANCE


def test_the_settings_gate_stands_in_for_the_plans(published_store: Path) -> None:
    model = make_model()
    attach(model, make_config(settings(published_store, max_distance=1e9)))
    before = outcomes()
    answer = run_model(model, [whole(OTHER)])
    assert since(before) == {"hit": 1}
    assert relative(answer, exact(OTHER)) > 10 * TOLERANCE


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_server_on_a_gpu_is_told_that_reuse_does_not_pay(
    published_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    device: str,
) -> None:
    monkeypatch.setattr(startup, "_device", lambda modules: torch.device(device))
    with caplog.at_level(logging.WARNING, logger="vllm.attncache_vllm"):
        attach(make_model(), make_config(settings(published_store)))
    assert ("vLLM was faster without this backend" in caplog.text) == (device == "cuda")


# -- tenants -----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["neighbour", "aligned"])
def test_a_text_of_the_shared_tenant_is_found_by_nobody_else(tmp_path: Path, source: str) -> None:
    path = publish(recorded(tmp_path / "store"), plan_of(**{source: SourcePlan(WHOLE, 1e-3)}))
    model = make_model()
    attach(model, make_config(settings(path)))
    before = outcomes()
    for tenant in (tenant_of("secret"), None):
        answer = run_model(model, [whole(TEXTS[0], IDS[0], tenant)])
        assert torch.equal(answer, exact(TEXTS[0]))
    assert since(before) == {"miss": 2}
    # Nor does it find what the shared tenant has made resident, not even in the same step.
    rows = [whole(TEXTS[0], IDS[0], t) for t in (SHARED_TENANT, tenant_of("secret"))]
    shared, own = run_model(model, rows).split(len(TEXTS[0]))
    assert 0 < relative(shared, exact(TEXTS[0])) <= TOLERANCE
    assert relative(own, exact(TEXTS[0])) < 1e-5
    assert since(before) == {"miss": 3, "hit": 1}


def test_templates_serve_every_tenant(tmp_path: Path) -> None:
    model = make_model()
    attach(model, make_config(settings(with_templates(tmp_path / "store"), unsalted="off")))
    before = outcomes()
    run_model(model, [whole(TEXTS[2], IDS[2], tenant_of("secret"))])
    assert since(before) == {"hit": 1}
    assert tokens_computed(model) == [70, 0, 0]
    assert torch.equal(run_model(model, [whole(TEXTS[2], IDS[2])]), exact(TEXTS[2]))
    assert since(before) == {"hit": 1, "bypass": 1}


# -- a store on a Ray cluster ------------------------------------------------------------------


class Elsewhere:
    """What a server needs of a store, and nothing else of a ``LocalStore``."""

    def __init__(self, store: LocalStore) -> None:
        names = [name for name in dir(ServedStore) if not name.startswith("_")]
        names += [name for name in dir(MapStore) if not name.startswith("_")]
        for name in set(names):
            setattr(self, name, getattr(store, name))


def test_a_server_needs_no_more_of_a_store_than_the_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated = SourcePlan(WHOLE, 1e-3, errors=((0.0, 0.0), (1e-3, 1e-3), (1e-3, 1e-3)))
    path = with_templates(tmp_path / "store", plan_of(neighbour=calibrated, template=calibrated))
    asked = []

    def open_elsewhere(address: object, namespace: Any) -> Any:
        asked.append(address)
        return Elsewhere(LocalStore.open(path, namespace=namespace))

    monkeypatch.setattr(startup, "open_store", open_elsewhere)
    model = make_model()
    attach(model, make_config(settings("ray:auto", canary_share=0.5)))
    assert asked == ["ray:auto"]
    before = outcomes()
    assert relative(run_model(model, [whole(TEXTS[2])]), exact(TEXTS[2])) <= TOLERANCE
    assert since(before) == {"hit": 1}


@pytest.mark.parametrize("installed", [True, False])
def test_before_a_start_on_a_cluster_only_the_package_is_looked_for(
    monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    monkeypatch.setattr(startup, "open_store", lambda *asked: pytest.fail(f"opened {asked}"))
    found = object() if installed else None
    monkeypatch.setattr(startup.importlib.util, "find_spec", {"ray": found}.__getitem__)
    config = make_config(settings("ray://head:10001"))
    if installed:
        check_before_start(config)
    else:
        message = refusal(SettingsError, lambda: check_before_start(config))
        assert "needs the package ray, got 'ray://head:10001' without it" in message
        assert "install attncache-vllm[ray]" in message


@pytest.mark.parametrize("change", [{"record": RECORD}, {"calibrate": True}])
def test_a_cluster_is_no_place_to_record_or_calibrate_in(change: dict[str, Any]) -> None:
    config = make_config(settings("ray:auto", **change))
    for refuse in (check_before_start, lambda config: attach(make_model(), config)):
        message = refusal(SettingsError, lambda refuse=refuse: refuse(config))
        assert "built and calibrated in a folder, got 'ray:auto'" in message


def test_the_log_says_how_layers_are_rearmed(tmp_path: Path) -> None:
    assert startup._rearm_command(tmp_path) == f"attncache rearm {tmp_path}"
    assert startup._rearm_command("ray:auto") == "attncache store rearm --address ray:auto"


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
    published_store: Path,
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
        settings(published_store), **changes, compilation_config__static_forward_context=layers
    )
    with caplog.at_level(logging.WARNING, logger="vllm.attncache_vllm"):
        attach(model, config)
    assert f"layers bypassed: {reason}" in caplog.text
    assert layers_treated()[f"bypassed: {reason}"] >= 2
    assert torch.equal(run_model(model, [whole(TEXTS[0])]), exact(TEXTS[0]))
    for layer in model.model.layers:
        assert "forward" not in vars(layer.self_attn)

    # A whole prompt, the end of one and the beginning of one.
    prompts = [compat.Prompt(3), compat.Prompt(9), compat.Prompt(9)]
    monkeypatch.setattr(compat, "prompts", lambda rows: prompts)
    before, reasons = outcomes(), counted("attncache_bypasses_total", reason=reason)
    make_builder(layers, list(layers)).build(0, describe([3, 2, 4], context=[3, 9, 4]))
    assert since(before) == {"bypass": 2}
    assert counted("attncache_bypasses_total", reason=reason) == reasons + 2


def test_an_exact_plan_bypasses_every_text(tmp_path: Path) -> None:
    path = publish(recorded(tmp_path / "store"), Plan(0, 3))
    model = make_model()
    attach(model, make_config(settings(path)))
    assert layers_treated() == {"exact": 3}
    assert torch.equal(run_model(model, [whole(TEXTS[0])]), exact(TEXTS[0]))
