# SPDX-License-Identifier: Apache-2.0
"""From settings to a model that records and reuses, without an engine: what is put where, what is
counted, what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_samples import (
    Row,
    Shape,
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
    PLAN,
    RECORD,
    TEXTS,
    WHOLE,
    plan_of,
    publish,
    recorded,
    settings,
    with_templates,
)
from torch import Tensor

from attncache_vllm.config import Settings
from attncache_vllm.engine import calibrate, compat, metrics, record, startup
from attncache_vllm.engine.startup import attach, check_before_start, effective_plan
from attncache_vllm.errors import (
    AttnCacheError,
    NamespaceMismatch,
    SettingsError,
    StoreDamaged,
    StoreError,
)
from attncache_vllm.reuse.correct import Correction, corrections_to_bytes
from attncache_vllm.reuse.drift import MIN_CANARIES
from attncache_vllm.reuse.plan import Plan, SourcePlan
from attncache_vllm.reuse.template import Templates
from attncache_vllm.store import LocalStore, MapStore, ServedStore
from attncache_vllm.store.rearm import rearm
from attncache_vllm.tenants import SHARED_TENANT, tenant_of

# The package silences it where it is loaded; pytest has filters of its own.
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")

# Of the map, which is kept in bfloat16, in each of two layers.
TOLERANCE = 4 * 2**-9


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_active", None)
    metrics.LAYERS.clear()


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


# -- templates, corrections, alignment, canaries -----------------------------------------------


def hooked(model: Any) -> list[tuple[bool, bool]]:
    """Of each layer, whether something stands around its module and inside of it."""
    modules = [layer.self_attn for layer in model.model.layers]
    return [
        (hasattr(module.attn, "attncache_module"), hasattr(module.attn, "attncache_scores"))
        for module in modules
    ]


def test_a_texts_own_maps_as_templates_give_its_own_answer_without_a_lookup(
    tmp_path: Path,
) -> None:
    model = make_model()
    attach(model, make_config(settings(with_templates(tmp_path / "store"))))
    assert hooked(model) == [(False, False), (True, True), (True, True)]
    # The text that they are of, and its beginning, which is any prefix of it.
    before = outcomes()
    for rows in (TEXTS[2], TEXTS[2][:31]):
        answer = run_model(model, [whole(rows)])
        assert tokens_computed(model) == [len(rows), 0, 0]
        assert 0 < relative(answer, exact(rows)) <= TOLERANCE
    assert since(before) == {"hit": 2}
    # Any other text takes them as well, up to their length.
    assert relative(run_model(model, [whole(OTHER)]), exact(OTHER)) > 10 * TOLERANCE
    tokens_computed(model)
    longer = text(4, 71)
    assert torch.equal(run_model(model, [whole(longer)]), exact(longer))
    assert since(before) == {"hit": 3, "miss": 1}


def test_a_part_of_the_heads_is_served_around_the_module_as_well(tmp_path: Path) -> None:
    plan = plan_of(template=SourcePlan(((), (1,), (0, 1))))
    model = make_model()
    attach(model, make_config(settings(with_templates(tmp_path / "store", plan))))
    assert hooked(model) == [(False, False), (True, True), (True, True)]
    run_model(model, [whole(TEXTS[2])])  # tries whether heads of layer 1 can be parted
    answer = run_model(model, [whole(TEXTS[2])])
    assert tokens_computed(model) == [2 * 70, 70, 0]
    assert 0 < relative(answer, exact(TEXTS[2])) <= TOLERANCE


def test_templates_of_more_layers_than_reuse_them_here_are_no_mistake(tmp_path: Path) -> None:
    plan = plan_of(template=SourcePlan(((), (), (0, 1))))
    model = make_model()
    attach(model, make_config(settings(with_templates(tmp_path / "store", plan))))
    assert hooked(model) == [(False, False), (False, False), (True, True)]
    # Nor is a layer that cannot reuse them.
    model = make_model()
    model.model.layers[1].self_attn.attn.has_sink = True
    attach(model, make_config(settings(with_templates(tmp_path / "other"))))
    assert hooked(model) == [(False, False), (False, False), (True, True)]
    run_model(model, [whole(TEXTS[2])])
    assert tokens_computed(model) == [70, 70, 0]


def test_corrections_are_those_of_their_source_and_layer(tmp_path: Path) -> None:
    # The correction doubles what the heads say: two times the identity, less one.
    size, values = Shape.heads * Shape.head_size, Shape.kv_heads * Shape.head_size
    heads = tuple(range(Shape.heads))
    double = Correction(heads, torch.eye(size + values, size), torch.zeros(size))
    nothing = Correction(heads, torch.zeros(size + values, size), torch.zeros(size))
    corrections = corrections_to_bytes(
        {("template", 2): double, ("neighbour", 2): nothing, ("template", 1): double}
    )
    # The store may have more corrections than the plan uses.
    plan = plan_of(template=SourcePlan(WHOLE, corrected=(2,)))
    path = with_templates(tmp_path / "store", plan, corrections=corrections)
    model = make_model()
    attach(model, make_config(settings(path)))
    answer = run_model(model, [whole(TEXTS[2])])
    assert tokens_computed(model) == [70, 0, 0]
    doubled = make_model()
    doubled.model.layers[2].self_attn.o_proj.weight.data *= 2
    expected = run_model(doubled, [whole(TEXTS[2])])
    assert relative(expected, exact(TEXTS[2])) > 10 * TOLERANCE
    assert relative(answer, expected) <= TOLERANCE


def test_a_recorded_text_that_was_edited_is_served_from_its_entry(tmp_path: Path) -> None:
    path = publish(recorded(tmp_path / "store"), plan_of(aligned=SourcePlan(WHOLE, 0.3)))
    model = make_model()
    attach(model, make_config(settings(path)))
    assert hooked(model) == [(False, False), (True, True), (True, True)]
    hits = {"source": "aligned"}
    before = outcomes(), counted("attncache_hits_total", **hits)
    answer = run_model(model, [whole(TEXTS[2], IDS[2])])
    assert 0 < relative(answer, exact(TEXTS[2])) <= TOLERANCE
    assert [len(layer.self_attn.attn.impl.calls) for layer in model.model.layers] == [1, 0, 0]
    # Its own text is answered around the modules: nothing but V rows is projected.
    projected = [layer.self_attn.qkv.tokens_computed for layer in model.model.layers]
    assert projected == [len(TEXTS[2]), 0, 0]

    # Three tokens in the middle are others; what comes after has not moved.
    rows, ids = TEXTS[2].clone(), IDS[2].copy()
    rows[40:43], ids[40:43] = text(8, 3), (7, 8, 9)
    edited = run_model(model, [whole(rows, ids)])
    assert since(before[0]) == {"hit": 2}
    assert counted("attncache_hits_total", **hits) == before[1] + 2
    # The rows before the edit are its own, the edit is computed and seen by what follows.
    expected = exact(rows)
    assert relative(edited[:40], expected[:40]) <= TOLERANCE
    laid_over = make_model()
    attach(laid_over, make_config(settings(with_templates(tmp_path / "templates"))))
    unaware = run_model(laid_over, [whole(rows)])
    assert relative(edited, expected) < 0.8 * relative(unaware, expected)
    # Without token ids nothing says that it is the same text.
    assert torch.equal(run_model(model, [whole(TEXTS[2])]), exact(TEXTS[2]))
    assert since(before[0]) == {"hit": 3, "miss": 1}  # the other engine's hit among them


def test_canaries_are_answered_exactly_and_trip_a_layer_until_it_is_rearmed(
    tmp_path: Path,
) -> None:
    calibrated = SourcePlan(WHOLE, errors=((0.0, 0.0), (1e-3, 1e-3), (9.0, 9.0)))
    path = with_templates(tmp_path / "store", plan_of(template=calibrated))
    model = make_model()
    attach(model, make_config(settings(path, canary_share=1.0)))
    before, canaries = outcomes(), counted("attncache_canaries_total", source="template")
    for _ in range(MIN_CANARIES):
        assert torch.equal(run_model(model, [whole(OTHER)]), exact(OTHER))
    assert since(before) == {"miss": MIN_CANARIES}
    assert counted("attncache_canaries_total", source="template") == canaries + MIN_CANARIES
    assert counted("attncache_tripped_layers") == 1
    error = counted("attncache_canary_error", layer="1", source="template")
    assert 0.1 < error < 10

    # The same with none: layer 1 serves, and after it has tripped it does not.
    model = make_model()
    attach(model, make_config(settings(path, canary_share=0.5)))
    served = []
    for _ in range(2 * MIN_CANARIES + 2):
        run_model(model, [whole(OTHER)])
        served.append(tokens_computed(model))
    assert served[:4] == [[33, 0, 0], [33, 33, 33]] * 2
    assert served[-2:] == [[33, 33, 0], [33, 33, 33]]
    rearm(path)
    for _ in range(66):
        run_model(model, [whole(text(6, 4))])
        if tokens_computed(model) == [4, 0, 0]:
            return
    pytest.fail("layer 1 did not come back")


# -- plans -------------------------------------------------------------------------------------


def test_a_plan_in_a_file_takes_the_place_of_the_stores(store: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(Plan.reusing(3, 2, (2,), max_distance=1e-3).to_dict()))
    config = make_config(settings(store, plan=str(file)))
    check_before_start(config)
    model = make_model()
    attach(model, config)
    assert hooked(model) == [(False, False), (False, False), (True, True)]
    # The gate of the settings is that of whatever plan is in force, and of its neighbours only.
    with LocalStore.open(store) as opened:
        given = {"plan": file, "max_distance": 0.7}
        plan = effective_plan(opened, Settings(store=store, **given))  # type: ignore[arg-type]
        assert plan == Plan.reusing(3, 2, (2,), max_distance=0.7)
        both = plan_of(aligned=SourcePlan(WHOLE, 0.2), neighbour=SourcePlan(WHOLE, 0.3))
        file.write_text(json.dumps(both.to_dict()))
        plan = effective_plan(opened, Settings(store=store, **given))  # type: ignore[arg-type]
        assert [plan.sources[name].gate for name in ("aligned", "neighbour")] == [0.2, 0.7]


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (None, "No such file"),
        (b"{", "the plan must be a JSON file as `attncache inspect --plan` prints it"),
        (b"\xff", "the plan must be a JSON file"),
        (b"[]", "a plan must be a mapping"),
        (json.dumps(Plan(0, 4).to_dict()).encode(), "must be for the model's 3 layers, got 4"),
    ],
    ids=["none", "no JSON", "no text", "no plan", "of another model"],
)
def test_a_bad_plan_in_a_file_is_refused_before_start(
    store: Path, tmp_path: Path, content: bytes | None, rule: str
) -> None:
    file = tmp_path / "plan.json"
    if content is not None:
        file.write_bytes(content)
    config = make_config(settings(store, plan=str(file)))
    message = refusal(SettingsError, lambda: check_before_start(config))
    assert rule in message
    assert repr(str(file)) in message


def test_groups_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    plan = plan_of(neighbour=SourcePlan(((), (0,), (0, 2))))
    config = make_config(settings(publish(recorded(tmp_path / "store"), plan)))
    message = refusal(StoreError, lambda: attach(make_model(), config))
    assert "KV groups of layer 2 must be below 2, got (0, 2) for 'neighbour'" in message


TEMPLATE_PLAN = plan_of(template=SourcePlan(WHOLE))
CORRECTED_PLAN = plan_of(neighbour=SourcePlan(WHOLE, 1.0, corrected=(2,)))


@pytest.mark.parametrize(
    ("plan", "artifacts", "kind", "rule"),
    [
        (TEMPLATE_PLAN, {}, StoreError, "uses templates, and the store has none"),
        (TEMPLATE_PLAN, {"templates": b"x"}, StoreDamaged, "templates cannot be used"),
        (
            TEMPLATE_PLAN,
            {"templates": Templates({}).to_bytes()},
            StoreDamaged,
            "layer 1 has no template",
        ),
        (CORRECTED_PLAN, {}, StoreError, "uses corrections, and the store has none"),
        (CORRECTED_PLAN, {"corrections": b"x"}, StoreDamaged, "corrections cannot be used"),
        (
            CORRECTED_PLAN,
            {"corrections": corrections_to_bytes({})},
            StoreDamaged,
            "corrections cannot be used: ('neighbour', 2)",
        ),
    ],
)
def test_what_a_plan_uses_must_be_in_the_store_and_sound(
    tmp_path: Path,
    plan: Plan,
    artifacts: dict[str, bytes],
    kind: type[AttnCacheError],
    rule: str,
) -> None:
    path = publish(recorded(tmp_path / "store"), plan, artifacts=artifacts)
    message = refusal(kind, lambda: attach(make_model(), make_config(settings(path))))
    assert rule in message


# -- calibration -------------------------------------------------------------------------------


def test_a_calibration_has_every_layer_that_a_step_comes_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "_active", None)
    late = replace(PLAN, feature_layer=1)
    path = publish(recorded(tmp_path / "store"), late)
    model = make_model()
    # One layer that reuse knows nothing of.
    model.model.layers[2].self_attn.attn.impl.alibi_slopes = [1.0]
    attach(model, make_config(settings(path, calibrate=True)))
    calibrator = calibrate.active()
    assert set(calibrator.layouts) == {1}
    assert torch.equal(run_model(model, [whole(TEXTS[0], IDS[0])]), exact(TEXTS[0]))
    # The step begins at the feature layer, and the layer has it.
    with calibrator.keeping():
        run_model(model, [whole(TEXTS[0], IDS[0])])
    assert set(calibrator._kept) == {1}


@pytest.mark.parametrize(("pooling", "row"), [("MEAN", None), ("LAST", -1), ("CLS", 0)])
def test_a_calibration_knows_the_row_that_the_pooler_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pooling: str, row: int | None
) -> None:
    monkeypatch.setattr(calibrate, "_active", None)
    path = publish(recorded(tmp_path / "store"))
    pooler = SimpleNamespace(seq_pooling_type=pooling)
    config = make_config(settings(path, calibrate=True), model_config__pooler_config=pooler)
    attach(make_model(), config)
    assert calibrate.active()._read_row == row


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


# -- refusals ----------------------------------------------------------------------------------


def refusal(kind: type[AttnCacheError], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def test_a_plan_of_another_number_of_layers_is_refused(tmp_path: Path) -> None:
    plan = Plan.reusing(4, 2, (1, 2), max_distance=1.0)
    path = publish(recorded(tmp_path / "store"), plan)
    config = make_config(settings(path))
    for refuse in (check_before_start, lambda config: attach(make_model(), config)):
        message = refusal(StoreError, lambda refuse=refuse: refuse(config))
        assert "must be for the model's 3 layers, got 4; build the store again" in message


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
