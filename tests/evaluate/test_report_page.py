# SPDX-License-Identifier: Apache-2.0
"""The page of a report: complete, readable without a network, and safe with any text in it."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest

from attncache_vllm.evaluate import plots
from attncache_vllm.evaluate.report import figure_text, page, table
from attncache_vllm.reuse.plan import Plan, SourcePlan

PLAN = Plan(0, 3, {"template": SourcePlan(((), (0,), (0, 1)))})
CALIBRATION = {
    # As of a calibration: layers that cannot be served are empty, and of exact prefixes nothing is
    # measured.
    "sensitivity": {"template": [[], [0.1, 0.2], [0.0, 0.1]], "prefix": []},
    "curve": {
        "template": [
            {
                "groups_share": share,
                "rank_fidelity": 1 - share / 10,
                "self_retrieval": 1.0,
                "ci95": {"rank_fidelity": [0.9 - share / 10, 1.0]},
            }
            for share in (0.1, 0.5, 1.0)
        ]
    },
}


def report(**changes: Any) -> dict[str, Any]:
    row = {
        "workload": "texts",
        "metric": "rank fidelity",
        "texts": 3,
        "hit_rate": 1.0,
        "rank_fidelity": 0.987,
        "ci95": {"rank_fidelity": [0.98, 0.99]},
        "published_rule": {"hit_rate": 0.5, "rank_fidelity": 0.432, "ci95": {}},
        "counts": {
            "outcomes": {"hit": 3},
            "hits": {"template": 3},
            "misses": {},
            "bypasses": {},
            "rows": {},
        },
    }
    return {
        "model": "models/<little>",
        "store": "maps",
        "entries": 7,
        "rows": [row],
        "plan": PLAN.to_dict(),
        "calibration": CALIBRATION,
        "canaries": [
            {"layer": layer, "source": "template", "error": 0.01 * layer} for layer in (2, 1)
        ],
        "settings": {},
        "serve_options": [],
        "seed": 0,
        "versions": {},
    } | changes


MAPS = ("layer 1", {"own map": np.eye(4), "template": np.full((4, 4), 0.25)})


def test_the_page_shows_figures_of_both_sides_and_all_plots() -> None:
    shown = page(report(), MAPS)
    assert "0.9870 [0.9800, 0.9900]" in shown and "0.4320" in shown
    assert "published rule" in shown and "hit: template" in shown
    assert shown.count("<svg") == 5  # sensitivity, two curves, canaries, maps
    assert "&lt;little&gt;" in shown and "<little>" not in shown


def test_what_is_not_there_is_said_and_not_drawn() -> None:
    shown = page(report(calibration=None, canaries=[]), ("maps of windowed layers", {}))
    assert "<svg" not in shown
    for said in ("not calibrated", "No canary", "maps of windowed layers"):
        assert said in shown


def test_without_the_published_rule_there_is_no_column_for_it() -> None:
    plain = report()
    plain["rows"][0]["published_rule"] = None
    assert "published rule" not in page(plain, MAPS)


def test_tables_hold_any_text() -> None:
    assert "<td>&lt;b&gt; &amp; &#x27;</td>" in table(["a"], [["<b> & '"]])


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (None, "-"),
        ({"ci95": {}}, "-"),
        ({"x": None, "ci95": {}}, "-"),
        ({"x": 0.5, "ci95": {}}, "0.5000"),
        ({"x": -0.5, "ci95": {"x": [-0.6, 0.25]}}, "-0.5000 [-0.6000, 0.2500]"),
    ],
)
def test_a_figure_stands_with_its_interval(row: dict[str, Any] | None, text: str) -> None:
    assert figure_text(row, "x") == text


def test_plots_are_well_formed_and_the_same_each_time() -> None:
    drawn = [
        plots.sensitivity(CALIBRATION["sensitivity"]),
        plots.saving_curve(CALIBRATION["curve"], "rank_fidelity"),
        plots.canary_errors(report()["canaries"]),
        plots.maps(MAPS[1], MAPS[0]),
    ]
    for svg in drawn:
        ElementTree.fromstring(svg)
    assert drawn[0] == plots.sensitivity(CALIBRATION["sensitivity"])


def test_a_curve_without_the_figure_is_drawn_empty() -> None:
    ElementTree.fromstring(plots.saving_curve({"aligned": [{"groups_share": 1.0}]}, "kl"))
