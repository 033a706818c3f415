# SPDX-License-Identifier: Apache-2.0
"""What one engine's worker holds for serving, and what becomes of each sequence."""

from __future__ import annotations

import time
from concurrent.futures import Future

import torch

from attncache_vllm.config import Settings
from attncache_vllm.engine import compat, metrics
from attncache_vllm.engine.canary import Canaries
from attncache_vllm.engine.lookups import Lookups
from attncache_vllm.engine.step import (
    Decision,
    Hit,
    Sequence,
    Served,
    Step,
    prompts_of,
    template_hit,
)
from attncache_vllm.reuse.feature import pool_tokens
from attncache_vllm.reuse.template import Templates

logger = compat.get_logger(__name__)

_STEP = "attncache"


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
    ) -> None:
        """``lookups`` is None if the plan has templates only; ``groups`` is the number of KV
        groups of all layers together."""
        self._lookups = lookups
        self._templates = templates
        self._canaries = canaries
        self._settings = settings
        self._slots = slots
        self._feature_layer_name = feature_layer_name
        self._groups = groups
        self.outcomes = metrics.Outcomes(settings.log_interval_s)

    def observe(self, hidden_states: torch.Tensor) -> None:
        """Begin a step from the feature layer's input ``[T, hidden]``."""
        attn_metadata = compat.layer_metadata(self._feature_layer_name)
        source = compat.metadata_source(attn_metadata)
        if source is None:
            return  # profiling or warm-up
        self.outcomes.log(logger)
        compat.forward_context().additional_kwargs[_STEP] = self._begin(source, hidden_states)

    def current(self) -> Step | None:
        """The step of the forward pass that is running; None while profiling or warming up."""
        step: Step | None = compat.forward_context().additional_kwargs.get(_STEP)
        return step

    def compare(
        self, layer: int, served: Served, reused: torch.Tensor, exact: torch.Tensor
    ) -> None:
        """Take note of a canary in a layer: served heads ``[T, n * d]``, reused and exact."""
        self._canaries.note(layer, served.source, reused, exact)

    def _begin(self, source: compat.MetadataSource, hidden_states: torch.Tensor) -> Step:
        prompts = prompts_of(source)
        self.outcomes.bypass("only a part of the prompt in the step", prompts.ending)
        eligible = [seq for seq in prompts.whole if seq.length >= self._settings.min_tokens]
        short = [seq for seq in prompts.whole if seq.length < self._settings.min_tokens]
        self.outcomes.bypass("shorter than min_tokens", len(short))
        metrics.MAP_ROWS.labels("computed").inc(self._groups * sum(seq.length for seq in short))
        deadline = time.monotonic() + self._settings.lookup_deadline_ms / 1e3
        lookup, reason = None, None
        if self._lookups is not None and eligible:
            lookup = self._start_lookup(self._lookups, eligible, hidden_states, deadline)
            reason = "lookup still running" if lookup is None else None
        return Step(eligible, lookup, deadline, self._decide, self._canaries.tripped, reason)

    def _start_lookup(
        self,
        lookups: Lookups,
        sequences: list[Sequence],
        hidden_states: torch.Tensor,
        deadline: float,
    ) -> Future[list[Hit | None]] | None:
        pooled = None
        if lookups.uses_features:
            inputs = [hidden_states[seq.start : seq.start + seq.length] for seq in sequences]
            pooled = torch.stack([pool_tokens(tokens, self._slots) for tokens in inputs])
            # Rounded as a store keeps them, so that a recorded text finds itself at distance 0.
            pooled = pooled.to("cpu", torch.float16).float()
        return lookups.start(sequences, pooled, deadline)

    def _decide(
        self, sequences: list[Sequence], found: list[Hit | None], reason: str | None
    ) -> Decision:
        hits, canaries = {}, {}
        for sequence, match in zip(sequences, found, strict=True):
            hit = match or template_hit(self._templates, sequence.length)
            reused = 0
            if hit is None:
                self.outcomes.miss(reason or "nothing close enough", 1)
            elif self._canaries.draw():
                canaries[sequence.row] = hit
                self.outcomes.canary(hit.source)
            else:
                hits[sequence.row] = hit
                self.outcomes.hit(hit.source)
                reused = self._rows_reused(hit, sequence.length)
            metrics.MAP_ROWS.labels("reused").inc(reused)
            metrics.MAP_ROWS.labels("computed").inc(self._groups * sequence.length - reused)
        return Decision(hits, canaries)

    def _rows_reused(self, hit: Hit, length: int) -> int:
        return sum(
            served.rows_reused(length)
            for layer, served in hit.served.items()
            if not self._canaries.tripped(layer, served.source)
        )
