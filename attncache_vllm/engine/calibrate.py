# SPDX-License-Identifier: Apache-2.0
"""Calibration's side of the worker: the same attention as in serving, with what is served, fitted
or collected under the control of ``attncache calibrate``, which runs in the same process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from attncache_vllm.engine import compat
from attncache_vllm.engine.canary import relative_error
from attncache_vllm.engine.layer import ReuseScores
from attncache_vllm.engine.modules import AttentionModule
from attncache_vllm.engine.step import Decision, Hit, Sequence, Served, Step, prompts_of
from attncache_vllm.errors import AttnCacheError
from attncache_vllm.reuse.apply import exact_map
from attncache_vllm.reuse.correct import Correction, FitSums
from attncache_vllm.reuse.feature import pool_tokens
from attncache_vllm.reuse.layout import MapLayout
from attncache_vllm.reuse.plan import Source
from attncache_vllm.reuse.template import TemplateSums

if TYPE_CHECKING:
    from attncache_vllm.engine.backend import Exact

_STEP = "attncache"
# Ridge of the corrections, as a share of the mean squared output of the heads.
RIDGE = 0.01
# Every so many sequences one is held out of a fit, and decides whether the correction is kept.
HELD_OUT_EVERY = 5
# How much a row counts that a pooler reads alone: the answer is all its own, and hangs on the
# others by their keys and values only.
READ_COUNT = 20

HitOf = Callable[[Sequence], Hit | None]


class Calibrator:
    """What runs in place of every layer's attention kernel while a model is calibrated.

    Nothing is reused until the driver says so by one of the context managers.
    """

    def __init__(
        self, feature_layer_name: str, layers: list[AttentionModule], read_row: int | None
    ) -> None:
        """``read_row`` is the row that the model's pooler reads alone: 0, -1, or None."""
        self._feature_layer_name = feature_layer_name
        self._read_row = read_row
        self.layouts: dict[int, MapLayout] = {found.index: found.layout for found in layers}
        self.corrections: dict[int, dict[Source, Correction]] = {i: {} for i in self.layouts}
        self._hit_of: HitOf | None = None
        self._as_canaries = False
        self.sums: TemplateSums | None = None
        self._errors: dict[int, list[float]] = {}
        # Exact outputs of the heads of the sequences that corrections are fitted on.
        self._kept: dict[int, torch.Tensor] = {}
        self._keeping = False
        self._fitting: Source | None = None
        self.gains: dict[int, tuple[float, float]] = {}
        self._pooled: dict[bytes, torch.Tensor] = {}
        self._slots = 0

    # -- what the driver switches on ------------------------------------------------------------

    @contextmanager
    def summing(self, sums: TemplateSums) -> Iterator[None]:
        """Add the maps of every sequence to ``sums``."""
        self.sums = sums
        try:
            yield
        finally:
            self.sums = None

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep the exact outputs of the heads of the one step that runs meanwhile."""
        self._kept, self._keeping = {}, True
        try:
            yield
        finally:
            self._keeping = False

    @contextmanager
    def serving(self, hit_of: HitOf) -> Iterator[None]:
        """Serve what ``hit_of`` gives for a sequence, with the corrections in force."""
        self._hit_of = hit_of
        try:
            yield
        finally:
            self._hit_of = None

    def fitted(self, source: Source) -> dict[int, Correction]:
        """The corrections of ``source`` in force, by layer."""
        return {i: found[source] for i, found in self.corrections.items() if source in found}

    def correct(self, source: Source, corrections: Mapping[int, Correction]) -> None:
        """Put these corrections of ``source`` in force, as `fitted` gave them, and no others."""
        for layer, of_layer in self.corrections.items():
            of_layer.pop(source, None)
            if layer in corrections:
                of_layer[source] = corrections[layer]

    @contextmanager
    def fitting(self, source: Source, hit_of: HitOf) -> Iterator[None]:
        """Serve as :meth:`serving`, and fit the corrections of ``source`` layer by layer.

        The step must hold the sequences whose exact outputs were kept. Each layer is fitted on
        inputs that the layers before it, reused and corrected, have made, so that it learns to take
        back their errors as well. A correction is kept only where it helps the held-out sequences;
        ``gains`` tells their mean relative error before and after.
        """
        self.correct(source, {})
        self.gains = {}
        self._fitting = source
        try:
            with self.serving(hit_of):
                yield
        finally:
            self._fitting = None

    @contextmanager
    def comparing(self, hit_of: HitOf) -> Iterator[dict[int, list[float]]]:
        """Compute exactly, and give the relative errors by layer that serving would have made."""
        self._errors, self._as_canaries = {}, True
        try:
            with self.serving(hit_of):
                yield self._errors
        finally:
            self._as_canaries = False

    @contextmanager
    def pooling(self, slots: int) -> Iterator[dict[bytes, torch.Tensor]]:
        """Keep the pooled feature inputs ``[slots, hidden]`` of every sequence, by the bytes of its
        token ids, rounded as a store keeps them."""
        self._pooled, self._slots = {}, slots
        try:
            yield self._pooled
        finally:
            self._slots = 0

    # -- what the layers ask --------------------------------------------------------------------

    def observe(self, hidden_states: torch.Tensor) -> None:
        """Begin a step."""
        source = compat.metadata_source(compat.layer_metadata(self._feature_layer_name))
        if source is None:
            return  # profiling or warm-up
        sequences = prompts_of(source).whole
        if len(sequences) != source.common.num_reqs:
            raise AttnCacheError(
                f"calibration takes whole sequences, got {len(sequences)} of "
                f"{source.common.num_reqs} rows; run `attncache calibrate`"
            )
        if self._slots:
            for sequence in sequences:
                assert sequence.token_ids is not None
                own = hidden_states[sequence.start : sequence.start + sequence.length]
                pooled = pool_tokens(own, self._slots).to("cpu", torch.float16).float()
                self._pooled[sequence.token_ids.tobytes()] = pooled
        step = Step(sequences, None, math.inf, self._decide, lambda layer, served: served)
        compat.forward_context().additional_kwargs[_STEP] = (step, sequences)

    def current(self) -> Step | None:
        found = self._current()
        return None if found is None else found[0]

    def sequences(self) -> list[Sequence] | None:
        """The sequences of the step; None while profiling or warming up."""
        found = self._current()
        return None if found is None else found[1]

    def compare(
        self, layer: int, served: Served, reused: torch.Tensor, exact: torch.Tensor
    ) -> None:
        self._errors.setdefault(layer, []).append(relative_error(reused, exact))

    def after(self, layer: int, value: torch.Tensor, output: torch.Tensor) -> None:
        """Keep or fit from the values ``[T, KV, d]`` and heads' outputs ``[T, H, d]`` of a step."""
        sequences = self.sequences()
        assert sequences is not None
        total = sum(sequence.length for sequence in sequences)
        if self._keeping:
            if layer in self._kept:
                raise AttnCacheError(
                    "the texts that corrections are fitted on must fit one step; give fewer"
                )
            self._kept[layer] = output[:total].flatten(1).clone()
        elif self._fitting is not None and layer in self._kept:
            step = self.current()
            assert step is not None
            served = step.served(layer)
            if served:
                heads = next(iter(served.values())).heads
                hits = [sequence for sequence in sequences if sequence.row in served]
                self._fit(layer, self._fitting, heads, value[:total], output[:total], hits)

    def _fit(
        self,
        layer: int,
        source: Source,
        heads: list[int],
        value: torch.Tensor,
        output: torch.Tensor,
        sequences: list[Sequence],
    ) -> None:
        exact, reused = self._kept[layer], output.flatten(1)
        if exact.shape != reused.shape:
            raise AttnCacheError(
                "corrections must be fitted on the step whose exact outputs were kept, got "
                f"{tuple(reused.shape)} for {tuple(exact.shape)}"
            )
        fitted, held_out = torch.zeros(2, len(reused), dtype=torch.bool)
        counts = torch.ones(len(reused), device=reused.device)
        for number, sequence in enumerate(sequences):
            part = held_out if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else fitted
            span = slice(sequence.start, sequence.start + sequence.length)
            part[span] = True
            if self._read_row is not None:
                counts[span][self._read_row] = READ_COUNT

        def sums_of(rows: torch.Tensor) -> FitSums:
            parts = (reused[rows], value[rows], exact[rows], counts[rows])
            return FitSums.of(*parts, tuple(heads), output.shape[-1])

        def solve(sums: FitSums) -> Correction:
            return sums.solve(RIDGE).to(reused.device, reused.dtype)

        sums = sums_of(fitted)
        correction = solve(sums)
        columns = correction.columns()
        before = relative_error(reused[held_out][:, columns], exact[held_out][:, columns])
        corrected = reused[held_out].clone()
        correction.apply_(corrected, value[held_out])
        after = relative_error(corrected[:, columns], exact[held_out][:, columns])
        self.gains[layer] = (before, after)
        if after < before:
            # It helps texts that it does not know: then it may know them all.
            served = fitted | held_out
            correction = solve(sums + sums_of(held_out))
            self.corrections[layer][source] = correction
            corrected = reused[served]
            correction.apply_(corrected, value[served])
            reused[served] = corrected

    def _decide(
        self, sequences: list[Sequence], found: list[Hit | None], reason: str | None
    ) -> Decision:
        hits = {}
        if self._hit_of is not None:
            given = ((sequence.row, self._hit_of(sequence)) for sequence in sequences)
            hits = {row: hit for row, hit in given if hit is not None}
        return Decision({}, hits) if self._as_canaries else Decision(hits, {})

    def _current(self) -> tuple[Step, list[Sequence]] | None:
        found: tuple[Step, list[Sequence]] | None
        found = compat.forward_context().additional_kwargs.get(_STEP)
        return found


class CalibrateScores:
    """Stands in place of the standard backend's attention of one layer: what serving has there,
    under the calibrator's control."""

    def __init__(self, found: AttentionModule, calibrator: Calibrator) -> None:
        self._index = found.index
        self._layout = found.layout
        self._scale = found.attention.impl.scale
        self._soft_cap = found.soft_cap
        self._calibrator = calibrator
        self._reuse = ReuseScores(found, calibrator, calibrator.corrections[found.index])

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
        calibrator = self._calibrator
        self._reuse.attend(exact, query, key, value, attn_metadata, output)
        sequences = calibrator.sequences()
        if sequences is None:
            return
        calibrator.after(self._index, value, output)
        if calibrator.sums is not None:
            for sequence in sequences:
                span = slice(sequence.start, sequence.start + sequence.length)
                probs, _ = exact_map(
                    query[span], key[span], self._scale, self._layout.mask, self._soft_cap
                )
                calibrator.sums.add(self._index, probs)


_active: Calibrator | None = None


def activate(calibrator: Calibrator) -> None:
    """Make ``calibrator`` the one of the engine in this process."""
    global _active
    _active = calibrator


def active() -> Calibrator:
    """The calibrator of the engine that was started last in this process.

    Raises:
        AttnCacheError: there is none.
    """
    if _active is None:
        raise AttnCacheError("nothing is being calibrated; run `attncache calibrate`")
    return _active
