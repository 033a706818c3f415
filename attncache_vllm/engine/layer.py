# SPDX-License-Identifier: Apache-2.0
"""One attention layer with reuse: hits by ``map . V``, misses by vLLM itself.

There are two places to step in, and a layer has one of them. Around the module a hit skips the
projection to queries and keys as well; inside, in place of the backend's attention, it skips QK^T
and softmax only, which works for any module and leaves the KV cache as vLLM would.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F

from attncache_vllm.engine import compat
from attncache_vllm.engine.modules import AttentionModule
from attncache_vllm.reuse.apply import RowBlocks, apply_map

if TYPE_CHECKING:
    from attncache_vllm.engine.backend import Exact
    from attncache_vllm.engine.step import Split, Step


class Steps(Protocol):
    """Where a layer finds the step whose forward pass is running."""

    def current(self) -> Step | None: ...


class ExactModule:
    """The module's own forward as the model defines it."""

    def __init__(self, found: AttentionModule) -> None:
        assert found.inputs is not None
        self._inputs = found.inputs
        self._forward = found.module.forward

    def __call__(self, hidden_states: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        given: dict[str, Any] = {self._inputs.hidden: hidden_states}
        if self._inputs.positions is not None:
            given[self._inputs.positions] = positions
        output: torch.Tensor = self._forward(**given)
        return output


class ValueProjection:
    """The V rows of the projection to queries, keys and values: ``[T, hidden] -> [T, KV, d]``.

    The rows are copied, because CPU linear layers repack and drop the original weight.
    """

    def __init__(self, found: AttentionModule) -> None:
        attention, qkv_proj = found.attention, found.qkv_proj
        assert qkv_proj is not None
        self._heads, self._head_size = attention.num_kv_heads, attention.head_size
        rows = self._heads * self._head_size
        self.weight = qkv_proj.weight.data[-rows:].clone()
        self.bias = None if qkv_proj.bias is None else qkv_proj.bias.data[-rows:].clone()

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        value = F.linear(hidden_states, self.weight, self.bias)
        return value.view(-1, self._heads, self._head_size)


class MapAnswer:
    """A module's answer from maps: V rows, ``map . V``, output projection if it has one."""

    def __init__(self, found: AttentionModule) -> None:
        self._value = ValueProjection(found)
        self._output_proj = found.output_proj
        self._heads_size = found.attention.num_heads * found.attention.head_size

    def __call__(
        self, maps: list[tuple[RowBlocks, int, int]], hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Answer ``[T, hidden]`` for ``hidden_states`` ``[T, hidden]``; each map serves the tokens
        from its start to its stop, and together they serve all."""
        value = self._value(hidden_states)
        heads = torch.empty(len(value), self._heads_size, dtype=value.dtype, device=value.device)
        for blocks, start, stop in maps:
            apply_map(blocks, value[start:stop], heads[start:stop])
        if self._output_proj is None:
            return heads
        output: torch.Tensor = self._output_proj(heads)[0]
        return output


class ReuseModule:
    """Stands around an attention module.

    A hit costs its V rows, ``map . V`` and the output projection; no q, no k, no rotary embedding,
    no KV write, no QK^T and no softmax (AttnCache, arXiv 2510.25979, section 3). Everything else
    goes through the module's own forward, so norms and rotary embedding stay the model's.
    """

    def __init__(self, found: AttentionModule, steps: Steps) -> None:
        self._index = found.index
        self._name = found.name
        self._exact = ExactModule(found)
        self._answer = MapAnswer(found)
        self._steps = steps

    def forward(self, hidden_states: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        step = self._steps.current()
        maps = step.maps_for(self._index) if step is not None else {}
        if step is None or not maps:
            return self._exact(hidden_states, positions)
        split = step.split(self._name, tuple(maps))
        reused = self._answer(_packed(split, maps), hidden_states[split.hit_tokens])
        if split.misses is None and len(reused) == len(hidden_states):
            return reused
        output = torch.zeros_like(hidden_states)
        output[split.hit_tokens] = reused
        if split.misses is not None:
            tokens = split.misses.tokens
            with compat.sub_batch(self._name, split.misses.attn_metadata):
                output[tokens] = self._exact(
                    hidden_states[tokens], positions[tokens] if positions is not None else None
                )
        return output


class ReuseScores:
    """Stands in place of the standard backend's attention of one layer.

    Queries, keys and values are computed and the KV cache is written as ever, because the module
    or its engine leaves no choice. A hit skips QK^T and softmax.
    """

    def __init__(self, found: AttentionModule, steps: Steps) -> None:
        self._index = found.index
        self._name = found.name
        self._steps = steps

    def attend(
        self,
        exact: Exact,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
    ) -> None:
        """See :class:`attncache_vllm.engine.backend.ScoresTreatment`."""
        step = self._steps.current()
        maps = step.maps_for(self._index) if step is not None else {}
        if step is None or not maps:
            exact(query, key, value, attn_metadata, output)
            return
        split = step.split(self._name, tuple(maps))
        for row, start, stop in split.hit_spans:
            apply_map(maps[row], value[start:stop], output[start:stop].flatten(1))
        if split.misses is not None:
            tokens = split.misses.tokens
            rest = output.new_empty(len(tokens), *output.shape[1:])
            exact(query[tokens], key[tokens], value[tokens], split.misses.attn_metadata, rest)
            output[tokens] = rest


def _packed(split: Split, maps: dict[int, RowBlocks]) -> list[tuple[RowBlocks, int, int]]:
    """The hits' maps and spans when their tokens lie side by side."""
    packed, filled = [], 0
    for row, start, stop in split.hit_spans:
        packed.append((maps[row], filled, filled + stop - start))
        filled += stop - start
    return packed
