# SPDX-License-Identifier: Apache-2.0
"""A real encoder behind a real server, on a whole public benchmark: MiniLM on STS-B."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attncache_vllm.evaluate.command import run
from attncache_vllm.evaluate.run import EvaluateOptions
from benchmarks.assets import ensure
from benchmarks.eval import prepare_store
from benchmarks.workloads import BUDGET, WORKLOADS

ENTRIES = 64  # templates serve every request; the full evaluation is `make eval`
SETTINGS = {"min_tokens": 2}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("encoder")
    # The default budget, which is about rankings; that of the workload is about its own metric.
    workload = replace(WORKLOADS["sts-b"], budget=BUDGET)
    sizes = replace(workload.full, record=ENTRIES, choose=400)
    files = replace(workload.prepare(folder, sizes), tune=None)
    model, store = ensure(workload.asset), folder / "store"
    prepare_store(workload, model, store, files, calibrated=True)
    return run(
        EvaluateOptions(
            model=str(model),
            store=store,
            out=folder / "out",
            pairs=files.measure,
            settings=SETTINGS,
            serve_options=workload.serve,
        )
    )


def test_exact_answers_are_as_good_as_the_model_is_known_to_be(report: dict[str, Any]) -> None:
    # The model's own figure, by its reference implementation in float32.
    assert report["rows"][0]["exact"] == pytest.approx(0.820, abs=0.002)


def test_a_calibrated_plan_serves_all_sentences_and_keeps_the_answers(
    report: dict[str, Any],
) -> None:
    (row,) = report["rows"]
    assert row["hit_rate"] > 0.98  # but for lengths that few texts had
    assert row["groups_reused_share"] >= 1 / 6
    # Of sentences that share tokens with a recorded one, the rows of the other tokens are computed.
    assert 0.1 < row["rows_reused_share"] <= row["groups_reused_share"]
    assert row["reuse"] != row["exact"]
    assert row["difference"] > -0.005
    assert row["rank_fidelity"] > 0.98
    assert row["self_retrieval"] > 0.98
