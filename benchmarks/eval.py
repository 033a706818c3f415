# SPDX-License-Identifier: Apache-2.0
"""``make eval``: what reuse keeps and costs in fidelity, one row for each workload and its targets.

Each workload's store is built, its plan chosen and its answers compared by the commands a user
would call, on texts that have nothing in common. Stores and rows that are there are kept:
``--again`` repeats rows, stores go with their folder. Writes ``report.json`` and ``report.html``
below ``--out``. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from attncache_vllm.calibrate.corpus import token_hash
from attncache_vllm.errors import AttnCacheError
from attncache_vllm.evaluate import command
from attncache_vllm.evaluate.files import write_rows
from attncache_vllm.evaluate.report import STYLE, figure_text, table
from attncache_vllm.evaluate.run import EvaluateOptions
from attncache_vllm.evaluate.server import group
from attncache_vllm.store.manifest import Manifest
from benchmarks.assets import AssetError, ensure
from benchmarks.workloads import WORKLOADS, Files, Target, Unavailable, Workload

# The published rule takes the nearest entry; with this gate it does so for every request, as
# ours does, and its loss is that of its maps. Predicted distances are about 1 at most.
EVERY_NEIGHBOUR = 10.0
console = Console()


class Failed(Exception):
    """A step of a workload failed; the message says where its log is."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help=f"workloads, of {','.join(WORKLOADS)}")
    parser.add_argument("--quick", action="store_true", help="few texts: does it run at all?")
    parser.add_argument("--again", action="store_true", help="also rows that are there")
    parser.add_argument(
        "--uncalibrated", action="store_true", help="serve the plan that the build made"
    )
    parser.add_argument("--out", type=Path, help="folder [default: build/eval, or -quick]")
    options = parser.parse_args()
    folder = options.out or Path("build/eval-quick" if options.quick else "build/eval")
    names = options.only.split(",") if options.only else list(WORKLOADS)
    if unknown := sorted(set(names) - WORKLOADS.keys()):
        parser.error(f"a workload is one of {', '.join(WORKLOADS)}, got {', '.join(unknown)}")
    # Ended politely or not, the context managers of the processes end them.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        problems = {}
        for name in names:
            kept = folder / "rows" / f"{name}.json"
            if kept.exists() and not options.again:
                console.print(f"[bold]{name}[/]: kept from an earlier run")
                continue
            try:
                row = measure(name, folder, options.quick, not options.uncalibrated)
            except (Unavailable, Failed, AttnCacheError, AssetError) as error:
                problems[name] = str(error)
                console.print(f"{name}: {error}", style="red", markup=False)
                continue
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
        report(folder, problems)
    except KeyboardInterrupt:
        console.print("interrupted; the rows that are done are kept")
        sys.exit(130)
    if problems:
        sys.exit(1)


def measure(name: str, folder: Path, quick: bool, calibrated: bool) -> dict[str, Any]:
    """Build, calibrate and evaluate one workload; its row of the report."""
    workload = WORKLOADS[name]
    console.rule(workload.title)
    work = folder / name
    files = workload.prepare(work, workload.quick if quick else workload.full)
    model, store = ensure(workload.asset), folder / "stores" / workload.store
    prepare_store(workload, model, store, files, calibrated)
    measured = files.measure
    if workload.task == "edits":
        measured = unseen_edits(measured, Manifest.read(store), model)
    task: dict[str, Any] = {workload.task: measured}
    found = command.run(
        EvaluateOptions(
            model=str(model),
            store=store,
            out=work,
            published_gate=EVERY_NEIGHBOUR,
            settings={"min_tokens": workload.tokens[0]},
            # Nothing is timed: three servers a workload are not worth being compiled.
            serve_options=(*workload.serve, "--enforce-eager"),
            **task,
        )
    )
    return row_of(workload, found)


def prepare_store(
    workload: Workload, model: Path, store: Path, files: Files, calibrated: bool
) -> None:
    """Record the maps of all layers and choose the plan, each unless it is done."""
    shortest, longest = workload.tokens
    lengths = ("--min-tokens", str(shortest), "--max-tokens", str(longest))
    if not has_plan(store):
        attncache(
            store.with_suffix(".build.log"),
            *("build", str(model), "--store", str(store), "--corpus", str(files.record)),
            *("--layers", workload.layers, "--max-entries", "100000"),
            *(*lengths, *workload.serve),
        )
    if calibrated and not is_calibrated(store):
        attncache(
            store.with_suffix(".calibrate.log"),
            *("calibrate", str(model), "--store", str(store), "--corpus", str(files.choose)),
            *("--budget", workload.budget, *lengths),
            *(() if files.tune is None else (f"--{workload.task}", str(files.tune))),
            *workload.serve,
        )


def unseen_edits(path: Path, manifest: Manifest, model: Path) -> Path:
    """The rows of a file of edits but those whose originals a calibration used, in a file beside
    it."""
    from transformers import AutoTokenizer

    assert manifest.published is not None
    calibration = manifest.published.report.get("calibration", {})
    parts = (("predicted", "aligned"), ("rehearsed", "edits"))
    taken = [calibration.get(part, {}).get(name, {}).get("entries", []) for part, name in parts]
    used = {manifest.entries[entry_id].token_hash for entries in taken for entry_id in entries}
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [
        row
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())
        if token_hash(tokenizer(row["original"]).input_ids) not in used
    ]
    return write_rows(path.with_name("measure-unseen.jsonl"), rows)


def has_plan(store: Path) -> bool:
    return (store / "manifest").exists() and Manifest.read(store).published is not None


def is_calibrated(store: Path) -> bool:
    published = Manifest.read(store).published
    return published is not None and "calibration" in published.report


def attncache(log: Path, *arguments: str) -> None:
    """Run the command as a user would; what it prints goes to ``log``.

    Raises:
        Failed: it does not end well.
    """
    line = [sys.executable, "-m", "attncache_vllm", *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w") as output,
        console.status(f"attncache {arguments[0]}: see {log}"),
        group(line, stdout=output, stderr=output) as process,
    ):
        if process.wait() != 0:
            raise Failed(f"attncache {arguments[0]} exited with {process.returncode}; see {log}")


def row_of(workload: Workload, found: dict[str, Any]) -> dict[str, Any]:
    """A line of the report from the report of an evaluation of one task."""
    (row,) = found["rows"]
    calibration = found["calibration"] or {}
    predicted = {part: calibration.get(part, {}) for part in ("budget", "predicted", "rehearsed")}
    targets = [
        {"target": target.text, "figure": target.figure, "met": target.met(row)}
        for target in (*workload.targets, *prediction_targets(workload, predicted))
    ]
    return {
        **_line(row),
        "model": row["model"],
        "workload": workload.title,
        "published_rule": _line(row["published_rule"]),
        "targets": targets,
        "details": {
            **row,
            **predicted,
            "plan": found["plan"],
            "entries": found["entries"],
            "versions": found["versions"],
        },
    }


# The keys of a line, in their order.
LINE = (
    *("model", "workload", "groups_reused_share", "layers_reused_share", "rows_reused_share"),
    *("hit_rate", "exact", "reuse", "rank_fidelity", "self_retrieval", "ci95"),
)


def _line(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in LINE if key in row}


# A budget's parts, and what they are called in predictions and in measured intervals.
PREDICTED = {
    "rank": ("rank_fidelity", "rank_fidelity"),
    "self_retrieval": ("self_retrieval", "self_retrieval"),
    "task": ("task_change", "difference"),
}


def prediction_targets(workload: Workload, calibration: dict[str, Any]) -> list[Target]:
    """That what a calibration predicts of its budget lies inside the measured interval: a bound
    each way.

    Fidelity is that of its rehearsal on texts like those of the workload; a task's metric is
    predicted for templates only.
    """
    texts = "edits" if workload.task == "edits" else "corpus"
    figures = {
        **calibration["predicted"].get("template", {}),
        **calibration["rehearsed"].get(texts, {}),
    }
    targets = []
    for part, (name, measured) in PREDICTED.items():
        if calibration["budget"].get(part) is not None and name in figures:
            value = figures[name]
            text = f"predicted {name} {value:.4f}"
            targets.append(Target(f"{text} not below", f"ci95.{measured}.0", at_most=value))
            targets.append(Target(f"{text} not above", f"ci95.{measured}.1", at_least=value))
    return targets


def report(folder: Path, problems: dict[str, str]) -> None:
    """Write and print what rows there are, in the order of the workloads."""
    paths = {name: folder / "rows" / f"{name}.json" for name in WORKLOADS}
    rows = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name, path in paths.items()
        if path.exists()
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = {"rows": list(rows.values()), "not_run": problems}
    (folder / "report.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page(rows, problems), encoding="utf-8")
    shown = Table(title="fidelity of reuse")
    for header in ("workload", "target", "measured", "published rule", ""):
        shown.add_column(header)
    for name, row in rows.items():
        for cells in target_lines(row):
            shown.add_row(name, *cells)
            name = ""
        shown.add_section()
    console.print(shown)
    for name, why in problems.items():
        console.print(f"{name} was not run: {why}", markup=False)
    console.print(f"written to {folder / 'report.json'} and {folder / 'report.html'}")


def target_lines(row: dict[str, Any]) -> list[list[str]]:
    """Each target, what was measured, what the published rule reaches, and whether it is met."""
    details = row["details"]
    marks = {True: "met", False: "MISSED", None: "not measured"}
    lines = []
    for target in row["targets"]:
        figure = target["figure"]
        name = figure.split(".")[1] if figure.startswith("ci95.") else figure
        beside = figure_text({**details["published_rule"], "ci95": {}}, name)
        cells = [target["target"], figure_text(details, name), beside, marks[target["met"]]]
        lines.append(cells)
    return lines


def page(rows: dict[str, dict[str, Any]], problems: dict[str, str]) -> str:
    """A page of all rows: their targets, and a link to each evaluation's own page."""
    header = ("target", "measured", "published rule", "")
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Fidelity of reuse</title>",
        f"<style>{STYLE}</style><h1>Fidelity of reuse</h1>",
    ]
    for name, row in rows.items():
        parts.append(f"<h2>{escape(row['model'])}, {escape(row['workload'])}</h2>")
        parts.append(table(header, target_lines(row)))
        parts.append(f"<p><a href='{name}/report.html'>All figures</a></p>")
    parts += [f"<p>{escape(f'{name} was not run: {why}')}</p>" for name, why in problems.items()]
    return "\n".join(parts) + "</html>\n"


if __name__ == "__main__":
    main()
