# SPDX-License-Identifier: Apache-2.0
"""The attention modules of a model, known by their shape and not by their class: vLLM's
``Attention`` layer, the module around it, its children and the parameters of its forward."""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from attncache_vllm.errors import SettingsError
from attncache_vllm.reuse.layout import MapLayout, Mask

# Names by which models call the inputs of an attention module's forward.
HIDDEN_NAMES = frozenset({"hidden_states", "x"})
POSITION_NAMES = frozenset({"positions", "position_ids"})
# Children that only shape queries and keys: a hit leaves them out and the answer is the same.
# Anything else (a gate, a norm of values, a compressor ...) could take part in the answer.
QUERY_KEY_CHILDREN = frozenset({"rotary_emb", "q_norm", "k_norm", "q_layernorm", "k_layernorm"})


@dataclass(frozen=True)
class ForwardInputs:
    """The inputs of an attention module's forward.

    Attributes:
        names: its parameters in order, ``**kwargs`` left out.
        hidden: name of the one that takes the hidden states ``[T, hidden]``.
        positions: name of the one that takes the token positions ``[T]``, None if it has none.
        others: parameters of another kind.
    """

    names: tuple[str, ...]
    hidden: str
    positions: str | None
    others: tuple[str, ...]

    @classmethod
    def of(cls, module: torch.nn.Module) -> ForwardInputs | None:
        """None if the forward does not take hidden states under a known name."""
        kinds = {
            name: parameter.kind
            for name, parameter in inspect.signature(module.forward).parameters.items()
        }
        names = tuple(n for n, kind in kinds.items() if kind is not inspect.Parameter.VAR_KEYWORD)
        hidden = [name for name in names if name in HIDDEN_NAMES]
        positions = [name for name in names if name in POSITION_NAMES]
        if len(hidden) != 1 or len(positions) > 1:
            return None
        others = tuple(name for name in names if name not in {*hidden, *positions})
        return cls(names, hidden[0], positions[0] if positions else None, others)

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


@dataclass(frozen=True)
class AttentionModule:
    """One attention layer and the module around it.

    Attributes:
        index: number of the layer in the model.
        attention: vLLM's ``Attention`` layer.
        module: the module that owns it.
        inputs: those of the module's forward as the model defines it, None if they are unknown.
        read_by_others: whether another layer shares this layer's KV cache.
    """

    index: int
    attention: Any
    module: Any
    inputs: ForwardInputs | None
    read_by_others: bool = False

    @property
    def name(self) -> str:
        """vLLM's name of the ``Attention`` layer."""
        name: str = self.attention.layer_name
        return name

    @property
    def layout(self) -> MapLayout:
        """What this layer's maps look like."""
        from vllm.v1.attention.backend import AttentionType

        attention = self.attention
        mask = Mask(attention.attn_type == AttentionType.DECODER, attention.sliding_window)
        return MapLayout(attention.num_heads, attention.num_kv_heads, mask)

    @property
    def qkv_proj(self) -> Any | None:
        """The one child that projects to queries, keys and values; None if there is no such."""
        from vllm.model_executor.layers.linear import QKVParallelLinear

        return self._only_child(QKVParallelLinear)

    @property
    def output_proj(self) -> Any | None:
        """The one child that projects the heads back; None if the module returns the heads."""
        from vllm.model_executor.layers.linear import RowParallelLinear

        return self._only_child(RowParallelLinear)

    @property
    def folds_into_output(self) -> bool:
        """Whether the output projection is a plain matrix that another can be folded into."""
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        return self.output_proj is not None and isinstance(
            self.output_proj.quant_method, UnquantizedLinearMethod
        )

    @property
    def soft_cap(self) -> float | None:
        """Bound of the scores before the mask, None if there is none."""
        # 0 and None both mean no cap, depending on the backend.
        return getattr(self.attention.impl, "logits_soft_cap", None) or None

    def unknown_children(self) -> list[str]:
        """Names of the children that may take part in the answer in an unknown way."""
        from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

        known = (self.attention, self.qkv_proj, self.output_proj)
        return [
            name
            for name, child in self.module.named_children()
            if not any(child is part for part in known)
            and name not in QUERY_KEY_CHILDREN
            and not isinstance(child, RotaryEmbeddingBase)
        ]

    def _only_child(self, kind: type) -> Any | None:
        children = [child for child in self.module.children() if isinstance(child, kind)]
        return children[0] if len(children) == 1 else None


def find_attention_modules(model: torch.nn.Module) -> list[AttentionModule]:
    """Attention modules in the order of their layers; empty for models of another shape.

    Layers whose number in the model is not clear from their name are left out, as are all that
    share a number.
    """
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models.utils import extract_layer_index

    owners = [
        (child, module)
        for module in model.modules()
        for child in module.children()
        if isinstance(child, Attention)
    ]
    shared = {attention.kv_sharing_target_layer_name for attention, _ in owners}
    found = []
    for attention, module in owners:
        try:
            index = extract_layer_index(attention.layer_name)
        except AssertionError:
            continue
        inputs, read = ForwardInputs.of(module), attention.layer_name in shared
        found.append(AttentionModule(index, attention, module, inputs, read))
    times = Counter(item.index for item in found)
    return sorted((i for i in found if times[i.index] == 1), key=lambda item: item.index)


def feature_module(modules: list[AttentionModule], index: int) -> AttentionModule:
    """The module whose input features are made of.

    Raises:
        SettingsError: the model has no attention layer of this number.
    """
    for found in modules:
        if found.index == index:
            return found
    raise SettingsError(
        f"the feature layer must be an attention layer of the model, got {index!r}; it has "
        f"{[found.index for found in modules]!r}"
    )
