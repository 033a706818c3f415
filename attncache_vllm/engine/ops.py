# SPDX-License-Identifier: Apache-2.0
"""The two opaque ops that torch.compile sees in place of our Python.

``attncache_attention`` stands for a whole attention module of a layer with reuse;
``attncache_observe`` reads the input of the feature layer and leaves it as it is. Both find their
state through the engine whose forward pass is running, so engines in one process do not mix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from attncache_vllm.engine import compat


class AttentionTreatment(Protocol):
    """What runs in place of an attention module: reuse or recording."""

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor: ...


def attncache_attention(
    hidden_states: torch.Tensor, positions: torch.Tensor, layer_name: str
) -> torch.Tensor:
    """``[T, hidden]`` in and out; see :class:`AttentionTreatment`."""
    treatment: AttentionTreatment = compat.attention_layer(layer_name).attncache
    return treatment.forward(positions, hidden_states)


def _attncache_attention_fake(
    hidden_states: torch.Tensor, positions: torch.Tensor, layer_name: str
) -> torch.Tensor:
    return torch.empty_like(hidden_states)


def attncache_observe(hidden_states: torch.Tensor, layer_name: str) -> None:
    """Show the feature layer's input ``[T, hidden]`` to the plugin."""
    compat.attention_layer(layer_name).attncache_observer(hidden_states)


def _attncache_observe_fake(hidden_states: torch.Tensor, layer_name: str) -> None:
    return None


compat.register_op("attncache_attention", attncache_attention, _attncache_attention_fake, [])
# Declared as mutating its input: an op without results or side effects would be removed as dead.
compat.register_op(
    "attncache_observe", attncache_observe, _attncache_observe_fake, ["hidden_states"]
)


def replace_forward(module: torch.nn.Module, layer_name: str) -> None:
    """Route ``module.forward`` through ``attncache_attention``."""

    def forward(positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.ops.vllm.attncache_attention(hidden_states, positions, layer_name)

    module.forward = forward


def observe_input(
    module: torch.nn.Module,
    layer_name: str,
    observer: Callable[[torch.Tensor], None],
    layer: object,
) -> None:
    """Call ``observer`` with the module's input before its forward runs, whatever that is."""
    inner = module.forward
    layer.attncache_observer = observer  # type: ignore[attr-defined]

    def forward(positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        torch.ops.vllm.attncache_observe(hidden_states, layer_name)
        output: torch.Tensor = inner(positions=positions, hidden_states=hidden_states)
        return output

    module.forward = forward
