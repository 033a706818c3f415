# SPDX-License-Identifier: Apache-2.0
"""One attention module with reuse: hits by ``map . V``, misses by the module itself."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from attncache_vllm.engine import compat
from attncache_vllm.reuse.apply import RowBlocks, apply_map

if TYPE_CHECKING:
    from attncache_vllm.engine.step import Split, Step

# Children an attention module may have for its answer to be o_proj(map . V); any other child
# (a gate, a value norm, a compressor ...) could take part in a way that a hit would leave out.
KNOWN_CHILDREN = frozenset({"qkv_proj", "o_proj", "attn", "rotary_emb", "q_norm", "k_norm"})


@dataclass(frozen=True)
class AttentionModule:
    """An attention module of the model, seen by its shape rather than by its class.

    Attributes:
        index: number of the layer in the model.
        name: vLLM's name of its ``Attention`` layer.
        module: the module that owns ``qkv_proj``, ``attn`` and ``o_proj``.
    """

    index: int
    name: str
    module: Any

    @property
    def attention(self) -> Any:
        return self.module.attn


def find_attention_modules(model: torch.nn.Module) -> list[AttentionModule]:
    """Attention modules in the order of their layers; empty for models of another shape."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models.utils import extract_layer_index

    found = []
    for module in model.modules():
        attention: Any = getattr(module, "attn", None)
        if isinstance(attention, Attention) and hasattr(module, "qkv_proj"):
            name = attention.layer_name
            found.append(AttentionModule(extract_layer_index(name), name, module))
    return sorted(found, key=lambda item: item.index)


def why_not_reusable(found: AttentionModule, hidden_size: int) -> str | None:
    """The reason why a hit cannot be answered for this module; None when it can."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.v1.attention.backend import AttentionType

    module, attention = found.module, found.attention
    unknown = sorted(set(dict(module.named_children())) - KNOWN_CHILDREN)
    if unknown:
        return f"unknown part of the attention module: {', '.join(unknown)}"
    if set(inspect.signature(module.forward).parameters) != {"positions", "hidden_states"}:
        return "attention module takes other inputs than positions and hidden_states"
    if not hasattr(module, "o_proj"):
        return "no output projection in the attention module"
    if attention.attn_type != AttentionType.DECODER:
        return "bidirectional attention"
    if attention.sliding_window is not None:
        return "sliding window"
    if getattr(attention.impl, "alibi_slopes", None) is not None:
        return "ALiBi"
    if getattr(attention.impl, "logits_soft_cap", None):
        return "logits soft cap"
    if attention.has_sink:
        return "attention sinks"
    if attention.kv_sharing_target_layer_name is not None:
        return "KV cache shared between layers"
    if attention.head_size_v != attention.head_size:
        return "value heads of another size"
    if not isinstance(module.qkv_proj.quant_method, UnquantizedLinearMethod):
        return "quantized weights"
    heads = attention.num_heads + 2 * attention.num_kv_heads
    if tuple(module.qkv_proj.weight.shape) != (heads * attention.head_size, hidden_size):
        return "qkv_proj of another shape than q, k and v"
    if module.o_proj.output_size != hidden_size:
        return "output projection of another size than the input"
    return None


class ValueProjection:
    """The V rows of ``qkv_proj``: ``[T, hidden] -> [T, KV, head_size]``.

    The rows are copied, because CPU linear layers repack and drop the original weight.
    """

    def __init__(self, found: AttentionModule) -> None:
        attention, qkv_proj = found.attention, found.module.qkv_proj
        self._heads, self._head_size = attention.num_kv_heads, attention.head_size
        rows = self._heads * self._head_size
        self.weight = qkv_proj.weight.data[-rows:].clone()
        self.bias = None if qkv_proj.bias is None else qkv_proj.bias.data[-rows:].clone()

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        value = F.linear(hidden_states, self.weight, self.bias)
        return value.view(-1, self._heads, self._head_size)


class ReuseAttention:
    """Stands around one attention module whose plan reuses maps.

    A hit costs its V rows, ``map . V`` and the output projection; no q, no k, no rotary embedding,
    no KV write, no QK^T and no softmax (AttnCache, arXiv 2510.25979, section 3). Everything else
    goes through the module's own forward, so norms and rotary embedding stay the model's.
    """

    def __init__(self, found: AttentionModule, steps: Any) -> None:
        self._index = found.index
        self._name = found.name
        self._exact = found.module.forward
        self._o_proj = found.module.o_proj
        self._value = ValueProjection(found)
        self._head_rows = found.attention.num_heads * found.attention.head_size
        self._steps = steps

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        step: Step | None = self._steps.current()
        maps = step.maps_for(self._index) if step is not None else {}
        if step is None or not maps:
            exact: torch.Tensor = self._exact(positions=positions, hidden_states=hidden_states)
            return exact
        return self._mixed(step.split(self._name, tuple(maps)), maps, positions, hidden_states)

    def _mixed(
        self,
        split: Split,
        maps: dict[int, RowBlocks],
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
    ) -> torch.Tensor:
        reused = self._reused(split, maps, hidden_states)
        if split.misses is None and len(reused) == len(hidden_states):
            return reused
        output = torch.zeros_like(hidden_states)
        output[split.hit_tokens] = reused
        if split.misses is not None:
            tokens = split.misses.tokens
            with compat.sub_batch(self._name, split.misses.attn_metadata):
                output[tokens] = self._exact(
                    positions=positions[tokens], hidden_states=hidden_states[tokens]
                )
        return output

    def _reused(
        self, split: Split, maps: dict[int, RowBlocks], hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Attention output ``[T_hits, hidden]`` of the hits, in the order of the batch."""
        value = self._value(hidden_states[split.hit_tokens])
        heads = torch.empty(
            len(value), self._head_rows, dtype=value.dtype, device=hidden_states.device
        )
        for row, start, stop in split.hit_spans:
            apply_map(maps[row], value[start:stop], heads[start:stop])
        output: torch.Tensor = self._o_proj(heads)[0]
        return output
