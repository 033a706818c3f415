# SPDX-License-Identifier: Apache-2.0
"""One engine step: which sequences it holds, what was found for them, how it splits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from attncache_vllm.engine import compat, metrics
from attncache_vllm.engine.costs import Manner
from attncache_vllm.errors import StoreTimeout
from attncache_vllm.reuse.align import Alignment
from attncache_vllm.reuse.maps import AttentionMap
from attncache_vllm.reuse.plan import Source
from attncache_vllm.reuse.template import Templates


@dataclass(frozen=True, eq=False)
class Sequence:
    """A whole sequence in a batch: its row, the position of its first token, its length, its token
    ids int32 ``[length]`` if they are known, and whose it is if that is."""

    row: int
    start: int
    length: int
    token_ids: np.ndarray | None = None
    tenant: str | None = None


@dataclass(frozen=True, eq=False)
class Served:
    """What serves a sequence in one layer.

    Attributes:
        source: where the map is from.
        maps: of the KV groups that the plan names, decoded and in memory.
        alignment: which stored row serves which row; None lays the map over the sequence from the
            left.
    """

    source: Source
    maps: AttentionMap
    alignment: Alignment | None = None

    @property
    def manner(self) -> Manner:
        """What its cost is known under."""
        own = self.source in ("aligned", "prefix") and self.alignment is None
        return "own" if own else self.source

    @property
    def all_heads(self) -> bool:
        """Whether every head of the layer is served."""
        return len(self.maps.groups) == self.maps.layout.num_kv_heads

    @property
    def heads(self) -> list[int]:
        """The query heads that are served."""
        size = self.maps.layout.group
        return [group * size + member for group in self.maps.groups for member in range(size)]

    def rows_reused(self, length: int) -> int:
        """Rows of the layer's maps that are not computed, over its KV groups."""
        rows = length if self.alignment is None else len(self.alignment.rows)
        return rows * len(self.maps.groups)


@dataclass(frozen=True, eq=False)
class Hit:
    """What serves a sequence: by layer, and the source it is counted under."""

    source: Source
    served: Mapping[int, Served]

    @property
    def manner(self) -> Manner:
        """What its saving is known under."""
        own = all(item.manner == "own" for item in self.served.values())
        return "own" if own else self.source


def in_layer(hits: Mapping[int, Hit], layer: int) -> dict[int, Served]:
    """What would serve hits in a layer, by row."""
    return {row: hit.served[layer] for row, hit in hits.items() if layer in hit.served}


def template_hit(templates: Templates, length: int) -> Hit | None:
    """What templates serve of a sequence of ``length`` tokens."""
    served = {
        layer: Served("template", maps)
        for layer in templates.layers
        if (maps := templates.get(layer, length)) is not None
    }
    return Hit("template", served) if served else None


@dataclass(frozen=True)
class Misses:
    """The sub-batch that is computed exactly.

    ``tokens`` is int64 ``[T']``, positions in the batch; ``attn_metadata`` is the standard
    backend's own metadata for these sequences.
    """

    tokens: torch.Tensor
    attn_metadata: Any


@dataclass(frozen=True)
class Split:
    """A batch parted into hits and misses.

    ``hit_tokens`` selects the hits' tokens (a slice when they are contiguous, which copies
    nothing); ``hit_spans`` gives ``(row, start, stop)`` in the batch, in its order.
    """

    hit_tokens: slice | torch.Tensor
    hit_spans: tuple[tuple[int, int, int], ...]
    misses: Misses | None


@dataclass(frozen=True)
class Prompts:
    """What a step holds of the prompts in its batch.

    Attributes:
        whole: sequences of which the step holds every token.
        ending: how many prompts end in this step of which earlier steps, or requests with the
            same prefix, have computed a part. Every prompt ends once, so counts of these and of
            ``whole`` count every prompt once.
    """

    whole: list[Sequence]
    ending: int


def prompts_of(source: compat.MetadataSource) -> Prompts:
    """The prompts of a batch. Rows that hold an earlier part of a prompt, or that generate, are in
    neither of the two."""
    starts = source.common.query_start_loc_cpu.tolist()
    contexts = compat.context_lengths(source.common).tolist()
    whole, ending = [], 0
    for row, (start, stop) in enumerate(pairwise(starts)):
        context, computed = contexts[row], contexts[row] - (stop - start)
        # Unknown prompts: an engine that may part them is bypassed then.
        prompt = source.prompts[row] if source.prompts else compat.Prompt(context)
        if stop - start == prompt.length == context > 0:
            whole.append(Sequence(row, start, context, prompt.token_ids, prompt.tenant))
        elif source.prompts and computed < prompt.length <= context:
            ending += 1
    return Prompts(whole, ending)


@dataclass(frozen=True, eq=False)
class Recording:
    """A sequence that is computed exactly to be admitted to the store.

    Attributes:
        sequence: its token ids and its tenant are known.
        pooled: its pooled feature input, float32 ``[slots, hidden]`` on the CPU.
        scores: by layer, copies of its queries ``[L, H, d]`` and keys ``[L, KV, d]``, after the
            position encoding, until the map is made.
        maps: by layer, encoded, uint8 ``[bytes]``.
    """

    sequence: Sequence
    pooled: torch.Tensor
    scores: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    maps: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """What becomes of the sequences of a step: ``hits`` are served, ``canaries`` are computed
    exactly and compared with what would have served them, both by row of the batch. One of those
    that are computed may be recorded."""

    hits: Mapping[int, Hit]
    canaries: Mapping[int, Hit]
    recording: Recording | None = None


# Of what the lookup found for each sequence and, if that is nothing for a reason of its own, the
# reason.
Decide = Callable[[list[Sequence], list[Hit | None], str | None], Decision]
# Which rows a layer takes from what would serve it: not all, where canaries or costs speak against.
Choose = Callable[[int, dict[int, Served]], dict[int, Served]]


class Step:
    """State of one forward pass, from the feature layer to the last layer with reuse."""

    def __init__(
        self,
        sequences: list[Sequence],
        lookup: Future[list[Hit | None]] | None,
        deadline: float,
        decide: Decide,
        choose: Choose,
        reason: str | None = None,
    ) -> None:
        """``lookup``'s result has the order of ``sequences``; None if nothing was looked up, for
        ``reason`` if it should have been. ``deadline`` is an instant of ``time.monotonic()``."""
        self._sequences = sequences
        self._lookup = lookup
        self._deadline = deadline
        self._decide = decide
        self._choose = choose
        self._reason = reason
        self._decision: Decision | None = None
        self._splits: dict[tuple[int, tuple[int, ...]], Split] = {}
        self._of_heads: dict[tuple[int, tuple[int, ...] | None, int, int], Any] = {}

    def served(self, layer: int) -> dict[int, Served]:
        """What serves the hits in this layer, by row. The first call awaits the lookup."""
        return self._in_layer(layer, self._decided().hits)

    def canaries(self, layer: int) -> dict[int, Served]:
        """What would have served the canaries in this layer, by row."""
        return self._in_layer(layer, self._decided().canaries)

    @property
    def recording(self) -> Recording | None:
        """The sequence that is recorded; None before a layer has asked what serves it."""
        return self._decision.recording if self._decision is not None else None

    def split(self, attn_metadata: Any, hit_rows: tuple[int, ...]) -> Split:
        """Part a batch; ``hit_rows`` are rows of its own. Layers that share metadata and hits
        share the result."""
        key = (id(attn_metadata), hit_rows)
        if key not in self._splits:
            source = compat.metadata_source(attn_metadata)
            assert source is not None
            self._splits[key] = split_batch(source, set(hit_rows))
        return self._splits[key]

    def metadata_of_heads(
        self, attn_metadata: Any, rows: tuple[int, ...] | None, num_heads: int, num_kv_heads: int
    ) -> Any:
        """Metadata of some rows of a batch, or all, for a layer with so many heads; shared by
        layers as the results of :meth:`split` are."""
        key = (id(attn_metadata), rows, num_heads, num_kv_heads)
        if key not in self._of_heads:
            source = compat.metadata_source(attn_metadata)
            assert source is not None
            if rows is not None and len(rows) < source.common.num_reqs:
                spans = [span for span in _spans(source) if span[0] in rows]
                tokens = _tokens(spans, source.common.seq_lens.device)
                source = compat.source_of_rows(source, rows, tokens)
            self._of_heads[key] = compat.metadata_of_heads(source, num_heads, num_kv_heads)
        return self._of_heads[key]

    def _in_layer(self, layer: int, hits: Mapping[int, Hit]) -> dict[int, Served]:
        found = in_layer(hits, layer)
        return self._choose(layer, found) if found else {}

    def _decided(self) -> Decision:
        if self._decision is None:
            found, reason = self._await_lookup()
            self._decision = self._decide(self._sequences, found, reason)
        return self._decision

    def _await_lookup(self) -> tuple[list[Hit | None], str | None]:
        nothing: list[Hit | None] = [None] * len(self._sequences)
        if self._lookup is None:
            return nothing, self._reason
        started = time.monotonic()
        try:
            return self._lookup.result(timeout=max(0.0, self._deadline - started)), None
        except FutureTimeout:
            return nothing, "late"
        except Exception as error:  # a request never fails because of the cache
            return nothing, "late" if isinstance(error, StoreTimeout) else "store fault"
        finally:
            metrics.WAIT_SECONDS.observe(time.monotonic() - started)


def split_batch(source: compat.MetadataSource, hit_rows: set[int]) -> Split:
    """Part a batch into the rows in ``hit_rows`` and the rest."""
    spans = _spans(source)
    hits = [span for span in spans if span[0] in hit_rows]
    rest = [span for span in spans if span[0] not in hit_rows and span[2] > span[1]]

    device = source.common.seq_lens.device
    contiguous = hits[-1][2] - hits[0][1] == sum(stop - start for _, start, stop in hits)
    hit_tokens = slice(hits[0][1], hits[-1][2]) if contiguous else _tokens(hits, device)
    misses = None
    if rest:
        tokens = _tokens(rest, device)
        part = compat.source_of_rows(source, [row for row, _, _ in rest], tokens)
        misses = Misses(tokens, compat.build_metadata(part))
    return Split(hit_tokens, tuple(hits), misses)


def _spans(source: compat.MetadataSource) -> list[tuple[int, int, int]]:
    """Row, start and stop of each sequence of a batch."""
    starts = source.common.query_start_loc_cpu.tolist()
    return [(row, start, stop) for row, (start, stop) in enumerate(pairwise(starts))]


def _tokens(spans: list[tuple[int, int, int]], device: torch.device) -> torch.Tensor:
    return torch.cat([torch.arange(start, stop) for _, start, stop in spans]).to(device)
