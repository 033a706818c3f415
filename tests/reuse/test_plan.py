# SPDX-License-Identifier: Apache-2.0
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attncache_vllm.reuse.plan import LayerPlan, Plan

layer_plans = st.builds(
    LayerPlan,
    source=st.sampled_from(["exact", "cached"]),
    max_distance=st.floats(0, 1e6),
    crop=st.booleans(),
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    layers = tuple(draw(st.lists(layer_plans, min_size=1, max_size=40)))
    reused = [i for i, layer in enumerate(layers) if layer.source == "cached"]
    last = reused[0] if reused else len(layers) - 1
    return Plan(draw(st.integers(0, last)), layers)


@settings(deadline=None)
@given(plans())
def test_a_plan_survives_its_dict_and_json(plan: Plan) -> None:
    assert Plan.from_dict(plan.to_dict()) == plan
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@settings(deadline=None)
@given(plans())
def test_reused_layers_are_the_cached_ones(plan: Plan) -> None:
    assert [plan.layers[i].source for i in plan.reused_layers] == ["cached"] * len(
        plan.reused_layers
    )
    assert len(plan.reused_layers) == sum(layer.source == "cached" for layer in plan.layers)
    assert plan.first_reused == (min(plan.reused_layers) if plan.reused_layers else None)


@pytest.mark.parametrize(
    ("num_layers", "reused"), [(30, range(20, 30)), (6, [4, 5]), (4, [3]), (1, [0])]
)
def test_last_third_reuses_the_last_layers(num_layers: int, reused: range | list[int]) -> None:
    plan = Plan.last_third(num_layers, 0.25)
    assert plan.feature_layer == 0
    assert len(plan.layers) == num_layers
    assert plan.reused_layers == tuple(reused)
    assert {plan.layers[i] for i in reused} == {LayerPlan("cached", 0.25, crop=False)}
    assert {Plan.last_third(num_layers, 0.25, crop=True).layers[i].crop for i in reused} == {True}


def test_reusing_takes_layers_in_any_order() -> None:
    plan = Plan.reusing(5, [4, 2, 4], 0.5, feature_layer=2)
    assert plan.reused_layers == (2, 4)
    assert plan.first_reused == plan.feature_layer == 2


def test_reused_layers_crop_if_they_are_told_to() -> None:
    for crop in (True, False):
        plan = Plan.reusing(5, [2, 4], 0.5, crop=crop)
        assert [plan.layers[i].crop for i in plan.reused_layers] == [crop, crop]


def test_a_plan_may_reuse_nothing() -> None:
    plan = Plan.reusing(3, [], 0.5)
    assert plan.reused_layers == ()
    assert plan.first_reused is None


def good() -> dict[str, Any]:
    return Plan.reusing(3, [1, 2], 0.5, feature_layer=1).to_dict()


def changed(**fields: Any) -> dict[str, Any]:
    return {**good(), **fields}


def with_layer(index: int, **fields: Any) -> dict[str, Any]:
    data = good()
    data["layers"][index] = {**data["layers"][index], **fields}
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "a plan must be a mapping"),
        ([], "a plan must be a mapping"),
        ({}, "exactly the keys"),
        ({"feature_layer": 0}, "exactly the keys"),
        (changed(version=1), "exactly the keys"),
        (changed(layers=None), "layers must be a list"),
        (changed(layers="exact"), "layers must be a list"),
        (changed(layers=[]), "at least one layer"),
        (changed(layers=[None]), "layer 0 of a plan must be a mapping"),
        (changed(feature_layer=2), r"feature_layer must be in 0\.\.1"),
        (changed(feature_layer=-1), r"feature_layer must be in 0\.\.1"),
        (changed(feature_layer=1.0), "feature_layer must be an integer"),
        (changed(feature_layer=True), "feature_layer must be an integer"),
        (changed(feature_layer="1"), "feature_layer must be an integer"),
        (with_layer(1, extra=0), "layer 1 of a plan must be"),
        (with_layer(1, source="shared"), "source must be one of"),
        (with_layer(1, source=None), "source must be one of"),
        (with_layer(1, source=["cached"]), "source must be one of"),
        (with_layer(1, max_distance=-0.1), "max_distance must be a finite number"),
        (with_layer(1, max_distance=float("inf")), "max_distance must be a finite number"),
        (with_layer(1, max_distance=float("nan")), "max_distance must be a finite number"),
        (with_layer(1, max_distance="0.5"), "max_distance must be a finite number"),
        (with_layer(1, max_distance=True), "max_distance must be a finite number"),
        (with_layer(0, max_distance=None), "max_distance must be a finite number"),
        (with_layer(0, max_distance=10**400), "max_distance must be a finite number"),
        (with_layer(1, crop=1), "crop must be true or false"),
        (with_layer(1, crop=None), "crop must be true or false"),
        (with_layer(0, crop="no"), "crop must be true or false"),
        (changed(layers=[{"source": "exact", "max_distance": 0.0}]), "exactly the keys"),
    ],
)
def test_a_bad_plan_is_refused_with_the_rule_and_the_value(data: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Plan.from_dict(data)
    assert "got " in str(error.value)


def test_an_unused_feature_layer_must_still_exist() -> None:
    with pytest.raises(ValueError, match=r"feature_layer must be in 0\.\.2"):
        Plan.reusing(3, [], 0.5, feature_layer=3)


@pytest.mark.parametrize("layers", [[3], [-1], [0, 7]])
def test_reusing_a_layer_that_does_not_exist_is_refused(layers: list[int]) -> None:
    with pytest.raises(ValueError, match=r"reused layers must be in 0\.\.2"):
        Plan.reusing(3, layers, 0.5)
    with pytest.raises(ValueError, match="at least one layer"):
        Plan.reusing(0, [], 0.5)
