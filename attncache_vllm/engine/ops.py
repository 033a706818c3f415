# SPDX-License-Identifier: Apache-2.0
"""The two opaque ops that torch.compile sees in place of our Python.

``attncache_attention`` stands for a whole attention module of a layer with reuse;
``attncache_observe`` reads the input of the feature layer and leaves it as it is. Both find their
state through the engine whose forward pass is running, so engines in one process do not mix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from attncache_vllm.engine import compat
from attncache_vllm.engine.modules import AttentionModule
from attncache_vllm.errors import SettingsError


class ModuleTreatment(Protocol):
    """What runs in place of an attention module: reuse or recording.

    Found as ``attncache_module`` on vLLM's ``Attention`` layer.
    """

    def forward(
        self, hidden_states: torch.Tensor, positions: torch.Tensor | None
    ) -> torch.Tensor: ...


def attncache_attention(
    hidden_states: torch.Tensor,
    positions: torch.Tensor | None,
    output: torch.Tensor,
    layer_name: str,
) -> None:
    """Write ``[T, hidden]`` to ``output``, from ``[T, hidden]``; see :class:`ModuleTreatment`.

    The memory is the compiled graph's: a captured CUDA graph reads its inputs where they lay when
    it was captured.
    """
    treatment: ModuleTreatment = compat.attention_layer(layer_name).attncache_module
    output.copy_(treatment.forward(hidden_states, positions))


def _attncache_attention_fake(
    hidden_states: torch.Tensor,
    positions: torch.Tensor | None,
    output: torch.Tensor,
    layer_name: str,
) -> None:
    return None


def attncache_observe(hidden_states: torch.Tensor, layer_name: str) -> None:
    """Show the feature layer's input ``[T, hidden]`` to the plugin."""
    compat.attention_layer(layer_name).attncache_observer(hidden_states)


def _attncache_observe_fake(hidden_states: torch.Tensor, layer_name: str) -> None:
    return None


compat.register_op(
    "attncache_attention", attncache_attention, _attncache_attention_fake, ["output"]
)
# Declared as mutating its input: an op without results or side effects would be removed as dead.
compat.register_op(
    "attncache_observe", attncache_observe, _attncache_observe_fake, ["hidden_states"]
)


def replace_forward(found: AttentionModule, treatment: ModuleTreatment) -> None:
    """Route the module's forward through ``attncache_attention``.

    Only for modules whose forward takes nothing but hidden states and positions.
    """
    exact, inputs, layer_name = found.module.forward, found.inputs, found.name
    assert inputs is not None
    hidden, positions = inputs.hidden, inputs.positions
    expected = len(inputs.names)

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = inputs.given(args, kwargs)
        if len(given) != expected:  # something travels in the forward's **kwargs
            answer: torch.Tensor = exact(*args, **kwargs)
            return answer
        output = torch.empty_like(given[hidden])
        torch.ops.vllm.attncache_attention(
            given[hidden],
            given[positions] if positions is not None else None,
            output,
            layer_name,
        )
        return output

    found.attention.attncache_module = treatment
    found.module.forward = forward


def observe_input(found: AttentionModule, observer: Callable[[torch.Tensor], None]) -> None:
    """Call ``observer`` with the module's input before its forward runs, whatever that is.

    Raises:
        SettingsError: the module does not take hidden states.
    """
    inputs = found.inputs
    if inputs is None:
        raise SettingsError(
            "the feature layer's attention module must take hidden states, got "
            f"{type(found.module).__name__} in layer {found.index}; take another layer"
        )
    inner, hidden, layer_name = found.module.forward, inputs.hidden, found.name

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        torch.ops.vllm.attncache_observe(inputs.given(args, kwargs)[hidden], layer_name)
        output: torch.Tensor = inner(*args, **kwargs)
        return output

    found.attention.attncache_observer = observer
    found.module.forward = forward
