# SPDX-License-Identifier: Apache-2.0
"""Started with plans of several sources, and for a calibration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_samples import (
    Shape,
    make_config,
    make_model,
    run_model,
    text,
    whole,
)
from batches import counted
from recorded_stores import (
    IDS,
    OTHER,
    PLAN,
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

from attncache_vllm.config import Settings
from attncache_vllm.engine import calibrate
from attncache_vllm.engine.startup import attach, check_before_start, effective_plan
from attncache_vllm.errors import (
    AttnCacheError,
    SettingsError,
    StoreDamaged,
    StoreError,
)
from attncache_vllm.reuse.correct import Correction, corrections_to_bytes
from attncache_vllm.reuse.drift import MIN_CANARIES
from attncache_vllm.reuse.plan import Plan, SourcePlan
from attncache_vllm.reuse.template import Templates
from attncache_vllm.store import LocalStore
from attncache_vllm.store.rearm import rearm

# The package silences it where it is loaded; pytest has filters of its own.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable"),
    pytest.mark.usefixtures("clean_slate"),
]


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


def test_a_plan_in_a_file_takes_the_place_of_the_stores(
    published_store: Path, tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(Plan.reusing(3, 2, (2,), max_distance=1e-3).to_dict()))
    config = make_config(settings(published_store, plan=str(file)))
    check_before_start(config)
    model = make_model()
    attach(model, config)
    assert hooked(model) == [(False, False), (False, False), (True, True)]
    # The gate of the settings is that of whatever plan is in force, and of its neighbours only.
    with LocalStore.open(published_store) as opened:
        given = {"plan": file, "max_distance": 0.7}
        plan = effective_plan(opened, Settings(store=published_store, **given))  # type: ignore[arg-type]
        assert plan == Plan.reusing(3, 2, (2,), max_distance=0.7)
        both = plan_of(aligned=SourcePlan(WHOLE, 0.2), neighbour=SourcePlan(WHOLE, 0.3))
        file.write_text(json.dumps(both.to_dict()))
        plan = effective_plan(opened, Settings(store=published_store, **given))  # type: ignore[arg-type]
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
    published_store: Path, tmp_path: Path, content: bytes | None, rule: str
) -> None:
    file = tmp_path / "plan.json"
    if content is not None:
        file.write_bytes(content)
    config = make_config(settings(published_store, plan=str(file)))
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
