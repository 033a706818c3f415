# SPDX-License-Identifier: Apache-2.0
import json
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attncache_vllm.reuse.plan import SOURCES, Plan, Source, SourcePlan, last_third

KV_HEADS = 3
measures = st.floats(0, 1e6)


@st.composite
def parts(draw: st.DrawFn, num_layers: int) -> SourcePlan:
    groups = st.sets(st.integers(0, KV_HEADS - 1)).map(lambda found: tuple(sorted(found)))
    layers = tuple(draw(groups) for _ in range(num_layers))
    assume(any(layers))
    served = [i for i, own in enumerate(layers) if own]
    corrected = tuple(sorted(draw(st.sets(st.sampled_from(served)))))
    errors = tuple(draw(st.tuples(measures, measures)) for _ in range(num_layers))
    errors = draw(st.sampled_from([(), errors]))
    dropped = tuple(draw(st.floats(0, 0.99)) for _ in range(num_layers))
    return SourcePlan(
        layers, draw(measures), corrected, errors, draw(st.sampled_from([(), dropped]))
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    num_layers = draw(st.integers(1, 8))
    chosen = draw(st.sets(st.sampled_from([s for s in SOURCES if s != "prefix"])))
    sources: dict[Source, SourcePlan] = {name: draw(parts(num_layers)) for name in chosen}
    first = min((part.layers[0] for part in sources.values()), default=num_layers - 1)
    return Plan(draw(st.integers(0, first)), num_layers, sources)


@settings(deadline=None)
@given(plans())
def test_a_plan_survives_its_dict_and_json(plan: Plan) -> None:
    assert Plan.from_dict(plan.to_dict()) == plan
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@settings(deadline=None)
@given(plans())
def test_reused_layers_are_those_of_which_any_source_serves_a_group(plan: Plan) -> None:
    for part in plan.sources.values():
        assert part.layers == tuple(i for i in range(plan.num_layers) if part.groups[i])
    assert plan.reused_layers == tuple(
        i for i in range(plan.num_layers) if any(part.groups[i] for part in plan.sources.values())
    )


def test_the_published_rule_takes_whole_layers_from_the_nearest_entry() -> None:
    plan = Plan.reusing(5, 3, [4, 2, 4], 0.5, feature_layer=2)
    every = (0, 1, 2)
    assert plan == Plan(2, 5, {"neighbour": SourcePlan(((), (), every, (), every), 0.5)})
    assert plan.reused_layers == (2, 4)


@pytest.mark.parametrize(
    ("num_layers", "reused"), [(30, range(20, 30)), (6, [4, 5]), (4, [3]), (1, [0])]
)
def test_the_last_third_are_the_last_layers(num_layers: int, reused: range | list[int]) -> None:
    assert list(last_third(num_layers)) == list(reused)


def test_a_plan_may_reuse_nothing() -> None:
    assert Plan(2, 3).reused_layers == ()
    assert Plan.from_dict(Plan(2, 3).to_dict()) == Plan(2, 3)


def test_a_gate_is_a_float_however_it_was_written() -> None:
    gate = SourcePlan(((0,),), 1).gate
    assert (gate, type(gate)) == (1.0, float)


# -- refusals ----------------------------------------------------------------------------------


def good() -> dict[str, Any]:
    part = SourcePlan(((), (0, 2), (1,)), 0.5, (2,), ((0.0, 0.0), (0.1, 0.2), (0.3, 0.0)))
    return Plan(1, 3, {"neighbour": part}).to_dict()


def changed(**fields: Any) -> dict[str, Any]:
    return {**good(), **fields}


def part_with(**fields: Any) -> dict[str, Any]:
    data = good()
    data["sources"]["neighbour"] |= fields
    return data


def of_source(name: str) -> dict[str, Any]:
    return changed(sources={name: good()["sources"]["neighbour"]})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "a plan must be a mapping"),
        ([], "a plan must be a mapping"),
        ({}, "exactly the keys"),
        ({"feature_layer": 0}, "exactly the keys"),
        (changed(version=1), "exactly the keys"),
        (changed(num_layers=0), "at least one layer"),
        (changed(num_layers=3.0), "num_layers must be an integer"),
        (changed(num_layers=4), "of each of 4 layers"),
        (changed(num_layers=10**30), "of each of 1000"),
        (changed(feature_layer=2), r"feature_layer must be in 0\.\.1"),
        (changed(feature_layer=-1), r"feature_layer must be in 0\.\.1"),
        (changed(feature_layer=1.0), "feature_layer must be an integer"),
        (changed(feature_layer=True), "feature_layer must be an integer"),
        (changed(feature_layer="1"), "feature_layer must be an integer"),
        (changed(sources=None), "sources must be a mapping"),
        (changed(sources=[]), "sources must be a mapping"),
        (changed(sources={"neighbour": None}), "source 'neighbour' must be a mapping"),
        (changed(sources={"neighbour": {}}), "exactly the keys"),
        (of_source("exact"), "a source must be one of"),
        (part_with(crop=False), "exactly the keys"),
        (part_with(groups=None), "groups must be a list"),
        (part_with(groups="none"), "groups must be a list"),
        (part_with(groups=[[], [0]], corrected=[], errors=[], dropped=[]), "of each of 3 layers"),
        (part_with(dropped=None), "dropped must be a list"),
        (part_with(dropped=[0.1]), "dropped must be a share below 1 for each layer"),
        (part_with(dropped=[0.1, 0.1, 1.0]), "dropped must be a share below 1"),
        (part_with(dropped=[0.1, 0.1, -0.1]), "dropped must be a share below 1"),
        (part_with(dropped=[0.1, 0.1, "0"]), "dropped must be a share below 1"),
        (part_with(groups=[[], [], []], corrected=[]), "serve at least one"),
        (part_with(groups=[[], None, [0]]), "KV groups must be a list"),
        (part_with(groups=[[], [0, "1"], [0]]), "KV groups must be integers"),
        (part_with(groups=[[], [0.0], [0]]), "KV groups must be integers"),
        (part_with(groups=[[], [True], [0]]), "KV groups must be integers"),
        (part_with(groups=[[], [-1], [0]]), "KV groups of layer 1"),
        (part_with(groups=[[], [1, 0], [0]]), "KV groups of layer 1"),
        (part_with(groups=[[], [0, 0], [0]]), "KV groups of layer 1"),
        (part_with(gate=-0.1), "a gate must be a finite number"),
        (part_with(gate=float("inf")), "a gate must be a finite number"),
        (part_with(gate=float("nan")), "a gate must be a finite number"),
        (part_with(gate="0.5"), "a gate must be a finite number"),
        (part_with(gate=True), "a gate must be a finite number"),
        (part_with(gate=None), "a gate must be a finite number"),
        (part_with(gate=10**400), "a gate must be a finite number"),
        (part_with(corrected=None), "corrected layers must be a list"),
        (part_with(corrected=[1.0]), "corrected layers must be integers"),
        (part_with(corrected=[0]), "corrected layers must be layers that serve"),
        (part_with(corrected=[2, 1]), "corrected layers must be layers that serve"),
        (part_with(errors=None), "errors must be a list"),
        (part_with(errors=[[0.1, 0.1]]), "errors must be a mean and a standard deviation"),
        (part_with(errors=[0.1, 0.1, 0.1]), "a layer's error must be a list"),
        (part_with(errors=[[0.1, 0.1, 0.1]] * 3), "errors must be a mean"),
        (part_with(errors=[[0.1, float("nan")]] * 3), "errors must be a mean"),
        (part_with(errors=[[0.1, "0"]] * 3), "errors must be a mean"),
        (part_with(errors=[[-0.1, 0.1]] * 3), "errors must be a mean"),
    ],
)
def test_a_bad_plan_is_refused_with_the_rule_and_the_value(data: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Plan.from_dict(data)
    assert "got " in str(error.value)


def test_every_source_waits_for_the_feature_layer() -> None:
    # A step begins there: before it nothing could be served.
    part = SourcePlan(((0,), (0,), ()))
    for source in SOURCES:
        assert Plan(0, 3, {source: part}).reused_layers == (0, 1)
        with pytest.raises(ValueError, match=r"feature_layer must be in 0\.\.0"):
            Plan(1, 3, {source: part})


def test_an_unused_feature_layer_must_still_exist() -> None:
    with pytest.raises(ValueError, match=r"feature_layer must be in 0\.\.2"):
        Plan(3, 3)


def test_a_layer_is_not_both_aligned_and_served_from_a_prefix() -> None:
    aligned, prefix = SourcePlan(((), (0,), (1,))), SourcePlan(((), (), (0,)))
    with pytest.raises(ValueError, match=r"both aligned, .* got "):
        Plan(0, 3, {"aligned": aligned, "prefix": prefix})
    beside = SourcePlan(((0,), (), ()))
    assert Plan(0, 3, {"aligned": aligned, "prefix": beside}).reused_layers == (0, 1, 2)


@pytest.mark.parametrize("layers", [[3], [-1], [0, 7]])
def test_reusing_a_layer_that_does_not_exist_is_refused(layers: list[int]) -> None:
    with pytest.raises(ValueError, match=r"reused layers must be in 0\.\.2"):
        Plan.reusing(3, 2, layers, 0.5)
    with pytest.raises(ValueError, match="at least one layer"):
        Plan(0, 0)
