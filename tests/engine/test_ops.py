# SPDX-License-Identifier: Apache-2.0
"""The two opaque ops, and what a module does that was routed through them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_samples import (
    BertAttention,
    Decoder,
    LlamaAttention,
    ModernAttention,
    make_module,
    step_of,
    text,
    whole,
)
from torch import Tensor, nn

from attncache_vllm.engine import ops
from attncache_vllm.engine.modules import AttentionModule, find_attention_modules
from attncache_vllm.errors import SettingsError

ROWS = whole(text(1, 5))
STATES, POSITIONS = ROWS.text, torch.arange(5)


class Negative:
    """Answers with the negative of what it was given, and writes down how it was called."""

    def __init__(self) -> None:
        self.given: list[tuple[Tensor, Tensor | None]] = []

    def forward(self, hidden_states: Tensor, positions: Tensor | None) -> Tensor:
        self.given.append((hidden_states, positions))
        return -hidden_states


def found_as(module: nn.Module) -> AttentionModule:
    (found,) = find_attention_modules(Decoder([module]))
    return found


def in_forward(modules: list[Any], call: Callable[[], Tensor]) -> Tensor:
    with step_of([module.attn for module in modules], [ROWS]):
        return call()


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (LlamaAttention, lambda module: module(POSITIONS, STATES)),
        (LlamaAttention, lambda module: module(POSITIONS, hidden_states=STATES)),
        (LlamaAttention, lambda module: module(hidden_states=STATES, positions=POSITIONS)),
        (ModernAttention, lambda module: module(STATES, POSITIONS)),
        (ModernAttention, lambda module: module(x=STATES, position_ids=POSITIONS)),
        (BertAttention, lambda module: module(STATES)),
        (BertAttention, lambda module: module(hidden_states=STATES)),
    ],
)
def test_a_treatment_is_given_what_the_module_was_however_it_is_called(
    kind: type[LlamaAttention], call: Callable[[Any], Tensor]
) -> None:
    module, treatment = make_module(kind), Negative()
    ops.replace_forward(found_as(module), treatment)
    assert torch.equal(in_forward([module], lambda: call(module)), -STATES)
    [(states, positions)] = treatment.given
    assert torch.equal(states, STATES)
    if kind is BertAttention:
        assert positions is None
    else:
        assert positions is not None
        assert torch.equal(positions, POSITIONS)


def test_a_call_with_more_than_the_op_carries_goes_to_the_module_as_it_came() -> None:
    module, treatment = make_module(ModernAttention), Negative()
    expected = in_forward([module], lambda: module(STATES, POSITIONS, scale=2))
    plain = in_forward([module], lambda: module(STATES, POSITIONS))
    torch.testing.assert_close(expected, 2 * plain)
    ops.replace_forward(found_as(module), treatment)
    answer = in_forward([module], lambda: module(STATES, position_ids=POSITIONS, scale=2))
    assert torch.equal(answer, expected)
    assert treatment.given == []


def test_each_layer_has_its_own_treatment() -> None:
    modules = [make_module(name=f"model.layers.{index}.self_attn") for index in range(2)]
    treatments = [Negative(), Negative()]
    for found, treatment in zip(find_attention_modules(Decoder(modules)), treatments, strict=True):
        ops.replace_forward(found, treatment)
    in_forward(modules, lambda: modules[1](POSITIONS, STATES))
    assert [len(treatment.given) for treatment in treatments] == [0, 1]


# -- the feature layer -------------------------------------------------------------------------


@pytest.mark.parametrize("reused", [False, True], ids=["exact", "with reuse"])
@pytest.mark.parametrize("kind", [LlamaAttention, ModernAttention, BertAttention])
def test_the_feature_layers_input_is_seen_before_its_forward_which_stays_as_it_is(
    kind: type[LlamaAttention], reused: bool
) -> None:
    module, seen = make_module(kind), []
    found = found_as(module)
    if reused:
        ops.replace_forward(found, Negative())
    args = (POSITIONS, STATES) if kind is LlamaAttention else (STATES, POSITIONS)
    args = args[:1] if kind is BertAttention else args
    expected = in_forward([module], lambda: module(*args))
    module.qkv.tokens_computed = 0

    def observe(states: Tensor) -> None:
        seen.append((states.clone(), module.qkv.tokens_computed))

    ops.observe_input(found, observe)
    assert torch.equal(in_forward([module], lambda: module(*args)), expected)
    [(states, computed_before)] = seen
    assert torch.equal(states, STATES)
    assert computed_before == 0


def test_an_observed_call_keeps_its_further_arguments() -> None:
    module, seen = make_module(ModernAttention), []
    expected = in_forward([module], lambda: module(STATES, POSITIONS, scale=3))
    ops.observe_input(found_as(module), seen.append)
    answer = in_forward([module], lambda: module(STATES, POSITIONS, scale=3))
    assert torch.equal(answer, expected)
    assert len(seen) == 1


def test_a_feature_layer_that_takes_no_hidden_states_is_refused() -> None:
    found = replace(found_as(make_module()), inputs=None)
    with pytest.raises(SettingsError, match="LlamaAttention in layer 1; take another layer"):
        ops.observe_input(found, lambda states: None)


def test_answers_are_written_where_the_compiled_graph_put_them() -> None:
    # A captured CUDA graph reads its inputs where they lay when it was captured.
    module = make_module()
    found = found_as(module)
    ops.replace_forward(found, Negative())
    output = torch.full_like(STATES, torch.nan)
    with step_of([module.attn], [ROWS]):
        torch.ops.vllm.attncache_attention(STATES, POSITIONS, output, found.name)
    assert torch.equal(output, -STATES)
    schema = torch.ops.vllm.attncache_attention.default._schema
    assert [argument.name for argument in schema.arguments if argument.is_write] == ["output"]


def test_the_compiler_sees_ops_that_return_nothing() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        states, output = torch.empty(5, 48, dtype=torch.bfloat16), torch.empty(5, 48)
        for positions in (None, torch.arange(5)):
            assert torch.ops.vllm.attncache_attention(states, positions, output, "layer") is None
        assert torch.ops.vllm.attncache_observe(states, "layer") is None
