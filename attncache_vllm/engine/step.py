# SPDX-License-Identifier: Apache-2.0
"""One engine step: which sequences it holds, what was found for them, how it splits."""

from __future__ import annotations

import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from attncache_vllm.engine import compat, metrics
from attncache_vllm.errors import StoreTimeout
from attncache_vllm.reuse.apply import RowBlocks
from attncache_vllm.reuse.match import Match
from attncache_vllm.reuse.plan import Plan


@dataclass(frozen=True)
class Sequence:
    """One whole sequence of the batch: row of the batch and its token range."""

    row: int
    start: int
    length: int


@dataclass(frozen=True)
class Hit:
    """A match with its maps, decoded and in memory. ``maps`` is keyed by layer."""

    match: Match
    maps: dict[int, RowBlocks]


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
    nothing); ``hit_spans`` gives ``(row, start, stop)`` among the selected tokens.
    """

    hit_tokens: slice | torch.Tensor
    hit_spans: tuple[tuple[int, int, int], ...]
    misses: Misses | None


def sequences_of(source: compat.MetadataSource) -> tuple[list[Sequence], list[int]]:
    """Whole sequences of the batch, and the rows of those of which the step holds only a part."""
    starts = source.common.query_start_loc_cpu.tolist()
    context = source.common.seq_lens_cpu_upper_bound
    lengths = (context if context is not None else source.common.seq_lens).tolist()
    whole, partial = [], []
    for row, (start, stop) in enumerate(pairwise(starts)):
        if stop - start == lengths[row] > 0:
            whole.append(Sequence(row, start, stop - start))
        elif stop > start:
            partial.append(row)
    return whole, partial


class Step:
    """State of one forward pass, from the feature layer to the last layer with reuse."""

    def __init__(
        self,
        plan: Plan,
        sequences: list[Sequence],
        lookup: Future[list[Hit | None]] | None,
        deadline: float,
        outcomes: metrics.Outcomes,
    ) -> None:
        """``sequences`` are those looked up, in the order of ``lookup``'s result; ``deadline`` is
        an instant of ``time.monotonic()``."""
        self._plan = plan
        self._sequences = sequences
        self._lookup = lookup
        self._deadline = deadline
        self._outcomes = outcomes
        self._hits: dict[int, Hit] | None = None
        self._splits: dict[tuple[int, tuple[int, ...]], Split] = {}

    def maps_for(self, layer: int) -> dict[int, RowBlocks]:
        """Maps that this layer reuses, by row of the batch. The first call awaits the lookup."""
        if self._hits is None:
            self._hits = self._await_lookup()
        gate = self._plan.layers[layer].max_distance
        return {
            row: hit.maps[layer]
            for row, hit in self._hits.items()
            if layer in hit.maps and hit.match.distance <= gate
        }

    def split(self, layer_name: str, hit_rows: tuple[int, ...]) -> Split:
        """Part the batch; layers that share metadata and hits share the result."""
        attn_metadata = compat.layer_metadata(layer_name)
        key = (id(attn_metadata), hit_rows)
        if key not in self._splits:
            source = compat.metadata_source(attn_metadata)
            assert source is not None
            self._splits[key] = split_batch(source, set(hit_rows))
        return self._splits[key]

    def _await_lookup(self) -> dict[int, Hit]:
        if self._lookup is None:
            return {}
        started = time.monotonic()
        try:
            found = self._lookup.result(timeout=max(0.0, self._deadline - started))
        except FutureTimeout:
            self._outcomes.miss("late", len(self._sequences))
            return {}
        except Exception as error:  # a request never fails because of the cache
            reason = "late" if isinstance(error, StoreTimeout) else "store fault"
            self._outcomes.miss(reason, len(self._sequences))
            return {}
        finally:
            metrics.WAIT_SECONDS.observe(time.monotonic() - started)
        hits = {
            seq.row: hit for seq, hit in zip(self._sequences, found, strict=True) if hit is not None
        }
        self._outcomes.hit(len(hits))
        self._outcomes.miss("nothing close enough", len(found) - len(hits))
        return hits


def split_batch(source: compat.MetadataSource, hit_rows: set[int]) -> Split:
    """Part a batch into the rows in ``hit_rows`` and the rest."""
    starts = source.common.query_start_loc_cpu.tolist()
    spans = [(row, *span) for row, span in enumerate(pairwise(starts))]
    hits = [span for span in spans if span[0] in hit_rows]
    rest = [span for span in spans if span[0] not in hit_rows and span[2] > span[1]]

    hit_spans, filled = [], 0
    for row, start, stop in hits:
        hit_spans.append((row, filled, filled + stop - start))
        filled += stop - start
    device = source.common.seq_lens.device
    contiguous = hits[-1][2] - hits[0][1] == filled
    hit_tokens = slice(hits[0][1], hits[-1][2]) if contiguous else _tokens(hits, device)
    misses = None
    if rest:
        tokens = _tokens(rest, device)
        metadata = compat.build_sub_metadata(source, [row for row, _, _ in rest], tokens)
        misses = Misses(tokens, metadata)
    return Split(hit_tokens, tuple(hit_spans), misses)


def _tokens(spans: list[tuple[int, int, int]], device: torch.device) -> torch.Tensor:
    return torch.cat([torch.arange(start, stop) for _, start, stop in spans]).to(device)
