# SPDX-License-Identifier: Apache-2.0
"""Choosing what templates serve, on a small model whose layers 1 and 3 hardly matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from calibration_samples import CHEAP, LAYERS, SmallModel, Tokens, sample_text, sample_texts
from torch import Tensor

from attncache_vllm.calibrate import template
from attncache_vllm.calibrate.budget import Budget
from attncache_vllm.calibrate.choose import Candidate, Chosen
from attncache_vllm.calibrate.fidelity import Fidelity, compare
from attncache_vllm.calibrate.measure import Task
from attncache_vllm.calibrate.template import TemplateChooser
from attncache_vllm.calibrate.trials import Trials
from attncache_vllm.engine import calibrate
from attncache_vllm.engine.calibrate import HitOf
from attncache_vllm.engine.step import Sequence as Row
from attncache_vllm.engine.step import template_hit
from attncache_vllm.errors import SettingsError
from attncache_vllm.reuse.plan import Source
from attncache_vllm.reuse.template import Templates

FIT, CHOOSE, CHECK = sample_texts(0, 20), sample_texts(20, 12), sample_texts(40, 12)
TEXTS = CHOOSE + CHECK
BUDGET = Budget(0.99, 0.99)
EVERYTHING, IMPOSSIBLE = Budget(0.0, 0.0), Budget(1.1, 1.1)


def template_hits(templates: Templates) -> HitOf:
    return lambda row: template_hit(templates, row.length)


def chooser(
    model: SmallModel,
    folder: Path,
    fit: Sequence[Tokens] = FIT,
    choose: Sequence[Tokens] = CHOOSE,
    task: Task | None = None,
) -> TemplateChooser:
    known: Any = model
    trials = Trials(folder / "trials.json", "a")
    return TemplateChooser(known, fit, choose, CHECK, task, trials, model.saving())


class OnCheck(Budget):
    """Holds for the texts that choose; what is said of those that check is given."""

    def __new__(cls, *verdicts: bool) -> OnCheck:
        return super().__new__(cls)

    def __init__(self, *verdicts: bool) -> None:
        super().__init__(0.0, 0.0)
        object.__setattr__(self, "verdicts", list(verdicts))
        object.__setattr__(self, "chosen_on", set())

    def of_curve(self, fidelity: Fidelity) -> None:
        self.chosen_on.add(id(fidelity))  # type: ignore[attr-defined]

    def holds(self, fidelity: Fidelity) -> bool:
        if id(fidelity) in self.chosen_on:  # type: ignore[attr-defined]
            return True
        verdicts: list[bool] = self.verdicts  # type: ignore[attr-defined]
        return verdicts.pop(0) if verdicts else False


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Chosen:
    found = chooser(SmallModel(), tmp_path_factory.mktemp("template")).choose(BUDGET)
    assert found is not None
    return found


def test_only_layers_that_hardly_matter_are_served(chosen: Chosen) -> None:
    assert chosen.plan.layers == CHEAP
    # Whole ones, which save most.
    assert [chosen.plan.groups[layer] for layer in CHEAP] == [(0, 1, 2)] * len(CHEAP)
    damage = {layer: max(groups) for layer, groups in enumerate(chosen.sensitivity)}
    dear = set(range(LAYERS)) - set(CHEAP)
    assert all(damage[layer] > 10 * damage[cheap] for layer in dear for cheap in CHEAP)


def test_the_prediction_is_of_the_texts_that_chose_and_of_others(chosen: Chosen) -> None:
    assert chosen.predicted["texts"] == len(CHOOSE) + len(CHECK)
    assert chosen.predicted["rank_fidelity"] >= BUDGET.rank
    assert chosen.predicted["groups_share"] == len(CHEAP) / LAYERS
    assert chosen.predicted["saving"] == max(
        point["saving"] for point in chosen.curve if point["rank_fidelity"] >= BUDGET.rank
    )


def test_nothing_is_chosen_where_nothing_fits(tmp_path: Path) -> None:
    assert chooser(SmallModel(), tmp_path).choose(IMPOSSIBLE) is None


def test_what_the_check_refuses_gives_way_to_the_next_smaller_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = OnCheck(False, False, True)
    measured = TemplateChooser._fidelity

    def fidelity(self: TemplateChooser, candidate: Candidate) -> Fidelity:
        found = measured(self, candidate)
        budget.of_curve(found)
        return found

    monkeypatch.setattr(TemplateChooser, "_fidelity", fidelity)
    found = chooser(SmallModel(), tmp_path).choose(budget)
    assert found is not None
    by_saving = sorted((point["saving"] for point in found.curve), reverse=True)
    # Sets between it and what was refused are tried as well, and refused here.
    assert found.predicted["saving"] == by_saving[2] < by_saving[0]
    share = sum(map(len, found.plan.groups)) / (3 * LAYERS)
    assert found.predicted["groups_share"] == pytest.approx(share, abs=1e-4)
    assert budget.verdicts == []  # type: ignore[attr-defined]


def test_what_is_published_is_what_the_prediction_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Held so small that one of few and random texts generalises.
    monkeypatch.setattr(calibrate, "RIDGE", 10.0)
    model = SmallModel()
    found = chooser(model, tmp_path, sample_texts(60, 30))
    plan = found.choose(EVERYTHING)
    assert plan is not None
    kept = tuple(i for i, of_layer in model.calibrator.corrections.items() if of_layer)
    assert plan.plan.corrected == kept
    assert 0 < len(kept) < LAYERS
    templates = found.selected(plan)
    assert templates.layers == plan.plan.layers
    for layer in templates.layers:
        maps = templates.get(layer, 18)
        assert maps is not None
        assert maps.groups == plan.plan.groups[layer]
    # Whatever was fitted last: here every set was measured by an earlier calibration.
    assert chooser(SmallModel(), tmp_path, sample_texts(60, 30)).choose(EVERYTHING) == plan
    exact = model.run(TEXTS)
    with model.calibrator.serving(template_hits(templates)):
        fidelity = compare(exact, model.run(TEXTS))
    assert plan.predicted["rank_fidelity"] == pytest.approx(fidelity.pairwise_spearman, abs=1e-4)
    assert plan.predicted["centred_cosine"] == pytest.approx(fidelity.centred_cosine, abs=1e-4)
    for of_layer in model.calibrator.corrections.values():
        of_layer.clear()
    with model.calibrator.serving(template_hits(templates)):
        raw = compare(exact, model.run(TEXTS))
    assert raw.centred_cosine != pytest.approx(fidelity.centred_cosine, abs=1e-4)


def test_errors_are_those_of_the_published_plan(tmp_path: Path) -> None:
    model = SmallModel()
    found = chooser(model, tmp_path)
    plan = found.choose(EVERYTHING)
    assert plan is not None
    hits = template_hits(found.selected(plan))
    with model.calibrator.comparing(hits) as errors:
        model.run(CHOOSE)
    for layer in range(LAYERS):
        mean, deviation = plan.plan.errors[layer]
        assert mean == pytest.approx(float(np.mean(errors.get(layer, [0.0]))), abs=1e-4)
        assert deviation == pytest.approx(float(np.std(errors.get(layer, [0.0]))), abs=1e-4)


def test_a_set_that_was_measured_is_checked_with_the_corrections_it_was_measured_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SmallModel()
    fits: list[str] = []
    fitting = model.calibrator.fitting

    def counted(source: Source, hit_of: HitOf) -> Any:
        fits.append(source)
        return fitting(source, hit_of)

    monkeypatch.setattr(model.calibrator, "fitting", counted)
    found = chooser(model, tmp_path).choose(EVERYTHING)
    assert found is not None
    assert len(fits) == len(found.curve)


@dataclass(frozen=True)
class Closeness:
    """A task whose metric is the mean similarity to the exact answers; it sends samples."""

    sent: list[str]
    exact_only: tuple[str, ...] = ()

    def change(self, exact: Tensor, reused: Tensor) -> float:
        return float(torch.cosine_similarity(exact, reused).mean()) - 1

    def figures(self, exact: Tensor, reused: Tensor, seed: int) -> Any:
        change = self.change(exact, reused)
        return SimpleNamespace(values={"difference": change}, ci95={"difference": (change, change)})

    def halves(self) -> tuple[Closeness, Closeness]:
        return Closeness(self.sent[::2]), Closeness(self.sent[1::2])


def test_a_task_is_chosen_on_one_half_and_predicted_from_both(tmp_path: Path) -> None:
    model = SmallModel()
    task: Any = Closeness([str(number) for number in range(70, 90)])
    found = chooser(model, tmp_path, task=task)
    plan = found.choose(Budget(None, None, task=0.02))
    assert plan is not None and 0 < len(plan.plan.layers) < LAYERS
    sent = [model.tokenize(text, None, 64) for text in task.sent]
    exact = model.run(sent)
    with model.calibrator.serving(template_hits(found.selected(plan))):
        reused = model.run(sent)
    assert plan.predicted["task_change"] == round(task.change(exact, reused), 4) < 0
    half = task.change(exact[::2], reused[::2])
    assert round(half, 4) in [point["task_change"] for point in plan.curve]
    assert round(half, 4) != plan.predicted["task_change"]


# -- going on ----------------------------------------------------------------------------------


def test_one_that_was_cut_off_goes_on_and_chooses_the_same(
    tmp_path: Path, chosen: Chosen, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(name: str) -> Any:
        measured = getattr(TemplateChooser, name)

        def measure(self: TemplateChooser, *arguments: Any) -> Fidelity:
            calls.append(name)
            if len(calls) in {6, 16}:
                raise KeyboardInterrupt
            result: Fidelity = measured(self, *arguments)
            return result

        return measure

    for name in ("_alone", "_fidelity"):
        monkeypatch.setattr(TemplateChooser, name, counted(name))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            chooser(SmallModel(), tmp_path).choose(BUDGET)
    assert chooser(SmallModel(), tmp_path).choose(BUDGET) == chosen
    # Every KV group and every set once, but for the two that were cut off.
    assert len(calls) == 3 * LAYERS + len(chosen.curve) + 2


def test_two_sets_of_one_name_are_two_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Which single groups join whole layers depends on the budget, which a resumed calibration may
    # not share with the one that was cut off.
    every = (0, 1, 2)
    sets = [Candidate("one", {1: every}, 0.25, 0.1), Candidate("one", {0: every}, 0.25, 0)]
    monkeypatch.setattr(template, "candidates", lambda *arguments: sets)
    found = chooser(SmallModel(), tmp_path).choose(EVERYTHING)
    assert found is not None
    cheap, dear = (point["centred_cosine"] for point in found.curve)
    assert cheap > 0.99 > dear


# -- templates ---------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_a_template_serves_texts_as_long_as_the_longest(tmp_path: Path, causal: bool) -> None:
    # Texts that were cut all have one length, which begins no bucket of bidirectional maps.
    long = [sample_text(number, 47) for number in range(20)]
    found = chooser(SmallModel(causal), tmp_path, long, sample_texts(20, 12))
    plan = found.choose(EVERYTHING)
    assert plan is not None
    hit_of = template_hits(found.selected(plan))
    hit = hit_of(Row(0, 0, 47))
    assert hit is not None and hit.source == "template"
    assert set(hit.served) == set(plan.plan.layers)
    assert {served.alignment for served in hit.served.values()} == {None}
    assert hit_of(Row(0, 0, 48 if causal else 60)) is None


def test_texts_of_too_many_lengths_are_a_friendly_error(tmp_path: Path) -> None:
    lengths = [sample_text(number, 5 + number) for number in range(20)]
    with pytest.raises(SettingsError, match="texts of similar length; give more texts"):
        chooser(SmallModel(causal=False), tmp_path, lengths)


def test_corrections_are_fitted_on_as_many_texts_as_one_step_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(template, "STEP_TOKENS", 100)
    monkeypatch.setattr(template, "STEP_SEQUENCES", 6)
    texts = [np.zeros(length, np.int32) for length in (40, 40, 20, 1, 40)]
    assert template._one_step(texts) == 3
    assert template._one_step(texts[2:]) == 3
    assert template._one_step([texts[3]] * 9) == 6
    assert template._one_step([np.zeros(200, np.int32)] * 2) == 1
