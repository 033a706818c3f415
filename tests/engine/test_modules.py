# SPDX-License-Identifier: Apache-2.0
"""Attention modules are found by their shape, whatever their classes and children are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_samples import (
    QKV,
    BertAttention,
    Decoder,
    LlamaAttention,
    ModernAttention,
    Shape,
    make_model,
    make_module,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from attncache_vllm.engine.modules import ForwardInputs, find_attention_modules
from attncache_vllm.reuse.layout import MapLayout, Mask


def names(model: nn.Module) -> list[str]:
    return [found.name for found in find_attention_modules(model)]


def named(*layer_names: str) -> Any:
    """A model whose attention modules have these names, in this order."""
    return Decoder([LlamaAttention(Shape(), name) for name in layer_names])


# -- finding -----------------------------------------------------------------------------------


def test_modules_are_found_in_the_order_of_their_layers() -> None:
    layers = [f"model.layers.{index}.self_attn" for index in (10, 2, 0)]
    model = named(*layers)
    found = find_attention_modules(model)
    assert [item.index for item in found] == [0, 2, 10]
    assert [item.name for item in found] == [f"{name}.attn" for name in reversed(layers)]
    for item, layer in zip(found, reversed(model.model.layers), strict=True):
        assert item.module is layer.self_attn
        assert item.attention is layer.self_attn.attn


def test_a_model_without_attention_layers_has_no_modules() -> None:
    assert find_attention_modules(nn.Sequential(nn.Linear(2, 2), nn.MultiheadAttention(2, 1))) == []


@pytest.mark.parametrize("name", ["model.self_attn", "layers.1.blocks.0.attn", "layers.x.attn"])
def test_a_layer_whose_number_is_not_clear_is_left_out(name: str) -> None:
    assert names(named("layers.0.attn", name, "layers.2.attn")) == [
        "layers.0.attn.attn",
        "layers.2.attn.attn",
    ]


def test_all_layers_that_share_a_number_are_left_out() -> None:
    # A decoder with cross-attention, a parallel branch, or two towers: which one is layer 1?
    model = named("layers.0.attn", "layers.1.self_attn", "layers.1.cross_attn", "tower.1.attn")
    assert names(model) == ["layers.0.attn.attn"]


def test_a_layer_whose_keys_others_read_says_so() -> None:
    model = make_model(4)
    for layer in model.model.layers[2:]:
        layer.self_attn.attn.kv_sharing_target_layer_name = "model.layers.1.self_attn.attn"
    found = find_attention_modules(model)
    assert [item.read_by_others for item in found] == [False, True, False, False]


# -- what a module is made of ------------------------------------------------------------------

KINDS = [LlamaAttention, BertAttention, ModernAttention]


def found_as(module: nn.Module) -> Any:
    (found,) = find_attention_modules(Decoder([module]))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_projections_are_known_by_class_and_not_by_name(kind: type[LlamaAttention]) -> None:
    module = make_module(kind)
    found = found_as(module)
    assert found.qkv_proj is module.qkv
    assert found.output_proj is getattr(module, module.output_name)
    assert found.unknown_children() == []


def test_a_module_may_return_its_heads() -> None:
    found = found_as(make_module(BertAttention, Shape(heads=3, output_proj=False)))
    assert found.output_proj is None


def test_of_two_projections_it_is_not_clear_which() -> None:
    module = make_module()
    module.second = QKV(48, 160, torch.float32)
    found = found_as(module)
    assert found.qkv_proj is None
    assert found.unknown_children() == ["qkv_proj", "second"]


def test_children_that_shape_queries_and_keys_are_known_and_others_are_not() -> None:
    module = make_module()
    module.q_norm, module.k_norm, module.rotary_emb = (nn.LayerNorm(16) for _ in range(3))
    # Rotary embeddings are known by class as well, under any name.
    module.rotary_local = RotaryEmbeddingBase.__new__(RotaryEmbeddingBase)
    nn.Module.__init__(module.rotary_local)
    assert found_as(module).unknown_children() == []
    module.v_norm, module.gate = nn.LayerNorm(16), nn.Linear(48, 48)
    assert found_as(module).unknown_children() == ["v_norm", "gate"]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 7])
def test_the_layout_is_that_of_the_attention_layer(causal: bool, window: int | None) -> None:
    shape = Shape(heads=8, kv_heads=4, causal=causal, window=window)
    assert found_as(make_module(shape=shape)).layout == MapLayout(8, 4, Mask(causal, window))


# -- inputs of the forward ---------------------------------------------------------------------


def inputs_of(forward: Callable[..., Any]) -> ForwardInputs | None:
    module = nn.Module()
    module.forward = forward  # type: ignore[method-assign]
    return ForwardInputs.of(module)


def take_mask(positions: Any, hidden_states: Any, mask: Any = None) -> None: ...


def take_kwargs(x: Any, **kwargs: Any) -> None: ...


def take_rest(hidden_states: Any, *rest: Any) -> None: ...


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (
            make_module().forward,
            (("positions", "hidden_states"), "hidden_states", "positions", ()),
        ),
        (make_module(BertAttention).forward, (("hidden_states",), "hidden_states", None, ())),
        (
            make_module(ModernAttention).forward,
            (("x", "position_ids"), "x", "position_ids", ()),
        ),
        (
            take_mask,
            (("positions", "hidden_states", "mask"), "hidden_states", "positions", ("mask",)),
        ),
        (take_kwargs, (("x",), "x", None, ())),
        (take_rest, (("hidden_states", "rest"), "hidden_states", None, ("rest",))),
    ],
    ids=["llama", "bert", "modernbert", "mask", "kwargs", "rest"],
)
def test_inputs_are_told_apart_by_name(forward: Callable[..., Any], expected: Any) -> None:
    assert inputs_of(forward) == ForwardInputs(*expected)


@pytest.mark.parametrize(
    "forward",
    [
        lambda states, positions: None,
        lambda hidden_states, x: None,
        lambda hidden_states, positions, position_ids: None,
        lambda **kwargs: None,
    ],
)
def test_a_forward_whose_inputs_are_not_clear_is_not_known(forward: Callable[..., Any]) -> None:
    assert inputs_of(forward) is None


@given(st.permutations(["positions", "hidden_states", "mask"]), st.integers(0, 3))
def test_arguments_are_given_by_name_however_they_are_passed(
    order: list[str], by_place: int
) -> None:
    inputs = ForwardInputs(tuple(order), "hidden_states", "positions", ("mask",))
    values = {name: object() for name in order}
    args = tuple(values[name] for name in order[:by_place])
    kwargs = {name: values[name] for name in order[by_place:]}
    assert inputs.given(args, kwargs) == values
    assert inputs.given(args, {**kwargs, "more": 1}) == {**values, "more": 1}


def test_inputs_are_those_of_the_model_even_when_the_forward_is_replaced() -> None:
    module = make_module()
    found = found_as(module)
    module.forward = lambda *args, **kwargs: None
    assert found.inputs is not None
    assert found.inputs.names == tuple(inspect.signature(type(module).forward).parameters)[1:]
