# SPDX-License-Identifier: Apache-2.0
"""A real encoder, calibrated: what the plan promises, what serving keeps, and drift."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from attncache_vllm.calibrate.budget import Budget
from attncache_vllm.calibrate.fidelity import compare
from attncache_vllm.store.local import LocalStore
from attncache_vllm.store.rearm import rearm
from benchmarks.assets import ensure
from benchmarks.corpus import stsb_pairs
from integration_tests import probe
from integration_tests.engine import IN_PROCESS, Counted, Engine

# One core: two that wait for each other are slow on a busy machine.
ENVIRONMENT = {**IN_PROCESS, "VLLM_CPU_NUM_OF_RESERVED_CPU": "1", "OMP_NUM_THREADS": "1"}
MODEL: dict[str, Any] = {"runner": "pooling", "dtype": "bfloat16", "enforce_eager": True}
SERVE = ("--dtype", "bfloat16")
RECORDED, CALIBRATED, MEASURED = 64, 400, 200
BUDGET = Budget(rank=0.9, self_retrieval=0.9)
# Lists of words: no sentences, which is what the plan was chosen on.
# Another language than that of the calibration.
GERMAN = [
    "Der Zug nach Hamburg fährt heute von einem anderen Gleis ab.",
    "Meine Großmutter backt jeden Sonntag einen Kuchen mit Äpfeln.",
    "Wegen des Regens wurde das Spiel am Abend abgesagt.",
    "Die Stadt baut im nächsten Jahr eine neue Brücke über den Fluss.",
    "Kannst du mir bitte sagen, wie spät es gerade ist?",
    "Im Wald hinter dem Haus leben Füchse und viele Eulen.",
    "Der Vertrag gilt ab dem ersten März und endet nach zwei Jahren.",
    "Sie hat gestern ihr Fahrrad in der Werkstatt reparieren lassen.",
]
DRIFT = 5 * GERMAN


@dataclass(frozen=True)
class Calibrated:
    """An engine, its store, and the report of the store's calibration."""

    engine: Engine
    store: Path
    report: dict[str, Any]
    texts: list[str]

    def serve(self, **settings: Any) -> None:
        patient = {
            "store": str(self.store),
            "min_tokens": 2,
            "lookup_deadline_ms": 60_000.0,
            "only_where_it_pays": False,
        }
        self.engine.replace(
            model=str(ensure("minilm")),
            **MODEL,
            worker_extension_cls=probe.PATH,
            attention_backend="attncache",
            additional_config={"attncache": {**patient, "canary_share": 0.0, **settings}},
        )


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calibrated]:
    folder = tmp_path_factory.mktemp("calibrate")
    pairs = stsb_pairs("train")
    sentences = list(dict.fromkeys(text for p in pairs for text in (p.first, p.second)))[::17]
    recorded, rest = sentences[:RECORDED], sentences[RECORDED:]
    model, store = str(ensure("minilm")), folder / "store"
    common: dict[str, Any] = {"model": model, "store": store, "serve_options": SERVE}
    with Engine(folder / "engine.log", ENVIRONMENT, model=model, **MODEL) as engine:
        engine.build(recorded, layers=tuple(range(6)), min_tokens=2, max_tokens=64, **common)
        report = engine.calibrate(
            rest[:CALIBRATED], budget=BUDGET, min_tokens=2, max_tokens=64, **common
        )
        yield Calibrated(engine, store, report, rest[CALIBRATED:][:MEASURED])


def embeddings(engine: Engine, texts: list[str]) -> torch.Tensor:
    return torch.from_numpy(engine.embed(texts))


@pytest.fixture(scope="module")
def exact(calibrated: Calibrated) -> torch.Tensor:
    calibrated.engine.replace(model=str(ensure("minilm")), **MODEL)
    return embeddings(calibrated.engine, calibrated.texts)


def test_every_request_is_served_and_the_plan_keeps_its_promise(
    calibrated: Calibrated, exact: torch.Tensor
) -> None:
    calibrated.serve()
    counted = Counted(calibrated.engine)
    reused = embeddings(calibrated.engine, calibrated.texts)
    counts = counted.since()
    assert counts["attncache_sequences_total{hit}"] == len(calibrated.texts)
    promised = calibrated.report["predicted"]["template"]
    assert promised["groups_share"] >= 1 / 6
    kept = compare(exact, reused)
    low, high = promised["ci95"]["centred_cosine"]
    # Both are samples: a quarter more to either side for that of the texts measured here.
    margin = (high - low) / 2
    assert low - margin <= kept.centred_cosine <= high + margin
    assert kept.pairwise_spearman > BUDGET.rank - 0.01
    rows = {kind: counts[f"attncache_map_rows_total{{{kind}}}"] for kind in ("reused", "computed")}
    # A few sentences share most of their tokens with a recorded one and are served from that.
    share = rows["reused"] / sum(rows.values())
    assert share == pytest.approx(promised["groups_share"], abs=0.03)


def test_a_calibrated_store_says_what_it_is(calibrated: Calibrated) -> None:
    with LocalStore.open(calibrated.store) as store:
        published = store.manifest.published
        assert published is not None
        assert published.report["calibration"] == calibrated.report
        assert set(store.plan["sources"]) == set(calibrated.report["predicted"])
        assert store.artifact("templates")
    assert not list(calibrated.store.glob("calibration*"))


def test_canaries_stay_quiet_on_like_texts_and_are_answered_exactly(
    calibrated: Calibrated, exact: torch.Tensor
) -> None:
    calibrated.serve(canary_share=1.0)
    answered = embeddings(calibrated.engine, calibrated.texts)
    assert torch.equal(answered, exact)
    assert calibrated.engine.probe("probe_counters")["attncache_tripped_layers{}"] == 0


def test_drift_trips_layers_until_they_are_rearmed(calibrated: Calibrated) -> None:
    calibrated.serve(canary_share=0.5)
    engine = calibrated.engine
    for _ in range(2):
        engine.embed(DRIFT)
    tripped = engine.probe("probe_counters")["attncache_tripped_layers{}"]
    assert tripped > 0
    assert "attncache rearm" in engine.log
    counted = Counted(engine)
    engine.embed(calibrated.texts)
    fewer = counted.since()["attncache_map_rows_total{reused}"]
    rearm(calibrated.store)
    engine.embed(calibrated.texts)
    assert engine.probe("probe_counters")["attncache_tripped_layers{}"] == 0
    counted.since()
    engine.embed(calibrated.texts)
    assert counted.since()["attncache_map_rows_total{reused}"] > fewer
