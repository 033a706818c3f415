# SPDX-License-Identifier: Apache-2.0
"""Attention modules without an engine: vLLM's own ``Attention`` layer, and linear layers of its
classes, both made without a configuration or a process group, over the backend of ``batches``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from batches import BLOCK_SIZE, Backend, batch
from torch import Tensor, nn
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.model_executor.layers.attention import Attention, EncoderOnlyAttention
from vllm.model_executor.layers.linear import (
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.v1.attention.backend import AttentionType

from attncache_vllm.engine.compat import BACKEND_NAME, Prompt
from attncache_vllm.tenants import SHARED_TENANT

BLOCKS = 32


@dataclass(frozen=True)
class Shape:
    """Sizes, mask and dtype of an attention module, and whether it projects its heads back."""

    heads: int = 6
    kv_heads: int = 2
    head_size: int = 16
    hidden: int = 48
    causal: bool = True
    window: int | None = None
    output_proj: bool = True
    dtype: torch.dtype = torch.float32


class _Linear(nn.Module):
    """What vLLM's linear layers are once they are made; counts the tokens it is given."""

    def __init__(self, width: int, height: int, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.input_size, self.output_size = width, height
        self.weight = nn.Parameter((torch.randn(height, width) / width**0.5).to(dtype))
        self.bias = nn.Parameter((torch.randn(height) / 4).to(dtype))
        self.quant_method = UnquantizedLinearMethod()
        self.tokens_computed = 0

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        self.tokens_computed += len(x)
        return F.linear(x, self.weight, self.bias), None


class QKV(_Linear, QKVParallelLinear):
    pass


class Output(_Linear, RowParallelLinear):
    pass


def attention_layer(shape: Shape, name: str) -> Any:
    """vLLM's ``Attention`` as its constructor would leave it in an engine with our backend."""
    kind = Attention if shape.causal else EncoderOnlyAttention
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    attributes = {
        "layer_name": name,
        "num_heads": shape.heads,
        "num_kv_heads": shape.kv_heads,
        "head_size": shape.head_size,
        "head_size_v": shape.head_size,
        "attn_type": AttentionType.DECODER if shape.causal else AttentionType.ENCODER_ONLY,
        "sliding_window": shape.window,
        "kv_sharing_target_layer_name": None,
        "has_sink": False,
        "use_mm_prefix": False,
        "query_quant": None,
        "use_direct_call": True,
        "attn_backend": Backend,
        "kv_cache": torch.zeros(
            BLOCKS, shape.kv_heads, BLOCK_SIZE, 2 * shape.head_size, dtype=shape.dtype
        ),
    }
    for key, value in attributes.items():
        setattr(layer, key, value)
    layer.impl = Backend.get_impl_cls()(shape.head_size**-0.5, layer.attn_type, shape.window)
    return layer


class LlamaAttention(nn.Module):
    """As in vLLM's ``llama.py``; queries are scaled up, so that maps are far from uniform."""

    qkv_name, output_name = "qkv_proj", "o_proj"

    def __init__(self, shape: Shape, name: str) -> None:
        super().__init__()
        self.shape = shape
        self.num_heads, self.num_kv_heads = shape.heads, shape.kv_heads
        self.q_size, self.kv_size = (n * shape.head_size for n in (shape.heads, shape.kv_heads))
        height = self.q_size + 2 * self.kv_size
        self.add_module(self.qkv_name, QKV(shape.hidden, height, shape.dtype))
        if shape.output_proj:
            width = shape.heads * shape.head_size
            self.add_module(self.output_name, Output(width, shape.hidden, shape.dtype))
        self.attn = attention_layer(shape, f"{name}.attn")

    @property
    def qkv(self) -> Any:
        return getattr(self, self.qkv_name)

    def heads(
        self, hidden_states: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[T, H or KV, d]``."""
        qkv = self.qkv(hidden_states)[0]
        parts = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        query, key, value = (part.unflatten(1, (-1, self.shape.head_size)) for part in parts)
        if positions is not None:
            query, key = rotated(query, positions), rotated(key, positions)
        return 3 * query, key, value

    def attend(self, hidden_states: Tensor, positions: Tensor | None) -> Tensor:
        answer: Tensor = self.attn(*(x.flatten(1) for x in self.heads(hidden_states, positions)))
        if not self.shape.output_proj:
            return answer
        projected: Tensor = getattr(self, self.output_name)(answer)[0]
        return projected

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        return self.attend(hidden_states, positions)


class BertAttention(LlamaAttention):
    """As in ``bert.py``: no positions, and where the shape says so the heads are the answer."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        return self.attend(hidden_states, None)


class ModernAttention(LlamaAttention):
    """As in ``modernbert.py``: other names for everything, and a ``**kwargs`` as some have it."""

    qkv_name, output_name = "Wqkv", "Wo"

    def forward(self, x: Tensor, position_ids: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        answer = self.attend(x, position_ids)
        return answer * kwargs["scale"] if kwargs else answer


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * 10.0 ** -torch.linspace(0, 3, half)
    a, b = x.float().split(half, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def make_module(
    kind: type[LlamaAttention] = LlamaAttention,
    shape: Shape | None = None,
    name: str = "model.layers.1.self_attn",
) -> Any:
    torch.manual_seed(0)
    return kind(shape or Shape(), name).requires_grad_(False)


class Decoder(nn.Module):
    """A model of attention modules and little more: embedding, MLPs, a head that classifies."""

    def __init__(self, layers: Sequence[nn.Module], hidden: int = Shape.hidden) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(11, hidden)
        self.model.layers = nn.ModuleList()
        for attention in layers:
            layer = nn.Module()
            layer.self_attn = attention
            layer.mlp = nn.Linear(hidden, hidden)
            self.model.layers.append(layer)
        self.score = nn.Linear(hidden, 2)
        self.requires_grad_(False)


def make_model(count: int = 3, shape: Shape | None = None) -> Any:
    torch.manual_seed(0)
    names = [f"model.layers.{index}.self_attn" for index in range(count)]
    return Decoder([LlamaAttention(shape or Shape(), name) for name in names])


def make_config(settings: dict[str, Any] | None = None, **changes: Any) -> Any:
    """vLLM's configuration of an engine on ``make_model()`` with our backend, and with nothing in
    the way of reuse.

    ``settings`` are the plugin's. A key of ``changes`` is a part and its field, like
    ``cache_config__enable_prefix_caching``.
    """
    shape = Shape()
    config = SimpleNamespace(
        additional_config={"attncache": settings},
        model_config=SimpleNamespace(
            model="model",
            architecture="LlamaForCausalLM",
            dtype=shape.dtype,
            attn_type="decoder",
            hf_text_config=SimpleNamespace(num_hidden_layers=3),
            runner_type="pooling",
            pooler_config=SimpleNamespace(seq_pooling_type="MEAN"),
            use_mla=False,
            is_encoder_decoder=False,
            get_hidden_size=lambda: shape.hidden,
            get_head_size=lambda: shape.head_size,
            get_num_attention_heads=lambda parallel: shape.heads,
            get_num_kv_heads=lambda parallel: shape.kv_heads,
        ),
        attention_config=SimpleNamespace(
            backend=SimpleNamespace(name=BACKEND_NAME), backend_per_kind={}
        ),
        cache_config=SimpleNamespace(enable_prefix_caching=False),
        scheduler_config=SimpleNamespace(enable_chunked_prefill=False),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1, rank=0),
        compilation_config=SimpleNamespace(
            static_forward_context={},
            cudagraph_mode=SimpleNamespace(name="NONE"),
            splitting_ops=[],
        ),
        lora_config=None,
        use_v2_model_runner=False,
    )
    for path, value in changes.items():
        part, _, field = path.rpartition("__")
        setattr(getattr(config, part) if part else config, field, value)
    return config


def text(seed: int, length: int, shape: Shape | None = None) -> Tensor:
    """Hidden states ``[length, hidden]`` of a text."""
    shape = shape or Shape()
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, shape.hidden, generator=generator).to(shape.dtype)


@dataclass(frozen=True)
class Row:
    """A row of a step: the tokens ``start:stop`` of a text, those before come from the KV cache.

    ``ids`` are the token ids of the text if they are known, ``tenant`` is whose it is."""

    text: Tensor
    start: int
    stop: int
    ids: np.ndarray | None = None
    tenant: str | None = SHARED_TENANT

    @property
    def whole(self) -> bool:
        return (self.start, self.stop) == (0, len(self.text))


def whole(rows: Tensor, ids: np.ndarray | None = None, tenant: str | None = SHARED_TENANT) -> Row:
    return Row(rows, 0, len(rows), ids, tenant)


def metadata_of(rows: Sequence[Row], padding: int = 0) -> Any:
    return batch(
        [row.stop - row.start for row in rows],
        [row.stop for row in rows],
        [Prompt(len(row.text), row.ids, row.tenant) for row in rows],
        padding,
    )


@contextmanager
def step_of(layers: Iterable[Any], rows: Sequence[Row], padding: int = 0) -> Iterator[Any]:
    """A forward context as vLLM sets one up for a step, all layers with the same metadata."""
    named = {layer.layer_name: layer for layer in layers}
    metadata = metadata_of(rows, padding)
    context = ForwardContext(
        no_compile_layers=named,
        attn_metadata=dict.fromkeys(named, metadata),
        slot_mapping=dict.fromkeys(named, metadata.common.slot_mapping),
    )
    with override_forward_context(context):
        yield metadata


def inputs_of(rows: Sequence[Row], padding: int = 0) -> Tensor:
    """Hidden states of a step."""
    tokens = [row.text[row.start : row.stop] for row in rows]
    return torch.cat([*tokens, torch.full_like(rows[0].text[:1], 7.0).expand(padding, -1)])


def run(module: LlamaAttention, rows: Sequence[Row], padding: int = 0) -> Tensor:
    """The answer of one module to a step."""
    with step_of([module.attn], rows, padding) as metadata:
        return call(module, inputs_of(rows, padding), metadata.common.positions)


def run_model(model: Decoder, rows: Sequence[Row]) -> Tensor:
    """The answer of a whole model to a step."""
    modules: Any = [layer.self_attn for layer in model.model.layers]
    with step_of([module.attn for module in modules], rows) as metadata:
        states = inputs_of(rows)
        for module in modules:
            states = states + call(module, states, metadata.common.positions)
        return states


def call(module: LlamaAttention, hidden_states: Tensor, positions: Tensor) -> Tensor:
    """As the layer around a module of its kind does."""
    answer: Tensor
    match module:
        case BertAttention():
            answer = module(hidden_states)
        case ModernAttention():
            answer = module(hidden_states, position_ids=positions)
        case _:
            answer = module(positions=positions, hidden_states=hidden_states)
    return answer
