# SPDX-License-Identifier: Apache-2.0
"""``attncache calibrate`` from the texts to the published plan, on a small model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from calibration_samples import CHEAP, LAYERS, SmallModel, make_store, sample_texts

from attncache_vllm.calibrate import calibrate as calibrating
from attncache_vllm.calibrate.budget import Budget
from attncache_vllm.calibrate.calibrate import MIN_TEXTS, TRIALS_NAME, CalibrateOptions, calibrate
from attncache_vllm.calibrate.corpus import Text
from attncache_vllm.calibrate.template import TemplateChooser
from attncache_vllm.errors import SettingsError
from attncache_vllm.reuse.feature import Projector
from attncache_vllm.reuse.plan import Plan
from attncache_vllm.reuse.template import Templates
from attncache_vllm.store import LocalStore
from attncache_vllm.store.manifest import Manifest

# The package silences it where it is loaded; pytest has filters of its own.
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")

TEXTS = [Text(str(number)) for number in range(200, 260)]
GENEROUS, IMPOSSIBLE = Budget(0.0, 0.0), Budget(1.1, 1.1)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[tuple[SmallModel, tuple[Any, ...]]]:
    """Every model that was started, and what for."""
    started: list[tuple[SmallModel, tuple[Any, ...]]] = []

    def start(*arguments: Any) -> SmallModel:
        model = SmallModel()
        started.append((model, arguments))
        return model

    monkeypatch.setattr(calibrating, "CalibratedModel", start)
    return started


@pytest.fixture
def options(tmp_path: Path) -> CalibrateOptions:
    projector = Projector(48, slots=2, width=16, dim=8)
    store = make_store(tmp_path / "store", SmallModel(), sample_texts(0, 16), projector)
    return CalibrateOptions("model", store, Budget(), max_tokens=22, serve_options=("--dtype", "x"))


@pytest.mark.usefixtures("models")
def test_the_plan_is_published_with_its_report_and_what_it_needs(options: CalibrateOptions) -> None:
    report = calibrate(options, TEXTS)
    with LocalStore.open(options.store) as store:
        plan = Plan.from_dict(store.plan)
        published = store.manifest.published
        assert published is not None
        # What the build reported stays beside it.
        assert published.report == {"loss": 0.5, "calibration": report}
        data = store.artifact("templates")
    assert set(plan.sources) == {"template", "aligned", "prefix"} == set(report["predicted"])
    assert set(CHEAP) <= set(plan.sources["template"].layers)
    assert plan.feature_layer == 0
    layouts = SmallModel().calibrator.layouts
    assert data is not None
    assert Templates.from_bytes(data, layouts).layers == plan.sources["template"].layers
    assert set(report["curve"]) == set(report["sensitivity"]) == set(plan.sources)
    assert not (options.store / TRIALS_NAME).exists()


@pytest.mark.usefixtures("models")
def test_it_tells_what_the_whole_plan_keeps_of_texts_that_took_no_part(
    options: CalibrateOptions,
) -> None:
    report = calibrate(replace(options, budget=GENEROUS), TEXTS)
    kept = report["rehearsed"]["corpus"]
    assert kept["hits"] == {"template": report["texts"]["rehearse"]}
    assert kept["centred_cosine"] < 1
    # Every entry has chosen or checked: there is none to edit.
    assert "edits" not in report["rehearsed"]


@pytest.mark.usefixtures("models")
def test_and_of_edited_copies_of_entries_that_took_no_part(
    options: CalibrateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attncache_vllm.calibrate.aligned.MAX_TEXTS", 8)
    report = calibrate(replace(options, sources=("aligned",), budget=GENEROUS), TEXTS)
    kept = report["rehearsed"]["edits"]
    assert kept["hits"] == {"aligned": 8}
    assert sorted(report["predicted"]["aligned"]["entries"] + kept["entries"]) == list(range(16))
    assert kept["centred_cosine"] < 1


@pytest.mark.usefixtures("models")
def test_a_plan_of_nothing_is_a_plan(options: CalibrateOptions) -> None:
    # A neighbour's maps were not measured: they go with the plan that had them.
    report = calibrate(replace(options, budget=IMPOSSIBLE, sources=("template",)), TEXTS)
    assert report["predicted"] == {} == report["rehearsed"]
    with LocalStore.open(options.store) as store:
        assert Plan.from_dict(store.plan) == Plan(0, LAYERS, {})
        assert store.artifact("templates") is None


@pytest.mark.parametrize("sources", [("template",), ("aligned",)])
@pytest.mark.usefixtures("models")
def test_only_the_sources_that_are_asked_for(
    options: CalibrateOptions, sources: tuple[str, ...]
) -> None:
    report = calibrate(replace(options, sources=sources, budget=GENEROUS), TEXTS)
    assert set(report["predicted"]) <= {*sources, "prefix"}
    assert set(report["predicted"]) >= set(sources)
    assert ("prefix" in report["predicted"]) <= ("aligned" in sources)


def test_texts_are_parted_by_seed_and_no_text_has_two_parts(
    options: CalibrateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = SmallModel()

    def parts(**changes: Any) -> list[set[bytes]]:
        splits = calibrating._split(model, replace(options, **changes), TEXTS * 2)
        return [{ids.tobytes() for ids in part} for part in vars(splits).values()]

    every = parts()
    assert list(map(len, every)) == [24, 12, 12, 12]
    assert len(set.union(*every)) == 60
    assert parts() == every
    assert parts(seed=1) != every
    assert all(len(ids) <= 4 * 22 for ids in every[0])
    # However many there are, those that are measured on are bounded by their tokens.
    monkeypatch.setattr(calibrating, "MAX_CHOOSE_TOKENS", 22 * 5)
    monkeypatch.setattr(calibrating, "MAX_CHECK_TOKENS", 22 * 7)
    monkeypatch.setattr(calibrating, "MAX_REHEARSED_TOKENS", 22 * 9)
    fit, choose, check, rehearse = parts()
    assert len(choose) in (5, 6) and len(check) in (7, 8) and len(rehearse) in (9, 10)
    assert sum(map(len, (fit, choose, check, rehearse))) == 60
    # 18 to 22 tokens, once they are cut.
    assert sum(map(len, parts(min_tokens=22))) < len(TEXTS)


def test_the_engine_takes_the_longest_entry_and_is_closed(
    options: CalibrateOptions, models: list[tuple[SmallModel, tuple[Any, ...]]]
) -> None:
    calibrate(replace(options, sources=("aligned",)), TEXTS)
    ((model, arguments),) = models
    assert arguments == ("model", options.store, 24, ("--dtype", "x"))
    assert model.closed


def test_too_few_texts_are_an_error_and_the_engine_is_closed(
    options: CalibrateOptions, models: list[tuple[SmallModel, tuple[Any, ...]]]
) -> None:
    few = TEXTS[: MIN_TEXTS - 1]
    with pytest.raises(SettingsError, match=f"at least {MIN_TEXTS} different texts .* got 23"):
        calibrate(options, [*few, *few])
    assert models[0][0].closed


@pytest.mark.usefixtures("models")
def test_one_that_was_cut_off_goes_on_with_the_next_trial(
    options: CalibrateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    measured = TemplateChooser._alone

    def alone(self: TemplateChooser, *arguments: Any) -> Any:
        calls.append(arguments[0])
        if len(calls) == 8:
            raise KeyboardInterrupt
        return measured(self, *arguments)

    monkeypatch.setattr(TemplateChooser, "_alone", alone)
    asked = replace(options, sources=("template",))
    before = Manifest.read(options.store)
    with pytest.raises(KeyboardInterrupt):
        calibrate(asked, TEXTS)
    assert Manifest.read(options.store) == before
    calibrate(asked, TEXTS)
    assert len(calls) == 3 * LAYERS + 1
    # Done: another one begins anew.
    calibrate(asked, TEXTS)
    assert len(calls) == 6 * LAYERS + 1


def test_trials_are_those_of_these_texts_and_this_model(options: CalibrateOptions) -> None:
    model: Any = SmallModel()
    manifest = Manifest.read(options.store)
    splits = calibrating._split(model, options, TEXTS)
    fewer = calibrating._split(model, options, TEXTS[1:])
    other = replace(manifest, namespace=replace(manifest.namespace, weights="1e" * 32))
    shorter = replace(manifest, entries=manifest.entries[1:])
    same = calibrating._fingerprint(options, splits, manifest)
    assert calibrating._fingerprint(replace(options, budget=GENEROUS), splits, manifest) == same
    others = [
        calibrating._fingerprint(replace(options, seed=1), splits, manifest),
        calibrating._fingerprint(replace(options, serve_options=()), splits, manifest),
        calibrating._fingerprint(options, fewer, manifest),
        calibrating._fingerprint(options, splits, other),
        calibrating._fingerprint(options, splits, shorter),
    ]
    assert len({same, *others}) == 6
