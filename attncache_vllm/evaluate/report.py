# SPDX-License-Identifier: Apache-2.0
"""The report as a page: one file, no script, nothing fetched."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attncache_vllm.reuse.plan import SOURCES

Maps = tuple[str, dict[str, NDArray[np.float32]]]

# In the order of the page; what a row does not have is left out.
FIGURES = {
    "exact": "task metric, exact",
    "reuse": "task metric, reused",
    "difference": "reused - exact",
    "rank_fidelity": "rank fidelity",
    "self_retrieval": "self-retrieval",
    "centred_cosine": "centred cosine",
    "kl": "KL(exact || reused), nats",
    "agreement": "same choice",
    "stale_rank_fidelity": "old embedding: rank fidelity",
    "stale_self_retrieval": "old embedding: self-retrieval",
    "stale_centred_cosine": "old embedding: centred cosine",
    "gain_over_stale": "rank fidelity - that of the old embedding",
}
SHARES = {
    "hit_rate": "requests that reuse",
    "groups_reused_share": "KV groups reused",
    "layers_reused_share": "whole layers reused",
    "rows_reused_share": "map rows reused",
}
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } th { text-align: left; font-weight: 600 }
td, th { padding: .25em .9em .25em 0; border-bottom: 1px solid #ddd; vertical-align: top }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap }
svg { max-width: 100%; height: auto }
small, .note { color: #666 } pre { overflow-x: auto; background: #f6f6f6; padding: .7em }
@media (prefers-color-scheme: dark) { svg { background: #fff } }
"""


def write(report: dict[str, Any], maps: Maps, out: Path) -> None:
    """Write ``report.json`` and ``report.html`` into the folder ``out``.

    ``maps`` are as :func:`attncache_vllm.evaluate.maps.sample_maps` returns them.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (out / "report.html").write_text(page(report, maps), encoding="utf-8")


def page(report: dict[str, Any], maps: Maps) -> str:
    """The whole page; ``report`` as :func:`attncache_vllm.evaluate.run.evaluate` returns it."""
    title = f"Fidelity of {Path(report['model']).name}"
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>",
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>",
        f"<h1>{escape(title)}</h1>",
        f"<p>Store {escape(report['store'])}, {report['entries']} entries. Brackets are 95 % "
        "bootstrap intervals over the texts, paired.</p>",
    ]
    for row in report["rows"]:
        parts.append(f"<h2>{escape(row['workload'])}</h2>")
        parts.append(f"<p>{row['texts']} texts; task metric: {escape(row['metric'])}.</p>")
        parts.append(table(["", "reused", *_beside(row)], list(_figure_rows(row))))
        parts.append(table(["sequences", "number"], list(_count_rows(row["counts"]))))
    parts.append("<h2>Plan</h2>")
    parts.append(table(["source", "layers", "KV groups", "gate"], list(_plan_rows(report["plan"]))))
    parts += _plots(report, maps)
    settings = {key: report[key] for key in ("settings", "serve_options", "seed", "versions")}
    parts.append(f"<h2>Settings</h2><pre>{escape(json.dumps(settings, indent=2))}</pre></html>")
    return "\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of plain text."""
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>"
        + f"<td>{escape(row[0])}</td>"
        + "".join(f"<td class=n>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{cells}</tr>{body}</table>"


def figure_text(row: dict[str, Any] | None, name: str) -> str:
    """A figure and its interval as a person reads it; a dash where there is none."""
    if row is None or row.get(name) is None:
        return "-"
    if name not in row["ci95"]:
        return f"{row[name]:.4f}"
    low, high = row["ci95"][name]
    return f"{row[name]:.4f} [{low:.4f}, {high:.4f}]"


def _beside(row: dict[str, Any]) -> list[str]:
    return [] if row["published_rule"] is None else ["published rule"]


def _figure_rows(row: dict[str, Any]) -> Iterator[list[str]]:
    for name, text in (SHARES | FIGURES).items():
        if name in SHARES or name in row:
            cells = [text, figure_text(row, name)]
            if row["published_rule"] is not None:
                cells.append(figure_text(row["published_rule"], name))
            yield cells


def _count_rows(counts: dict[str, dict[str, int]]) -> Iterator[list[str]]:
    names = {"outcomes": "", "hits": "hit: ", "misses": "miss: ", "bypasses": "bypass: "}
    for counter, prefix in names.items():
        for label, count in counts[counter].items():
            yield [prefix + label, str(count)]


def _plan_rows(plan: dict[str, Any]) -> Iterator[list[str]]:
    for source in SOURCES:
        if (part := plan["sources"].get(source)) is not None:
            layers = sum(bool(groups) for groups in part["groups"])
            yield [
                source,
                f"{layers} of {plan['num_layers']}",
                str(sum(map(len, part["groups"]))),
                f"{part['gate']:.3g}",
            ]


def _plots(report: dict[str, Any], maps: Maps) -> Iterator[str]:
    try:
        from attncache_vllm.evaluate import plots
    except ImportError:
        yield "<p class=note>Plots need matplotlib: pip install 'attncache-vllm[plot]'.</p>"
        return
    calibration = report["calibration"] or {}

    def section(title: str, drawn: Callable[[], str] | None, otherwise: str) -> Iterator[str]:
        yield f"<h2>{title}</h2>"
        yield drawn() if drawn else f"<p class=note>{escape(otherwise)}</p>"

    uncalibrated = "The store is not calibrated: run attncache calibrate."
    damage, curve = calibration.get("sensitivity"), calibration.get("curve")
    yield from section(
        "Sensitivity per layer",
        (lambda: plots.sensitivity(damage)) if damage and any(map(any, damage.values())) else None,
        uncalibrated,
    )
    yield from section(
        "Saving against fidelity",
        (
            lambda: (
                plots.saving_curve(curve, "rank_fidelity")
                + plots.saving_curve(curve, "self_retrieval")
            )
        )
        if curve
        else None,
        uncalibrated,
    )
    canaries = report["canaries"]
    yield from section(
        "Canary error",
        (lambda: plots.canary_errors(canaries)) if canaries else None,
        "No canary was computed.",
    )
    title, panels = maps
    yield from section(
        "Maps side by side", (lambda: plots.maps(panels, title)) if panels else None, title
    )
