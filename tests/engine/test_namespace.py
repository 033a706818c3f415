# SPDX-License-Identifier: Apache-2.0
"""The fingerprint of weights: equal for all uses of a model, different for every other model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_samples import Decoder, LlamaAttention, Shape, make_model
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from attncache_vllm.engine.modules import find_attention_modules
from attncache_vllm.engine.namespace import SAMPLES_PER_TENSOR, weights_fingerprint


def fingerprint(model: nn.Module) -> str:
    return weights_fingerprint(model, find_attention_modules(model))


@pytest.fixture
def model() -> Any:
    return make_model(2)


def embedding(kind: type[VocabParallelEmbedding], seed: int = 0) -> Any:
    """vLLM's embedding or head, made without a process group."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    weights = torch.randn(11, Shape.hidden, generator=torch.Generator().manual_seed(seed))
    layer.weight = nn.Parameter(weights, requires_grad=False)
    return layer


# -- what it does not depend on ----------------------------------------------------------------


def test_it_is_that_of_the_weights_and_not_of_the_objects(model: Any) -> None:
    assert fingerprint(model) == fingerprint(copy.deepcopy(model))


def with_classes(model: Any) -> None:
    model.score = nn.Linear(Shape.hidden, 5)


def with_pooler(model: Any) -> None:
    model.pooler = nn.Sequential(nn.Linear(Shape.hidden, Shape.hidden), nn.Tanh())


def with_language_head(model: Any) -> None:
    model.lm_head = embedding(ParallelLMHead)


def without_head(model: Any) -> None:
    del model.score


@pytest.mark.parametrize("change", [with_classes, with_pooler, with_language_head, without_head])
def test_it_does_not_depend_on_heads_and_poolers(model: Any, change: Callable[[Any], None]) -> None:
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) == before


def test_it_does_not_depend_on_what_the_model_is_wrapped_in(model: Any) -> None:
    # A model for generation holds as "model" what a model for embedding is.
    assert fingerprint(model.model) == fingerprint(model)


# -- what it depends on ------------------------------------------------------------------------


def scale(parameter: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.get_parameter(parameter).data *= 1.01

    return change


def rename(model: Any) -> None:
    layer = model.model.layers[1]
    layer.feed_forward = layer.mlp
    del layer.mlp


def swap_layers(model: Any) -> None:
    layers = model.model.layers
    layers[0].mlp, layers[1].mlp = layers[1].mlp, layers[0].mlp


def reshape(model: Any) -> None:
    weight = model.model.layers[0].mlp.weight
    weight.data = weight.data.view(2, -1)


def other_dtype(model: Any) -> None:
    # The same bytes in another dtype.
    weight = model.model.layers[0].mlp.weight
    weight.data = weight.data.view(torch.int32)


@pytest.mark.parametrize(
    "change",
    [
        scale("model.embed_tokens.weight"),
        scale("model.layers.0.self_attn.qkv_proj.weight"),
        scale("model.layers.1.self_attn.o_proj.bias"),
        scale("model.layers.1.mlp.weight"),
        rename,
        swap_layers,
        reshape,
        other_dtype,
    ],
)
def test_it_depends_on_layers_and_embeddings(model: Any, change: Callable[[Any], None]) -> None:
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) != before


def test_it_depends_on_vllms_embeddings(model: Any) -> None:
    prints = set()
    for seed in range(2):
        model.model.embed_tokens = embedding(VocabParallelEmbedding, seed)
        prints.add(fingerprint(model))
    assert len(prints) == 2


def test_of_layers_in_more_than_one_list_the_whole_model_counts() -> None:
    def two_towers() -> Any:
        model = nn.Module()
        for tower, layer in (("left", 0), ("right", 1)):
            attention = LlamaAttention(Shape(), f"{tower}.model.layers.{layer}.self_attn")
            model.add_module(tower, Decoder([attention]))
        return model

    torch.manual_seed(0)
    model = two_towers()
    assert len(find_attention_modules(model)) == 2
    before = fingerprint(model)
    model.left.score.weight.data += 1
    assert fingerprint(model) != before


def fingerprint_of(values: Tensor) -> str:
    """That of a model whose only parameter has these values."""
    model = nn.Module()
    model.table = nn.Parameter(values, requires_grad=False)
    return fingerprint(model)


@given(size=st.integers(1, 8 * SAMPLES_PER_TENSOR), place=st.floats(0, 1))
@example(size=1500, place=0.0)
@example(size=1500, place=1.0)
@example(size=SAMPLES_PER_TENSOR + 1, place=1.0)
@example(size=5 * SAMPLES_PER_TENSOR + 3, place=1.0)
def test_samples_are_spread_from_end_to_end_of_a_parameter(size: int, place: float) -> None:
    # As many values in a row as there are for each sample cannot lie between two of them.
    run = math.ceil(size / SAMPLES_PER_TENSOR)
    start = round(place * (size - run))
    changed = torch.zeros(size)
    changed[start : start + run] = 1
    assert fingerprint_of(changed) != fingerprint_of(torch.zeros(size))


def test_no_more_of_a_parameter_is_read_than_the_samples() -> None:
    size = 1500
    before = fingerprint_of(torch.zeros(size))
    alone = torch.eye(size)
    assert sum(fingerprint_of(values) != before for values in alone) <= SAMPLES_PER_TENSOR


def test_a_model_without_attention_has_a_fingerprint_of_all_its_weights() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    before = weights_fingerprint(model, [])
    model[0].weight.data += 1
    assert weights_fingerprint(model, []) != before
