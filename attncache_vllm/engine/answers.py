# SPDX-License-Identifier: Apache-2.0
"""What a hit's attention module answers: V rows, ``map . V`` and the output projection, and beside
them, where maps serve a part of the heads, queries and keys of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from attncache_vllm.engine import compat
from attncache_vllm.engine.modules import AttentionModule
from attncache_vllm.reuse.apply import apply_map
from attncache_vllm.reuse.correct import Correction
from attncache_vllm.reuse.maps import AttentionMap, kv_index

logger = compat.get_logger(__name__)

# Each serves the tokens from its start to its stop; together they serve all.
Maps = Sequence[tuple[AttentionMap, int, int]]
# The standard backend's metadata of the same tokens, for so many query and KV heads.
MetadataOf = Callable[[int, int], Any]

# The other heads, computed apart and among all: sums of the same products, which kernels may add up
# in another order and round to bfloat16.
PARITY_TOLERANCE = 0.02


class Answer(Protocol):
    """What stands for a module's forward on sequences that maps serve.

    ``groups`` are the KV groups that the maps must hold.
    """

    groups: tuple[int, ...]

    def fits(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor | None,
        metadata_of: MetadataOf,
    ) -> bool:
        """Whether the module can be stood for; ``hidden_states`` ``[T, hidden]`` are any of its."""
        ...

    def __call__(
        self,
        maps: Maps,
        hidden_states: torch.Tensor,
        positions: torch.Tensor | None,
        metadata_of: MetadataOf,
    ) -> torch.Tensor:
        """Answer ``[T, hidden]`` for ``hidden_states`` ``[T, hidden]``."""
        ...


class ValueProjection:
    """The V rows of the projection to queries, keys and values: ``[T, hidden] -> [T, KV, d]``.

    The rows are copied, because CPU linear layers repack and drop the original weight.
    """

    def __init__(self, found: AttentionModule) -> None:
        attention = found.attention
        self._heads, self._head_size = attention.num_kv_heads, attention.head_size
        self._linear = _rows_of(found, slice(-self._heads * self._head_size, None))

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self._linear(hidden_states).view(-1, self._heads, self._head_size)


class OutputProjection:
    """From the heads ``[T, H * d]`` to the module's answer ``[T, hidden]``, after a correction if
    there is one: folded into the weight where that is a plain matrix."""

    def __init__(self, found: AttentionModule, correction: Correction | None = None) -> None:
        self._module = found.output_proj
        self._correction = correction
        self._folded: compat.Linear | None = None
        if correction is not None and self._module is not None and found.folds_into_output:
            weight, bias = self._module.weight.data, self._module.bias
            folded = correction.folded(weight, None if bias is None else bias.data)
            self._folded = compat.linear(*folded)

    def __call__(self, heads: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """``value`` are the tokens' own values ``[T, KV, d]``."""
        if self._folded is not None:
            return self._folded(torch.cat([heads, value.flatten(1)], 1))
        if self._correction is not None:
            self._correction.apply_(heads, value)
        if self._module is None:
            return heads
        output: torch.Tensor = self._module(heads)[0]
        return output


class MapAnswer:
    """From maps of all heads: V rows, ``map . V``, output projection if the module has one."""

    def __init__(
        self,
        found: AttentionModule,
        value: ValueProjection,
        correction: Correction | None = None,
    ) -> None:
        self.groups = tuple(range(found.attention.num_kv_heads))
        self._value = value
        self._output = OutputProjection(found, correction)
        self._heads_size = found.attention.num_heads * found.attention.head_size

    def fits(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor | None,
        metadata_of: MetadataOf,
    ) -> bool:
        """Always: recording checks that the module does no more than this."""
        return True

    def __call__(
        self,
        maps: Maps,
        hidden_states: torch.Tensor,
        positions: torch.Tensor | None,
        metadata_of: MetadataOf | None = None,
    ) -> torch.Tensor:
        """See :class:`Answer`."""
        value = self._value(hidden_states)
        heads = value.new_empty(len(value), self._heads_size)
        for blocks, start, stop in maps:
            apply_map(blocks, value[start:stop], heads[start:stop])
        return self._output(heads, value)


class PartialAnswer:
    """From maps of some KV groups: queries, keys and attention of the others are computed.

    The module's own forward does it, so that norms and rotary embedding stay the model's, and the
    standard backend's kernel. It runs on a copy of the module that has the other heads only, with a
    projection to their queries and keys; :meth:`fits` tries whether the copy computes what the
    module does.
    """

    def __init__(
        self, found: AttentionModule, groups: tuple[int, ...], correction: Correction | None = None
    ) -> None:
        """``groups`` are the KV groups that maps serve: some of the layer's, not all. The layer is
        one that can leave out heads (:func:`compat.can_leave_out_heads`)."""
        attention, layout = found.attention, found.layout
        self.groups = groups
        self._found = found
        self._layout = layout
        self._head_size, self._kv_heads = attention.head_size, attention.num_kv_heads
        self._rest = [kv for kv in range(self._kv_heads) if kv not in groups]
        heads = [kv * layout.group + n for kv in self._rest for n in range(layout.group)]
        self._rest_heads = heads
        first_key, first_value = layout.num_heads, layout.num_heads + layout.num_kv_heads
        rows = [
            *heads,
            *(first_key + kv for kv in self._rest),
            *range(first_value, first_value + layout.num_kv_heads),
        ]
        size = self._head_size
        picked = torch.tensor([row * size + n for row in rows for n in range(size)])
        self._linear = _rows_of(found, picked)
        self._output = OutputProjection(found, correction)
        self._module = self._copy(self._project, self._attend, self._project_back)
        self._fits: bool | None = None
        # Of the call that is running.
        self._maps: Maps = ()
        self._metadata: Any = None
        self._value: torch.Tensor | None = None

    def __call__(
        self,
        maps: Maps,
        hidden_states: torch.Tensor,
        positions: torch.Tensor | None,
        metadata_of: MetadataOf,
    ) -> torch.Tensor:
        """See :class:`Answer`."""
        self._maps, self._metadata = maps, metadata_of(len(self._rest_heads), len(self._rest))
        answer = self._run(self._module, hidden_states, positions)
        if self._found.output_proj is None:
            answer, _ = self._project_back(answer)
        self._maps, self._metadata, self._value = (), None, None
        return answer

    def fits(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor | None,
        metadata_of: MetadataOf,
    ) -> bool:
        """Whether the copy's heads are what those of the module are; tried once."""
        if self._fits is None:
            self._fits = self._try(hidden_states, positions, metadata_of)
        return self._fits

    def _try(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor | None,
        metadata_of: MetadataOf,
    ) -> bool:
        def pass_on(heads: torch.Tensor) -> tuple[torch.Tensor, None]:
            return heads, None

        def exactly(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            metadata = metadata_of(self._layout.num_heads, self._kv_heads)
            return self._exactly(query, key, self._by_head(value), metadata)

        self._metadata = metadata_of(len(self._rest_heads), len(self._rest))
        source = compat.metadata_source(self._metadata)
        assert source is not None
        part = self._copy(self._project, self._attend, pass_on)
        try:
            own = self._run(part, hidden_states, positions)
            # After it: it leaves the KV cache as the module would.
            of_all = self._run(self._copy(None, exactly, pass_on), hidden_states, positions)
        except Exception as error:
            # The copy is an attempt: whatever a model's forward makes of it, the module is there.
            problem = f"{type(error).__name__}: {error}"
        else:
            tokens = source.common.num_actual_tokens
            a, b = (self._by_head(x)[:tokens, self._rest_heads].float() for x in (of_all, own))
            difference = ((a - b).norm() / a.norm()).item()
            if difference <= PARITY_TOLERANCE:
                return True
            problem = f"relative error {difference:.3g} of the others"
        finally:
            self._metadata, self._value = None, None
        logger.warning(
            "attncache: layer %d computes all heads where maps serve a part: %s",
            self._found.index,
            problem,
        )
        return False

    def _copy(
        self,
        project: compat.Forward | None,
        attend: compat.Forward,
        project_back: compat.Forward,
    ) -> torch.nn.Module:
        """A copy of the module with these in place of its children: one with the heads that are
        computed, or, with its own projection, one with all."""
        found, size = self._found, self._head_size
        children = [(found.attention, attend), (found.output_proj, project_back)]
        sizes: dict[str, tuple[int, int]] = {}
        if project is not None:
            children.append((found.qkv_proj, project))
            queries = self._layout.num_heads, len(self._rest_heads)
            keys = self._kv_heads, len(self._rest)
            sizes = {
                "num_heads": queries,
                "num_kv_heads": keys,
                "q_size": (queries[0] * size, queries[1] * size),
                "kv_size": (keys[0] * size, keys[1] * size),
            }
        return compat.copy_of(found.module, children, sizes)

    def _run(
        self,
        module: torch.nn.Module,
        hidden_states: torch.Tensor,
        positions: torch.Tensor | None,
    ) -> torch.Tensor:
        inputs = self._found.inputs
        assert inputs is not None
        given: dict[str, Any] = {inputs.hidden: hidden_states}
        if inputs.positions is not None:
            given[inputs.positions] = positions
        answer: torch.Tensor = module.forward(**given)
        return answer

    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Queries, keys and values of the heads that are computed; the values of all are kept."""
        projected = self._linear(hidden_states)
        own = (len(self._rest_heads) + 2 * len(self._rest)) * self._head_size
        values = projected[:, -self._kv_heads * self._head_size :]
        self._value = values.view(len(values), self._kv_heads, self._head_size)
        # What stands for their values is of the right shape, and not looked at.
        return projected[:, :own], None

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The heads ``[T, H * d]``."""
        assert self._value is not None
        tokens, group = len(query), self._layout.group
        heads = query.new_empty(tokens, self._layout.num_heads * self._head_size)
        rest = kv_index(tuple(self._rest))
        exact = self._exactly(query, key, self._value[:, rest], self._metadata)
        by_group = heads.view(tokens, self._kv_heads, group, self._head_size)
        by_group[:, rest] = exact.view(tokens, -1, group, self._head_size)
        for maps, start, stop in self._maps:
            apply_map(maps, self._value[start:stop], heads[start:stop])
        return heads

    def _exactly(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, metadata: Any
    ) -> torch.Tensor:
        """Attention ``[T, h * d]`` of ``[T, h * d]``, ``[T, n * d]`` and ``[T, n, d]``."""
        query, key = self._by_head(query), self._by_head(key)
        attention = self._found.attention
        return compat.attend_some_heads(attention, query, key, value, metadata).flatten(1)

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(x), -1, self._head_size)

    def _project_back(self, heads: torch.Tensor) -> tuple[torch.Tensor, None]:
        assert self._value is not None
        return self._output(heads, self._value), None


def _rows_of(found: AttentionModule, rows: slice | torch.Tensor) -> compat.Linear:
    """The linear layer that some rows of the projection to queries, keys and values are."""
    qkv_proj = found.qkv_proj
    assert qkv_proj is not None
    weight, bias = qkv_proj.weight.data, qkv_proj.bias
    return compat.linear(weight[rows].clone(), None if bias is None else bias.data[rows].clone())
