# SPDX-License-Identifier: Apache-2.0
"""A real encoder behind a real server, on a whole public benchmark: MiniLM on STS-B."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import eval_encoders

ENTRIES = 800  # of some ten thousand; the full evaluation is `make eval-encoders`


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("encoder") / "eval"
    eval_encoders.run("2-3", ENTRIES, max_distance=1.0, folder=folder)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def test_exact_answers_are_as_good_as_the_model_is_known_to_be(report: dict[str, Any]) -> None:
    # The model's own figure, by its reference implementation in float32.
    assert report["details"]["pairs"] == 1379
    assert report["exact"] == pytest.approx(0.820, abs=0.002)


def test_reuse_in_the_middle_layers_of_nearly_all_sentences_costs_little(
    report: dict[str, Any],
) -> None:
    assert (report["layers_reused"], report["layers_total"]) == (2, 6)
    assert report["hit_rate"] > 0.9
    assert report["reuse"] != report["exact"]
    assert report["reuse"] > report["exact"] - 0.02
