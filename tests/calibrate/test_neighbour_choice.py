# SPDX-License-Identifier: Apache-2.0
"""Choosing what nearest entries serve, on a small model whose layers 1 and 3 hardly matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration_samples import CHEAP, LAYERS, SmallModel, Tokens, make_store, sample_text

from attncache_vllm.calibrate import neighbour
from attncache_vllm.calibrate.budget import Budget
from attncache_vllm.calibrate.neighbour import MIN_TEXTS, NeighbourChooser, near
from attncache_vllm.calibrate.trials import Trials
from attncache_vllm.engine.step import Sequence as Row
from attncache_vllm.reuse.feature import Projector

# The package silences it where it is loaded; pytest has filters of its own.
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")

STORED = [sample_text(number, 24) for number in range(24)]
BUDGET = Budget(0.99, 0.99)
IMPOSSIBLE = Budget(1.1, 1.1)


def changed(number: int, tokens: int) -> Tokens:
    """A stored text with its last tokens replaced, if any, and the very last left out then."""
    ids = STORED[number].copy()
    if tokens:
        ids[-tokens:] = sample_text(1000 + number, tokens)
    return ids[:-1] if tokens else ids


def texts(first: int) -> list[Tokens]:
    """Half of them near an entry, half of them far."""
    return [changed(first + n, 0 if n % 2 else 20) for n in range(12)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    projector = Projector(48, slots=2, width=16, dim=8)
    return make_store(tmp_path_factory.mktemp("near") / "store", SmallModel(), STORED, projector)


def chooser(model: SmallModel, store: Path, folder: Path) -> NeighbourChooser:
    known: Any = model
    trials = Trials(folder / "trials.json", "a")
    return NeighbourChooser(known, store, texts(0), texts(12), trials, model.saving())


def test_texts_come_in_the_order_of_their_distances_with_the_maps_of_their_entries(
    store: Path,
) -> None:
    model: Any = SmallModel()
    found = near(store, model, texts(0), {})
    assert found.distances == sorted(found.distances)
    assert {ids.tobytes() for ids in found.texts} == {ids.tobytes() for ids in texts(0)}
    # The six that are stored are nearest, each to its own entry.
    for ids, maps in zip(found.texts[:6], found.maps[:6], strict=True):
        (number,) = (n for n in range(24) if np.array_equal(STORED[n], ids))
        probs, _ = model.maps(STORED[number])[2]
        torch.testing.assert_close(maps[2].to_dense().float(), probs, atol=1e-2, rtol=0)
    assert found.distances[5] < found.distances[6]
    # An entry must be long enough, and memory bounds how many are held.
    assert near(store, model, [sample_text(0, 25)], {}).texts == []


def test_memory_bounds_the_entries_that_are_held(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = SmallModel()
    monkeypatch.setattr(neighbour, "MAX_BYTES", 0)
    held = near(store, model, texts(0), {})
    assert len({id(maps) for maps in held.maps}) == 1


def test_a_gate_keeps_the_nearest(store: Path) -> None:
    model: Any = SmallModel()
    found = near(store, model, texts(0), {})
    assert found.within(found.distances[5]).distances == found.distances[:6]
    assert found.within(-1.0).texts == []
    spread = found.spread(4)
    assert spread.distances == found.distances[::3]
    hit_of = found.part(2, 3).hits({1: (0, 1, 2), 3: (0, 1, 2)})
    ids = found.texts[2]
    hit = hit_of(Row(0, 0, len(ids), ids))
    assert hit is not None and hit.source == "neighbour"
    assert {layer: served.maps for layer, served in hit.served.items()} == {
        layer: found.maps[2][layer] for layer in (1, 3)
    }


def test_near_entries_damage_less_and_cheap_layers_are_served(store: Path, tmp_path: Path) -> None:
    found, bands = chooser(SmallModel(), store, tmp_path).choose(BUDGET)
    assert found is not None
    assert set(CHEAP) <= set(found.plan.layers)
    assert [band["texts"] for band in bands] == [4, 4, 4]
    edges = [edge for band in bands for edge in band["distance"]]
    assert edges == sorted(edges)
    # What is exact up to the rounding of stored maps, and what is another text's.
    assert bands[0]["damage"][2] < 1e-3 < bands[-1]["damage"][2]
    assert max(bands[-1]["damage"][layer] for layer in CHEAP) < bands[-1]["damage"][2]
    assert found.predicted["gate"] == pytest.approx(found.plan.gate, abs=1e-4)
    assert 0 < found.predicted["served_share"] <= 1
    assert found.predicted["texts"] >= MIN_TEXTS
    assert len(found.plan.errors) == LAYERS


def test_a_narrow_gate_serves_more_layers_where_wide_ones_are_too_far(
    store: Path, tmp_path: Path
) -> None:
    model: Any = SmallModel()
    # Nine of twelve are near: all layers of these save more than the cheap ones of all.
    choose, check = ([changed(n, 0 if n % 4 else 20) for n in range(m, m + 12)] for m in (0, 12))
    trials = Trials(tmp_path / "trials.json", "a")
    found, _ = NeighbourChooser(model, store, choose, check, trials, model.saving()).choose(BUDGET)
    assert found is not None
    assert found.plan.layers == tuple(range(LAYERS))
    assert found.plan.gate == pytest.approx(near(store, model, choose, {}).distances[8], abs=1e-4)
    assert found.predicted["served_share"] == 0.75


def test_nothing_inside_the_budget_still_tells_the_bands(store: Path, tmp_path: Path) -> None:
    found, bands = chooser(SmallModel(), store, tmp_path).choose(IMPOSSIBLE)
    assert found is None and len(bands) == 3


def test_too_few_texts_with_an_entry_choose_nothing(store: Path, tmp_path: Path) -> None:
    known: Any = SmallModel()
    few = texts(0)[: MIN_TEXTS - 1]
    trials = Trials(tmp_path / "trials.json", "a")
    found = NeighbourChooser(known, store, few, few, trials, known.saving()).choose(BUDGET)
    assert found == (None, [])
