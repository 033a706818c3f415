# SPDX-License-Identifier: Apache-2.0
"""One attention layer with reuse: hits by ``map . V``, misses by vLLM itself.

There are two places to step in. Around the module a hit skips the projection to queries and keys as
well, for the heads that maps serve; inside, in place of the backend's attention, it skips QK^T and
softmax only, which works for any module and for a part of the rows, and leaves the KV cache as vLLM
would.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from attncache_vllm.engine import compat
from attncache_vllm.engine.answers import (
    Answer,
    MapAnswer,
    MetadataOf,
    PartialAnswer,
    ValueProjection,
)
from attncache_vllm.engine.modules import AttentionModule
from attncache_vllm.reuse.apply import apply_aligned, apply_map
from attncache_vllm.reuse.correct import Correction
from attncache_vllm.reuse.maps import AttentionMap
from attncache_vllm.reuse.plan import Source

if TYPE_CHECKING:
    from attncache_vllm.engine.backend import Exact
    from attncache_vllm.engine.step import Served, Split, Step


class Steps(Protocol):
    """Where a layer finds the step whose forward pass is running, and reports canaries."""

    def current(self) -> Step | None: ...

    def compare(
        self, layer: int, served: Served, reused: torch.Tensor, exact: torch.Tensor
    ) -> None: ...


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


class ReuseModule:
    """Stands around an attention module.

    A hit whose maps are those of all heads costs its V rows, ``map . V`` and the output projection;
    no q, no k, no rotary embedding, no KV write, no QK^T and no softmax (AttnCache,
    arXiv 2510.25979, section 3). With maps of some heads, the others pay all that for themselves.
    Everything else goes through the module's own forward, so norms and rotary embedding stay the
    model's, and on to the :class:`ReuseScores` inside.
    """

    def __init__(
        self,
        found: AttentionModule,
        steps: Steps,
        corrections: Mapping[Source, Correction],
        groups: Mapping[Source, tuple[int, ...]],
    ) -> None:
        """``groups`` are the KV groups that the maps of a source serve."""
        self._index = found.index
        self._name = found.name
        self._exact = ExactModule(found)
        self._answers: dict[Source, Answer] = {}
        value: ValueProjection | None = None  # one for all sources
        for source, served in groups.items():
            correction = corrections.get(source)
            if len(served) == found.attention.num_kv_heads:
                value = value or ValueProjection(found)
                self._answers[source] = MapAnswer(found, value, correction)
            elif compat.can_leave_out_heads(found.attention):
                self._answers[source] = PartialAnswer(found, served, correction)
        self._steps = steps

    def forward(self, hidden_states: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        step = self._steps.current()
        served = step.served(self._index) if step is not None else {}
        if step is None or not served:
            return self._exact(hidden_states, positions)
        attn_metadata = compat.layer_metadata(self._name)
        metadata_of = partial(step.metadata_of_heads, attn_metadata)
        around = {
            row: item
            for row, item in served.items()
            if self._serves(item, hidden_states, positions, partial(metadata_of, None))
        }
        if not around:
            return self._exact(hidden_states, positions)
        split = step.split(attn_metadata, tuple(around))
        output: torch.Tensor | None = None
        for source, tokens, spans in _by_source(split, around):
            reused = self._answers[source](
                _packed(spans, around),
                hidden_states[tokens],
                positions[tokens] if positions is not None else None,
                partial(metadata_of, tuple(row for row, _, _ in spans)),
            )
            if len(reused) == len(hidden_states):
                return reused
            output = torch.zeros_like(hidden_states) if output is None else output
            output[tokens] = reused
        assert output is not None
        if split.misses is not None:
            tokens = split.misses.tokens
            with compat.sub_batch(self._name, split.misses.attn_metadata):
                output[tokens] = self._exact(
                    hidden_states[tokens], positions[tokens] if positions is not None else None
                )
        return output

    def _serves(
        self,
        item: Served,
        hidden_states: torch.Tensor,
        positions: torch.Tensor | None,
        metadata_of: MetadataOf,
    ) -> bool:
        """Whether the sequence is answered here: else it is served inside."""
        answer = self._answers.get(item.source)
        return (
            answer is not None
            and item.alignment is None
            and item.maps.groups == answer.groups
            and answer.fits(hidden_states, positions, metadata_of)
        )


class ReuseScores:
    """Stands in place of the standard backend's attention of one layer.

    Queries, keys and values are computed and the KV cache is written as ever. The standard kernel
    runs on the sequences of which it has to compute a head; what maps serve is written over that.
    """

    def __init__(
        self, found: AttentionModule, steps: Steps, corrections: dict[Source, Correction]
    ) -> None:
        self._index = found.index
        self._scale = found.attention.impl.scale
        self._soft_cap = found.soft_cap
        self._steps = steps
        self._corrections = corrections

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
        source = compat.metadata_source(attn_metadata)
        if step is None or source is None:
            exact(query, key, value, attn_metadata, output)
            return
        served = _by_own_row(step.served(self._index), source)
        canaries = _by_own_row(step.canaries(self._index), source)
        # Rows of which every head is served need no kernel.
        complete = tuple(row for row, item in served.items() if item.all_heads)
        if not complete:
            exact(query, key, value, attn_metadata, output)
        else:
            split = step.split(attn_metadata, complete)
            if split.misses is not None:
                tokens = split.misses.tokens
                rest = output.new_empty(len(tokens), *output.shape[1:])
                exact(query[tokens], key[tokens], value[tokens], split.misses.attn_metadata, rest)
                output[tokens] = rest
        starts = source.common.query_start_loc_cpu.tolist()
        for row, item in served.items():
            span = slice(starts[row], starts[row + 1])
            self._serve(item, query[span], key[span], value[span], output[span])
        for row, item in canaries.items():
            span = slice(starts[row], starts[row + 1])
            reused = output[span].clone()
            self._serve(item, query[span], key[span], value[span], reused)
            heads = item.heads
            self._steps.compare(
                self._index, item, reused[:, heads].flatten(1), output[span][:, heads].flatten(1)
            )

    def _serve(
        self,
        item: Served,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Write the served heads of one sequence into ``output`` ``[L, H, d]``."""
        heads = output.flatten(1)
        if item.alignment is None:
            apply_map(item.maps, value, heads)
        else:
            apply_aligned(
                item.maps, item.alignment, query, key, value, self._scale, self._soft_cap, heads
            )
        if item.source in self._corrections:
            self._corrections[item.source].apply_(heads, value)


def _by_own_row(
    by_row_of_batch: dict[int, Served], source: compat.MetadataSource
) -> dict[int, Served]:
    """The same by the row of this, perhaps partial, batch; rows that it does not hold are gone."""
    return {
        row: by_row_of_batch[source.row_in_batch(row)]
        for row in range(source.common.num_reqs)
        if source.row_in_batch(row) in by_row_of_batch
    }


def _by_source(
    split: Split, served: dict[int, Served]
) -> Iterator[tuple[Source, slice | torch.Tensor, Sequence[tuple[int, int, int]]]]:
    """Hits by their source, each with tokens and spans: their corrections differ."""
    sources = sorted({item.source for item in served.values()})
    if len(sources) == 1:
        yield sources[0], split.hit_tokens, split.hit_spans
        return
    for source in sources:
        spans = [span for span in split.hit_spans if served[span[0]].source == source]
        yield source, torch.cat([torch.arange(start, stop) for _, start, stop in spans]), spans


def _packed(
    spans: Sequence[tuple[int, int, int]], served: dict[int, Served]
) -> list[tuple[AttentionMap, int, int]]:
    """The hits' maps and spans when their tokens lie side by side."""
    packed, filled = [], 0
    for row, start, stop in spans:
        packed.append((served[row].maps, filled, filled + stop - start))
        filled += stop - start
    return packed
