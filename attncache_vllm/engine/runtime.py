# SPDX-License-Identifier: Apache-2.0
"""What one engine's worker holds for serving, and what becomes of each sequence."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from attncache_vllm.config import Settings
from attncache_vllm.engine import compat, metrics
from attncache_vllm.engine.admit import Admissions
from attncache_vllm.engine.canary import Canaries
from attncache_vllm.engine.costs import Costs, Manner
from attncache_vllm.engine.lookups import Lookups
from attncache_vllm.engine.step import (
    Choose,
    Decision,
    Hit,
    Recording,
    Sequence,
    Served,
    Step,
    in_layer,
    prompts_of,
    template_hit,
)
from attncache_vllm.reuse.feature import pool_tokens
from attncache_vllm.reuse.plan import Source
from attncache_vllm.reuse.template import Templates
from attncache_vllm.tenants import SHARED_TENANT

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = compat.get_logger(__name__)

_STEP = "attncache"


def serving_of(vllm_config: VllmConfig) -> Serving | None:
    """What the engine of this process holds for serving; None if its backend is another."""
    for layer in vllm_config.compilation_config.static_forward_context.values():
        holder = getattr(getattr(layer, "attncache_observer", None), "__self__", None)
        if isinstance(holder, Serving):
            return holder
    return None


class Serving:
    """Observes the feature layer, starts the lookup and hands each layer the current step."""

    def __init__(
        self,
        lookups: Lookups | None,
        templates: Templates,
        canaries: Canaries,
        settings: Settings,
        slots: int,
        feature_layer_name: str,
        groups: int,
        sources: tuple[Source, ...],
        admissions: Admissions | None = None,
    ) -> None:
        """``lookups`` is None if the plan has templates only; ``groups`` is the number of KV
        groups of all layers together, ``sources`` are those of the plan; ``admissions`` is None if
        no missed sequence is recorded."""
        self._lookups = lookups
        self.templates = templates
        self._canaries = canaries
        self._settings = settings
        self._slots = slots
        self._feature_layer_name = feature_layer_name
        self._groups = groups
        self.admissions = admissions
        self._manners: tuple[Manner, ...] = sources
        if {"aligned", "prefix"} & set(sources):
            self._manners = (*sources, "own")
        self._pretended: Step | None = None
        self.costs = Costs({})
        self.outcomes = metrics.Outcomes(settings.log_interval_s)

    def observe(self, hidden_states: torch.Tensor) -> None:
        """Begin a step from the feature layer's input ``[T, hidden]``."""
        if self._pretended is not None:
            return
        attn_metadata = compat.layer_metadata(self._feature_layer_name)
        source = compat.metadata_source(attn_metadata)
        if source is None:
            return  # profiling or warm-up
        self.outcomes.log(logger)
        compat.forward_context().additional_kwargs[_STEP] = self._begin(source, hidden_states)

    def current(self) -> Step | None:
        """The step of the forward pass that is running; None while profiling or warming up."""
        if self._pretended is not None:
            return self._pretended
        step: Step | None = compat.forward_context().additional_kwargs.get(_STEP)
        return step

    def compare(
        self, layer: int, served: Served, reused: torch.Tensor, exact: torch.Tensor
    ) -> None:
        """Take note of a canary in a layer: served heads ``[T, n * d]``, reused and exact."""
        self._canaries.note(layer, served.source, reused, exact)

    @contextmanager
    def pretending(self, step: Step) -> Iterator[None]:
        """Give layers this step, whatever is running."""
        self._pretended = step
        try:
            yield
        finally:
            self._pretended = None

    def look_up_in_vain(self, length: int, hidden_size: int) -> None:
        """Look up a text that is like no other."""
        assert self._lookups is not None
        ids = np.random.default_rng().integers(-(2**31), -1, length, dtype=np.int32)
        sequence = Sequence(0, 0, length, ids, SHARED_TENANT)
        pooled = None
        if self._lookups.uses_features:
            pooled = torch.randn(1, self._slots, hidden_size)
        running = self._lookups.start([sequence], pooled, time.monotonic() + 60)
        assert running is not None
        running.result()

    def _begin(self, source: compat.MetadataSource, hidden_states: torch.Tensor) -> Step:
        prompts = prompts_of(source)
        self.outcomes.bypass("only a part of the prompt in the step", prompts.ending)
        refused = [seq for seq in prompts.whole if self._is_refused(seq)]
        eligible = [seq for seq in prompts.whole if not self._is_refused(seq)]
        self.outcomes.bypass("no cache_salt", len(refused))
        short = [seq for seq in eligible if seq.length < self._settings.min_tokens]
        eligible = [seq for seq in eligible if seq.length >= self._settings.min_tokens]
        self.outcomes.bypass("shorter than min_tokens", len(short))
        dear = [seq for seq in eligible if not self._may_pay(seq.length)]
        eligible = [seq for seq in eligible if self._may_pay(seq.length)]
        self.outcomes.bypass("reuse would not pay at its length", len(dear))
        computed = sum(seq.length for seq in (*refused, *short, *dear))
        metrics.MAP_ROWS.labels("computed").inc(self._groups * computed)
        deadline = time.monotonic() + self._settings.lookup_deadline_ms / 1e3
        lookup, reason, pooled = None, None, None
        looked_up = any(self._may_pay(seq.length, but="template") for seq in eligible)
        if self._lookups is not None and looked_up:
            records = self.admissions is not None and self.admissions.ready()
            if records or self._lookups.uses_features:
                pooled = self._pooled(eligible, hidden_states)
            wanted = pooled if self._lookups.uses_features else None
            lookup = self._lookups.start(eligible, wanted, deadline)
            pooled = pooled if records else None
            reason = "lookup still running" if lookup is None else None
        lengths = {sequence.row: sequence.length for sequence in eligible}
        choose = partial(self._choose, lengths, source.common.num_actual_tokens)
        decide = partial(self._decide, choose, pooled)
        return Step(eligible, lookup, deadline, decide, choose, reason)

    def _is_refused(self, sequence: Sequence) -> bool:
        """Whether it must have a tenant of its own, and has none."""
        return self._settings.unsalted == "off" and sequence.tenant == SHARED_TENANT

    def _may_pay(self, length: int, but: Manner | None = None) -> bool:
        """Whether any manner, ``but`` one, would be worth it."""
        return any(self.costs.worth(manner, length) for manner in self._manners if manner != but)

    def _choose(
        self, lengths: Mapping[int, int], tokens: int, layer: int, served: dict[int, Served]
    ) -> dict[int, Served]:
        """What serves a layer of a batch of ``tokens`` tokens, of what could, by row."""
        paying = {
            row: item
            for row, item in served.items()
            if not self._canaries.tripped(layer, item.source)
            and self.costs.pays(layer, item.manner, lengths[row])
        }
        asked = [(item.manner, lengths[row]) for row, item in paying.items()]
        return paying if self.costs.pays_in_batch(layer, asked, tokens) else {}

    def _pooled(self, sequences: list[Sequence], hidden_states: torch.Tensor) -> torch.Tensor:
        """The pooled feature inputs of sequences, float32 ``[B, slots, hidden]`` on the CPU."""
        inputs = [hidden_states[seq.start : seq.start + seq.length] for seq in sequences]
        pooled = torch.stack([pool_tokens(tokens, self._slots) for tokens in inputs])
        # Rounded as a store keeps them, so that a recorded text finds itself at distance 0.
        return pooled.to("cpu", torch.float16).float()

    def _decide(
        self,
        choose: Choose,
        pooled: torch.Tensor | None,
        sequences: list[Sequence],
        found: list[Hit | None],
        reason: str | None,
    ) -> Decision:
        """``pooled`` are the pooled feature inputs of the sequences if one of them may be
        recorded."""
        hits, canaries = {}, {}
        recording = None
        if pooled is not None and reason is None:
            recording = self._begin_recording(sequences, found, pooled)
        for sequence, match in zip(sequences, found, strict=True):
            if recording is not None and sequence is recording.sequence:
                self.outcomes.miss("recorded", 1)
                continue
            hit = self._worth(match, sequence.length) or self._worth(
                template_hit(self.templates, sequence.length), sequence.length
            )
            if hit is None:
                self.outcomes.miss(reason or "nothing close enough", 1)
            elif self._canaries.draw():
                canaries[sequence.row] = hit
                self.outcomes.canary(hit.source)
            else:
                hits[sequence.row] = hit
                self.outcomes.hit(hit.source)
        lengths = {sequence.row: sequence.length for sequence in sequences}
        reused = sum(
            item.rows_reused(lengths[row])
            for layer in {layer for hit in hits.values() for layer in hit.served}
            for row, item in choose(layer, in_layer(hits, layer)).items()
        )
        metrics.MAP_ROWS.labels("reused").inc(reused)
        metrics.MAP_ROWS.labels("computed").inc(self._groups * sum(lengths.values()) - reused)
        return Decision(hits, canaries, recording)

    def _begin_recording(
        self, sequences: list[Sequence], found: list[Hit | None], pooled: torch.Tensor
    ) -> Recording | None:
        """Begin to record the first sequence that no entry serves, and that one should."""
        assert self.admissions is not None
        for sequence, match, own in zip(sequences, found, pooled, strict=True):
            if match is None and self._may_pay(sequence.length, but="template"):
                recording = self.admissions.begin(sequence, own)
                if recording is not None:
                    return recording
        return None

    def _worth(self, hit: Hit | None, length: int) -> Hit | None:
        return hit if hit is not None and self.costs.worth(hit.manner, length) else None
