# SPDX-License-Identifier: Apache-2.0
"""What a rehearsal serves is what a server would: its figures are those of these hits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration_samples import LAYERS, SmallModel, Tokens, make_store, sample_texts

from attncache_vllm.calibrate import rehearse
from attncache_vllm.calibrate.edits import vocabulary_of
from attncache_vllm.calibrate.measure import Measured
from attncache_vllm.calibrate.rehearse import Rehearsal, edited_others
from attncache_vllm.engine.step import template_hit
from attncache_vllm.reuse.feature import Projector
from attncache_vllm.reuse.plan import Plan, Source, SourcePlan
from attncache_vllm.reuse.template import Templates, TemplateSums
from attncache_vllm.store import LocalStore

# The package silences it where it is loaded; pytest has filters of its own.
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")

STORED, OTHERS = sample_texts(0, 16), sample_texts(300, 12)
WORDS = vocabulary_of(STORED, {0})
GROUPS: dict[Source, tuple[tuple[int, ...], ...]] = {
    "template": ((0,), (), (), ()),
    "aligned": ((), (0, 1, 2), (), (0, 1, 2)),
    "neighbour": ((), (0, 1, 2), (), (0, 1, 2)),
}
FIGURES = ("rank_fidelity", "self_retrieval", "centred_cosine")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    projector = Projector(48, slots=2, width=16, dim=8)
    return make_store(tmp_path_factory.mktemp("store") / "store", SmallModel(), STORED, projector)


@pytest.fixture
def store(path: Path) -> Iterator[LocalStore]:
    with LocalStore.open(path) as opened:
        yield opened


def make(
    store: LocalStore, model: SmallModel, gates: dict[Source, float], templates: Templates
) -> Rehearsal:
    known: Any = model
    sources = {source: SourcePlan(GROUPS[source], gate=gate) for source, gate in gates.items()}
    return Rehearsal(known, store, Plan(0, LAYERS, sources), templates)


def mean_maps(model: SmallModel, texts: Sequence[Tokens]) -> Templates:
    sums = TemplateSums(model.calibrator.layouts, 32)
    with model.calibrator.summing(sums):
        model.run(texts)
    return sums.means().select({0: (0,)})


def test_edited_copies_are_served_from_entries_and_other_texts_by_templates(
    store: LocalStore,
) -> None:
    model = SmallModel()
    templates = mean_maps(model, OTHERS)
    rehearsal = make(store, model, {"aligned": 0.5, "template": 0.0}, templates)
    copies = edited_others(store, [], 0.05, WORDS, 64, 0)
    figures = rehearsal.figures([*OTHERS, *copies.values()])
    assert figures["hits"] == {"template": 12, "aligned": 16}
    assert figures["texts"] == 28
    assert figures["rank_fidelity"] < 1


def test_its_figures_are_those_of_serving_the_same_by_hand(store: LocalStore) -> None:
    model = SmallModel()
    templates = mean_maps(model, STORED)
    found = make(store, model, {"template": 0.0}, templates).figures(OTHERS)
    assert found["hits"] == {"template": len(OTHERS)}
    known: Any = model
    measured = Measured(known, OTHERS)
    with model.calibrator.serving(lambda row: template_hit(templates, row.length)):
        _, expected = measured.checked(measured.answers())
    assert {key: found[key] for key in FIGURES} == {key: expected[key] for key in FIGURES}
    assert found["rank_fidelity"] < 1


def test_nearest_entries_are_found_by_feature(store: LocalStore) -> None:
    model = SmallModel()
    # A recorded text is nearest to itself, at no distance; no other is as near.
    rehearsal = make(store, model, {"neighbour": 1e-6}, Templates({}))
    figures = rehearsal.figures([*STORED, *OTHERS])
    assert figures["hits"] == {"neighbour": len(STORED), "none": len(OTHERS)}


def test_texts_that_nothing_serves_are_answered_exactly(store: LocalStore) -> None:
    figures = make(store, SmallModel(), {"aligned": 0.1}, Templates({})).figures(OTHERS)
    assert figures["hits"] == {"none": len(OTHERS)}
    assert [figures[key] for key in FIGURES] == [1.0, 1.0, 1.0]


def test_copies_are_of_the_entries_that_nothing_else_used(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = edited_others(store, [0, 5], 0.3, WORDS, 20, 7)
    assert list(copies) == [number for number in range(16) if number not in (0, 5)]
    assert max(map(len, copies.values())) == 20
    assert not any(np.array_equal(ids, STORED[number]) for number, ids in copies.items())
    again = edited_others(store, [0, 5], 0.3, WORDS, 20, 7)
    assert all(np.array_equal(ids, again[number]) for number, ids in copies.items())
    # Too few to tell anything.
    assert edited_others(store, range(16 - rehearse.FEWEST + 1), 0.3, WORDS, 20, 7) == {}
    monkeypatch.setattr(rehearse, "MAX_TEXTS", 10)
    assert list(edited_others(store, [], 0.3, WORDS, 20, 7)) == list(range(10))
    monkeypatch.setattr(rehearse, "MAX_TOKENS", sum(map(len, STORED[:9])))
    assert list(edited_others(store, [], 0.3, WORDS, 20, 7)) == list(range(9))
