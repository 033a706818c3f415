# SPDX-License-Identifier: Apache-2.0
"""Every family of attention: causal, windowed, soft-capped and bidirectional models, grouped and
multi-query heads, quantized weights, and one that must be bypassed.

Small models with random weights; one process runs the engines of all of them before the first test.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from integration_tests.compare import cosines
from integration_tests.models import MODELS, SmallModel
from integration_tests.processes import run

REUSING = [name for name, kind in MODELS.items() if kind.bypassed is None]
BYPASSED = [name for name, kind in MODELS.items() if kind.bypassed is not None]
ALONE = ("recorded", "equal length", "other length", "longer", "short")
OUTCOMES = ("attncache_sequences_total", "attncache_misses_total", "attncache_bypasses_total")
MISSED = "misses_total{nothing close enough}"
RUN_SECONDS = 500.0


@dataclass(frozen=True)
class Family:
    """What the engines made of one model; see :mod:`integration_tests.families`."""

    name: str
    kind: SmallModel
    report: dict[str, Any]
    answers: dict[str, NDArray[np.float32]]

    def of(self, engine: str, kind: str) -> NDArray[np.float32]:
        """Embeddings ``[B, D]`` of the prompts of a kind."""
        return self.answers[f"{self.name}/{engine}/{kind}"]

    def alone(self, engine: str) -> NDArray[np.float32]:
        """Embeddings ``[B, D]`` of all prompts, each sent alone."""
        return np.concatenate([self.of(engine, kind) for kind in ALONE])

    def counts(self, engine: str, kind: str) -> dict[str, int]:
        """Outcomes, and their reasons, that the backend counted for the prompts of a kind."""
        return {
            name.removeprefix("attncache_"): count
            for name, count in self.report["counters"][engine][kind].items()
            if name.startswith(OUTCOMES)
        }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NDArray[Any]]:
    folder = tmp_path_factory.mktemp("families")
    out = folder / "families.npz"
    command = [sys.executable, "-m", "integration_tests.families", str(out), *MODELS]
    ended = run(command, folder, RUN_SECONDS)
    assert ended.code == 0, ended.log
    with np.load(out) as arrays:
        return dict(arrays)


@pytest.fixture
def family(request: pytest.FixtureRequest, results: dict[str, NDArray[Any]]) -> Family:
    name: str = request.param
    report = json.loads(str(results["report"]))[name]
    assert report["error"] is None, report["error"]
    return Family(name, MODELS[name], report, results)


reusing = pytest.mark.parametrize("family", REUSING, indirect=True)


@reusing
def test_every_layer_has_reuse(family: Family) -> None:
    # A part of quantized weights cannot be cut out, so that V is not computed without q and k.
    reach = "reused" if family.kind.quantize is None else "partly: quantized weights"
    assert family.report["layers"] == {reach: family.report["build"]["num_layers"]}


@reusing
@pytest.mark.parametrize("gate", ["own", "open"])
def test_recorded_text_hits_its_own_map_and_keeps_its_embedding(family: Family, gate: str) -> None:
    reused, exact = family.of(gate, "recorded"), family.of("stock", "recorded")
    assert family.counts(gate, "recorded") == {"sequences_total{hit}": len(exact)}
    # A map in bf16 costs up to 0.00006. Where inputs are quantized it costs twice as much: rounded
    # otherwise, some become another integer. The map of another text costs 0.08 and more.
    assert cosines(reused, exact).min() >= 0.9995
    # Guards the line above against an engine that counts hits and computes them all the same.
    assert not (reused == exact).all(axis=1).any()


@reusing
@pytest.mark.parametrize("kind", ["equal length", "other length", "longer"])
def test_unrelated_text_misses_and_is_bit_equal_to_stock(family: Family, kind: str) -> None:
    exact = family.of("stock", kind)
    count = len(exact)
    assert family.counts("own", kind) == {"sequences_total{miss}": count, MISSED: count}
    assert np.array_equal(family.of("own", kind), exact)


@reusing
def test_batch_without_a_hit_is_bit_equal_to_stock(family: Family) -> None:
    assert "sequences_total{hit}" not in family.counts("own", "new together")
    assert np.array_equal(family.of("own", "new together"), family.of("stock", "new together"))


@reusing
def test_short_sequence_is_bypassed_and_bit_equal_to_stock(family: Family) -> None:
    exact = family.of("stock", "short")
    counts = family.counts("open", "short")
    assert counts.pop("bypasses_total{shorter than min_tokens}") == len(exact)
    assert counts == {"sequences_total{bypass}": len(exact)}
    assert np.array_equal(family.of("open", "short"), exact)


@reusing
def test_map_of_another_text_changes_the_answer(family: Family) -> None:
    # What makes the bound on own maps mean something.
    reused, exact = family.of("open", "equal length"), family.of("stock", "equal length")
    assert family.counts("open", "equal length") == {"sequences_total{hit}": len(exact)}
    assert cosines(reused, exact).max() <= 0.95


@reusing
def test_map_serves_shorter_texts_only_if_the_model_is_causal(family: Family) -> None:
    exact = family.of("stock", "other length")
    counts = family.counts("open", "other length")
    if family.kind.causal:
        assert counts == {"sequences_total{hit}": len(exact)}
    else:
        assert counts == {"sequences_total{miss}": len(exact), MISSED: len(exact)}
        assert np.array_equal(family.of("open", "other length"), exact)


@reusing
def test_map_serves_no_longer_text(family: Family) -> None:
    exact = family.of("stock", "longer")
    counts = family.counts("open", "longer")
    assert counts == {"sequences_total{miss}": len(exact), MISSED: len(exact)}
    assert np.array_equal(family.of("open", "longer"), exact)


@reusing
@pytest.mark.parametrize("gate", ["own", "open"])
def test_mixed_batch_gives_each_sequence_its_answer_alone(family: Family, gate: str) -> None:
    # Not bit-equal: a matrix product may round differently when it has other rows beside it.
    assert cosines(family.of(gate, "together"), family.alone(gate)).min() >= 0.9999
    alone: Counter[str] = Counter()
    for kind in ALONE:
        alone.update(family.counts(gate, kind))
    assert family.counts(gate, "together") == alone


@pytest.mark.parametrize("family", BYPASSED, indirect=True)
def test_model_without_such_maps_is_not_recorded_and_served_as_by_stock(family: Family) -> None:
    assert family.kind.bypassed in family.report["refused"]
    (treatment,) = family.report["layers"]
    assert treatment == f"bypassed: {family.kind.bypassed}"
    for kind in (*ALONE, "together", "new together"):
        exact = family.of("stock", kind)
        assert np.array_equal(family.of("open", kind), exact)
        assert family.counts("open", kind) == {
            "sequences_total{bypass}": len(exact),
            f"bypasses_total{{{family.kind.bypassed}}}": len(exact),
        }


@pytest.mark.parametrize(("quantized", "least"), [("llama-w8a8", 0.995), ("llama-w4a16", 0.9)])
def test_quantized_model_answers_much_like_the_model_it_was_made_from(
    results: dict[str, NDArray[np.float32]], quantized: str, least: float
) -> None:
    # Otherwise tests of quantized weights would be tests of noise.
    ours, theirs = (results[f"{name}/stock/recorded"] for name in (quantized, "llama"))
    assert cosines(ours, theirs).min() >= least
