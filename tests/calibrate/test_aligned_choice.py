# SPDX-License-Identifier: Apache-2.0
"""Choosing what aligned maps serve, on a small model whose layers 1 and 3 hardly matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from calibration_samples import CHEAP, LAYERS, SmallModel, make_store, sample_texts

from attncache_vllm.calibrate import aligned
from attncache_vllm.calibrate.aligned import GATE_RATES, AlignedChooser, Copies
from attncache_vllm.calibrate.budget import Budget
from attncache_vllm.calibrate.edits import edit, vocabulary_of
from attncache_vllm.calibrate.fidelity import Fidelity, compare
from attncache_vllm.calibrate.trials import Trials
from attncache_vllm.engine.step import Sequence as Row
from attncache_vllm.reuse.align import align
from attncache_vllm.reuse.codec import decode_map, encode_map

# The package silences it where it is loaded; pytest has filters of its own.
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")

STORED = sample_texts(0, 16)
WORDS = vocabulary_of(sample_texts(100, 20), {0})
BUDGET = Budget(0.99, 0.99)
GENEROUS, IMPOSSIBLE = Budget(0.0, 0.0), Budget(1.1, 1.1)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("stores")
    return {
        causal: make_store(folder / str(causal), SmallModel(causal), STORED)
        for causal in (True, False)
    }


def chooser(model: SmallModel, store: Path, folder: Path, seed: int = 0) -> AlignedChooser:
    known: Any = model
    trials = Trials(folder / "trials.json", "a")
    return AlignedChooser(known, store, seed, WORDS, trials, model.saving())


class Scripted(Budget):
    """Holds as often as it is told to."""

    def __init__(self, *verdicts: bool) -> None:
        super().__init__(0.0, 0.0)
        object.__setattr__(self, "verdicts", list(verdicts))

    def holds(self, fidelity: Fidelity) -> bool:
        return bool(self.verdicts.pop(0))  # type: ignore[attr-defined]

    def without_task(self) -> Budget:
        return self


def test_layers_that_hardly_matter_are_aligned_and_the_others_serve_prefixes(
    stores: dict[bool, Path], tmp_path: Path
) -> None:
    chosen = chooser(SmallModel(), stores[True], tmp_path).choose(BUDGET)
    assert set(CHEAP) <= set(chosen["aligned"].plan.layers)
    assert chosen["aligned"].plan.gate > 0
    rest = set(range(LAYERS)) - set(chosen["aligned"].plan.layers)
    assert set(chosen["prefix"].plan.layers) == rest
    assert chosen["prefix"].plan.errors == ()
    damage = {layer: sum(groups) for layer, groups in enumerate(chosen["aligned"].sensitivity)}
    assert max(damage[layer] for layer in CHEAP) < min(damage[layer] for layer in (0, 2))
    assert chosen["aligned"].predicted["rank_fidelity"] >= BUDGET.rank


def test_a_bidirectional_model_has_no_exact_prefixes(
    stores: dict[bool, Path], tmp_path: Path
) -> None:
    model = SmallModel(causal=False)
    assert set(chooser(model, stores[False], tmp_path).choose(BUDGET)) == {"aligned"}


def test_a_causal_model_whose_layers_tolerate_nothing_serves_prefixes_in_all(
    stores: dict[bool, Path], tmp_path: Path
) -> None:
    folder, other = tmp_path / "causal", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    chosen = chooser(SmallModel(), stores[True], folder).choose(IMPOSSIBLE)
    assert {name: part.plan.layers for name, part in chosen.items()} == {
        "prefix": tuple(range(LAYERS))
    }
    assert chooser(SmallModel(False), stores[False], other).choose(IMPOSSIBLE) == {}


def test_a_store_of_a_few_texts_calibrates_nothing(tmp_path: Path) -> None:
    model = SmallModel()
    store = make_store(tmp_path / "store", model, STORED[:7])
    assert chooser(model, store, tmp_path).choose(GENEROUS) == {}


def test_the_gate_is_the_largest_novelty_up_to_which_the_budget_holds(
    stores: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[float]] = []
    copies_of = AlignedChooser._copies

    def copies(self: AlignedChooser, *arguments: Any) -> Copies:
        made = copies_of(self, *arguments)
        seen.append(made.novelties)
        return made

    model = SmallModel()
    chooses = chooser(model, stores[True], tmp_path)
    monkeypatch.setattr(AlignedChooser, "_copies", copies)
    sets = 4  # nested sets of whole layers, asked for the gaps between them and for the best
    budget = Scripted(*[True] * 2 * sets, True, True, False)
    chosen = chooses.choose(budget)["aligned"]
    assert budget.verdicts == []  # type: ignore[attr-defined]
    assert len(chosen.curve) == sets
    # Copies to choose on, then those of every rate up to the one that was refused.
    assert len(seen) == 1 + 3
    assert chosen.plan.gate == pytest.approx(max(seen[2]), abs=1e-4)
    assert [point["rate"] for point in chosen.predicted["rates"]] == list(GATE_RATES[:3])
    assert chosen.predicted["texts"] == len(STORED) // 2


def test_what_fails_at_the_rate_that_it_was_chosen_on_gives_way_to_fewer_layers(
    stores: dict[bool, Path], tmp_path: Path
) -> None:
    budget = Scripted(*[True] * 2 * 4, False, False, *[True] * len(GATE_RATES))
    chosen = chooser(SmallModel(), stores[True], tmp_path).choose(budget)["aligned"]
    by_saving = sorted((point["saving"] for point in chosen.curve), reverse=True)
    assert chosen.predicted["saving"] == by_saving[2]


def test_texts_that_set_the_gate_did_not_choose(
    stores: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[set[bytes]] = []
    copies_of = AlignedChooser._copies

    def copies(self: AlignedChooser, originals: Any, rate: float) -> Copies:
        used.append({original.tokens.tobytes() for original in originals})
        return copies_of(self, originals, rate)

    chooses = chooser(SmallModel(), stores[True], tmp_path)
    monkeypatch.setattr(AlignedChooser, "_copies", copies)
    chooses.choose(GENEROUS)
    chose, *checked = used
    assert len(chose) == len(STORED) // 2
    assert all(part == checked[0] for part in checked)
    assert chose.isdisjoint(checked[0])
    assert chose | checked[0] == {ids.tobytes() for ids in STORED}


def test_errors_are_those_of_the_copies_in_the_served_layers(
    stores: dict[bool, Path], tmp_path: Path
) -> None:
    plan = chooser(SmallModel(), stores[True], tmp_path).choose(BUDGET)["aligned"].plan
    for layer in range(LAYERS):
        mean, deviation = plan.errors[layer]
        assert (mean > 0, deviation > 0) == (layer in plan.layers, layer in plan.layers)


# -- copies ------------------------------------------------------------------------------------


def test_a_copy_is_served_from_its_own_original() -> None:
    model = SmallModel()
    maps = []
    for ids in STORED[:6]:
        of_text = {}
        for layer, (probs, lse) in model.maps(ids).items():
            layout = model.calibrator.layouts[layer]
            of_text[layer] = decode_map(encode_map(probs, lse, layout.mask), layout, len(ids))
        maps.append(of_text)
    texts = [edit(ids, 0.1, range(1, 40), (number,)) for number, ids in enumerate(STORED[:6])]
    pairs = zip(texts, STORED, strict=False)
    copies = Copies(texts, [align(copy, original) for copy, original in pairs], maps)
    hit_of = copies.hits({1: (0,), 2: (0, 1, 2)})
    for number, ids in enumerate(texts):
        hit = hit_of(Row(0, 0, len(ids), ids))
        assert hit is not None and hit.source == "aligned"
        assert set(hit.served) == {1, 2}
        assert {served.source for served in hit.served.values()} == {"aligned"}
        assert hit.served[2].maps is maps[number][2]
        assert hit.served[2].alignment is copies.alignments[number]


def test_unedited_texts_are_answered_as_ever(stores: dict[bool, Path], tmp_path: Path) -> None:
    model = SmallModel()
    found = chooser(model, stores[True], tmp_path)
    copies = found._copies(found._originals, 0.0)
    assert copies.novelties == [0.0] * len(STORED)
    exact = model.run(copies.texts)
    with model.calibrator.serving(copies.hits(dict.fromkeys(range(LAYERS), (0, 1, 2)))):
        reused = model.run(copies.texts)
    assert compare(exact, reused).centred_cosine > 0.999


def test_copies_fit_the_model_and_hold_no_special_tokens(
    stores: dict[bool, Path], tmp_path: Path
) -> None:
    model = SmallModel()
    model.max_tokens = 20
    found = chooser(model, stores[True], tmp_path)
    copies = found._copies(found._originals, 0.2)
    assert max(map(len, copies.texts)) == 20


def test_memory_bounds_how_many_originals_are_held(
    stores: dict[bool, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = SmallModel()
    every = aligned._originals(stores[True], model, 0, {})
    assert {found.tokens.tobytes() for found in every} == {ids.tobytes() for ids in STORED}
    assert [found.tokens.tobytes() for found in every] != [ids.tobytes() for ids in STORED]
    monkeypatch.setattr(aligned, "MAX_TEXTS", 5)
    assert len(aligned._originals(stores[True], model, 0, {})) == 5
    length = len(STORED[0])
    monkeypatch.setattr(aligned, "MAX_TOKENS", 3 * length)
    assert len(aligned._originals(stores[True], model, 0, {})) in (3, 4)
    size = sum(blocks.nbytes for blocks in every[0].maps.values())
    monkeypatch.setattr(aligned, "MAX_BYTES", size)
    assert len(aligned._originals(stores[True], model, 0, {})) in (1, 2)


def test_a_damaged_entry_is_left_out(tmp_path: Path) -> None:
    model: Any = SmallModel()
    store = make_store(tmp_path / "store", model, STORED[:9])
    segment = next(store.glob("maps-*"))
    data = bytearray(segment.read_bytes())
    data[-1] ^= 1
    segment.write_bytes(data)
    found = aligned._originals(store, model, 0, {})
    assert {item.tokens.tobytes() for item in found} == {ids.tobytes() for ids in STORED[:8]}
