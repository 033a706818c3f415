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
    """A whole sequence in a batch: its row, the position of its first token, its length."""

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
        # Unknown prompt lengths: an engine that may part prompts is bypassed then.
        length = source.prompt_lengths[row] if source.prompt_lengths else context
        if stop - start == length == context > 0:
            whole.append(Sequence(row, start, length))
        elif source.prompt_lengths and computed < length <= context:
            ending += 1
    return Prompts(whole, ending)


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

    device = source.common.seq_lens.device
    contiguous = hits[-1][2] - hits[0][1] == sum(stop - start for _, start, stop in hits)
    hit_tokens = slice(hits[0][1], hits[-1][2]) if contiguous else _tokens(hits, device)
    misses = None
    if rest:
        tokens = _tokens(rest, device)
        metadata = compat.build_sub_metadata(source, [row for row, _, _ in rest], tokens)
        misses = Misses(tokens, metadata)
    return Split(hit_tokens, tuple(hits), misses)


def _tokens(spans: list[tuple[int, int, int]], device: torch.device) -> torch.Tensor:
    return torch.cat([torch.arange(start, stop) for _, start, stop in spans]).to(device)
