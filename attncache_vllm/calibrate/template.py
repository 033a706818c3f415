# SPDX-License-Identifier: Apache-2.0
"""Calibration of templates: which KV groups the mean maps of the corpus may serve, corrected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from attncache_vllm.calibrate.budget import Budget
from attncache_vllm.calibrate.choose import (
    Candidate,
    Chosen,
    Groups,
    best_first,
    candidates,
    error_bands,
    every_layer,
    first_that_passes,
    measure_curve,
    points,
    table,
)
from attncache_vllm.calibrate.corpus import how_many
from attncache_vllm.calibrate.edits import Tokens
from attncache_vllm.calibrate.fidelity import Fidelity, compare
from attncache_vllm.calibrate.measure import Answers, Measured, Task
from attncache_vllm.calibrate.model import STEP_SEQUENCES, STEP_TOKENS, CalibratedModel
from attncache_vllm.calibrate.progress import progress
from attncache_vllm.calibrate.saving import SavingModel, by_damage_per_saving
from attncache_vllm.calibrate.trials import Trials
from attncache_vllm.engine.calibrate import HitOf
from attncache_vllm.engine.step import template_hit
from attncache_vllm.errors import SettingsError
from attncache_vllm.reuse.correct import Correction
from attncache_vllm.reuse.plan import SourcePlan
from attncache_vllm.reuse.template import Templates, TemplateSums, bucket_of

# Tokens that the damage of every single KV group is measured on, and where texts are cut for it:
# only the order of the damages matters, and there are many groups.
PROBE_TOKENS = 2048
PROBE_LENGTH = 256
# Tokens that the errors of served layers are averaged over.
ERROR_TOKENS = 12_288

SetKey = tuple[tuple[int, tuple[int, ...]], ...]


class TemplateChooser:
    """Makes templates from some texts, and finds what they may serve."""

    def __init__(
        self,
        model: CalibratedModel,
        fit: Sequence[Tokens],
        choose: Sequence[Tokens],
        check: Sequence[Tokens],
        task: Task | None,
        trials: Trials,
        saving: SavingModel,
    ) -> None:
        """The one half of ``task`` is chosen on, the other is checked."""
        self._model = model
        self._calibrator = model.calibrator
        self._fit = fit[: _one_step(fit)]
        chosen, checked = (None, None) if task is None else task.halves()
        self._both = Measured(model, [*choose, *check], task)
        self._choose = self._both.part(slice(len(choose)), chosen)
        self._check = self._both.part(slice(len(choose), None), checked)
        self._trials = trials
        self._saving = saving
        self._layouts = model.calibrator.layouts
        # By the set that they are of: one that was measured is checked, too.
        self._fits: dict[SetKey, dict[int, Correction]] = {}
        self._answers: dict[SetKey, Answers] = {}
        self._templates = self._make_templates(fit)

    def choose(self, budget: Budget) -> Chosen | None:
        """The plan with the largest saving inside ``budget``; None if there is none."""
        damages = self._damages()
        groups = by_damage_per_saving(damages, self._saving, whole_layers=False)
        sets_of = partial(candidates, groups, self._saving)
        with progress() as bar:
            measured = bar.add_task("fitting and measuring sets", total=None)

            def measure(candidate: Candidate) -> Fidelity:
                bar.advance(measured)
                return self._trials.get(
                    f"template {candidate.groups}", partial(self._fidelity, candidate)
                )

            curve = measure_curve(sets_of, budget, measure)
            checked = bar.add_task("checking sets on other texts", total=None)

            def check(candidate: Candidate) -> dict[str, Any] | None:
                bar.advance(checked)
                if not budget.holds(measure(candidate)):
                    return None
                # More texts tell more, so those that chose it are among those that check it. Not
                # of a task: chance moves it more than sets differ, and was kind on that half.
                reused = self._served(candidate, self._check)
                surely, report = self._both.checked(self._chosen_on(candidate) + reused)
                surely = replace(surely, task_change=self._check.fidelity(reused).task_change)
                return report if budget.holds(surely) else None

            found = first_that_passes(best_first(curve, budget), sets_of, check)
        if found is None:
            return None
        candidate, report = found
        self._fit_corrections(candidate)
        num_layers = self._saving.num_layers
        plan = SourcePlan(
            every_layer(candidate.groups, num_layers),
            corrected=tuple(
                layer
                for layer, of_layer in sorted(self._calibrator.corrections.items())
                if "template" in of_layer
            ),
            errors=self._errors(candidate),
        )
        sensitivity = table(damages, num_layers)
        return Chosen(plan, sensitivity, points(curve), {**report, **candidate.shares})

    def selected(self, chosen: Chosen) -> Templates:
        """The templates that a plan needs."""
        groups = chosen.plan.groups
        return self._templates.select({layer: groups[layer] for layer in chosen.plan.layers})

    def _make_templates(self, texts: Sequence[Tokens]) -> Templates:
        # Up to the end of the longest text's bucket: texts that were cut all have that length.
        longest = bucket_of(max(len(tokens) for tokens in texts))
        sums = TemplateSums(self._layouts, longest)
        rest = texts[len(self._fit) :]
        with progress() as bar, self._calibrator.summing(sums):
            task = bar.add_task("averaging maps", total=len(texts))
            with self._calibrator.keeping():
                self._model.run(self._fit)
            bar.advance(task, len(self._fit))
            while rest:
                size = _one_step(rest)
                self._model.run(rest[:size])
                bar.advance(task, size)
                rest = rest[size:]
        try:
            return sums.means()
        except ValueError as error:
            raise SettingsError(str(error)) from None

    def _damages(self) -> dict[tuple[int, int], float]:
        cut = [tokens[:PROBE_LENGTH] for tokens in self._choose.texts]
        probe = cut[: how_many(cut, PROBE_TOKENS)]
        exact = self._model.run(probe)
        items = [
            (layer, group)
            for layer, layout in sorted(self._layouts.items())
            for group in range(layout.num_kv_heads)
        ]
        damages = {}
        with progress() as bar:
            for layer, group in bar.track(items, description="damage of each KV group"):
                fidelity = self._trials.get(
                    f"template layer {layer} group {group}",
                    partial(self._alone, {layer: (group,)}, probe, exact),
                )
                damages[layer, group] = 1 - fidelity.centred_cosine
        return damages

    def _alone(self, groups: Groups, probe: Sequence[Tokens], exact: Tensor) -> Fidelity:
        with self._calibrator.serving(self._hits(groups)):
            return compare(exact, self._model.run(probe))

    def _fidelity(self, candidate: Candidate) -> Fidelity:
        return self._choose.fidelity(self._chosen_on(candidate))

    def _chosen_on(self, candidate: Candidate) -> Answers:
        key = _key(candidate)
        if key not in self._answers:
            self._answers[key] = self._served(candidate, self._choose)
        return self._answers[key]

    def _served(self, candidate: Candidate, measured: Measured) -> Answers:
        self._fit_corrections(candidate)
        with self._calibrator.serving(self._hits(candidate.groups)):
            return measured.answers()

    def _fit_corrections(self, candidate: Candidate) -> None:
        key = _key(candidate)
        if key in self._fits:
            self._calibrator.correct("template", self._fits[key])
            return
        with self._calibrator.fitting("template", self._hits(candidate.groups)):
            self._model.run(self._fit)
        self._fits[key] = self._calibrator.fitted("template")

    def _errors(self, candidate: Candidate) -> tuple[tuple[float, float], ...]:
        """Per layer mean and deviation of what canaries will measure."""
        texts = self._choose.texts[: how_many(self._choose.texts, ERROR_TOKENS)]
        with self._calibrator.comparing(self._hits(candidate.groups)) as errors:
            self._model.run(texts)
        return error_bands(errors, self._saving.num_layers)

    def _hits(self, groups: Groups) -> HitOf:
        templates = self._templates.select(groups)
        return lambda row: template_hit(templates, row.length)


def _key(candidate: Candidate) -> SetKey:
    return tuple(sorted(candidate.groups.items()))


def _one_step(texts: Sequence[Tokens]) -> int:
    """How many of the first texts one step of the engine takes."""
    return how_many(texts[:STEP_SEQUENCES], STEP_TOKENS)
