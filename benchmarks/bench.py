# SPDX-License-Identifier: Apache-2.0
"""``make bench``: what a hit and a miss cost end to end, against vLLM's own backend.

Three live engines are asked in turn: vLLM as it is (``standard``), the plugin (``hit``: every text
is stored, ``pruned``: the same from maps that have lost what a calibration often lets them,
``cold``: with no decoded map in memory, ``miss``: none is stored, ``mixed``: every other one
is), and the floor of what reuse of maps can cost (``floor``: V rows and no map). Lookup and loading
are inside the clock, speed-ups are those of pairs that were measured side by side. Maps are those
of the texts themselves in all layers but the first two: what other maps would keep is another
question, see ``make eval``. Writes ``report.json`` and ``bench.png`` below ``--out``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from attncache_vllm.reuse.plan import Plan
from attncache_vllm.store.manifest import Manifest
from benchmarks.assets import ensure
from benchmarks.corpus import news
from benchmarks.engines import Engine, Mode, Prompts, Reply, engines
from benchmarks.recording import build_store
from benchmarks.server import MEAN_EMBEDDINGS

LENGTHS = (128, 512, 2048)
FULL_LENGTHS = (128, 512, 1024, 2048, 4096)
# Every length and batch size is given about so long; a round of long ones takes its own time.
SECONDS, FULL_SECONDS = 30.0, 300.0
FEWEST_ROUNDS, MOST_ROUNDS = 4, 31
# Just wide enough for the rounding of a feature that was computed in another batch.
OWN_MAPS = 0.02
# The lookup runs beside the first layers, which also tolerate other maps least.
FIRST_REUSED = 2
# Tokens that an engine is asked before its turn: its threads wake up, and its weights are read.
WAKING = 64
# Tokens of a batch of many, and most sequences of it.
MANY_TOKENS, MANY = 1024, 8
COLUMNS = ("standard", "floor", "hit", "pruned", "cold", "miss", "mixed")
# Of a row, beside its largest probability, in every layer.
PRUNED = 0.05
console = Console()


@dataclass(frozen=True)
class Texts:
    """Token ids of texts of one length: those whose maps are stored, and others."""

    stored: list[list[int]]
    unseen: list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", help="tokens, with commas [default: 128,512,2048]")
    parser.add_argument("--full", action="store_true", help="1024 and 4096 tokens, more rounds")
    parser.add_argument("--rounds", type=int, help="[default: as many as the time allows]")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    lengths: tuple[int, ...] = FULL_LENGTHS if options.full else LENGTHS
    if options.lengths:
        lengths = tuple(int(part) for part in options.lengths.split(","))
    # Ended politely or not, the context managers of the engines end them.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        seconds = FULL_SECONDS if options.full else SECONDS
        run(lengths, options.rounds, seconds, options.out)
    except KeyboardInterrupt:
        console.print("interrupted")
        sys.exit(130)


def run(lengths: Sequence[int], rounds: int | None, seconds: float, folder: Path) -> None:
    started = time.monotonic()
    model, store = ensure("smollm2"), folder / "store"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    texts = {length: texts_of(model, length) for length in lengths}
    build(model, texts, folder)
    measured = {}
    with engines(model, max(MANY_TOKENS, *lengths), folder, bench_settings(store)) as live:
        for length in lengths:
            measured[str(length)] = measure(live, texts[length], 1, rounds, seconds)
            if (many := min(MANY, MANY_TOKENS // length)) > 1:
                figures = measure(live, texts[length], many, rounds, seconds)
                measured[str(length)]["many"] = figures
        peaks = {
            mode: round(engine.ask(texts[lengths[0]].unseen[:1]).peak_mib)
            for mode, engine in live.items()
        }
    report = {
        "lengths": measured,
        "peak_mib": peaks,
        "machine": machine(),
        "store": store_figures(store),
        "recording": recording_figures(folder, texts, measured),
        "seconds": round(time.monotonic() - started, 1),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(report, folder / "bench.png")
    show(report)
    console.print(f"written to {folder / 'report.json'} and {folder / 'bench.png'}")


def measure(
    live: dict[Mode, Engine], texts: Texts, size: int, rounds: int | None, budget: float
) -> dict[str, Any]:
    """Figures of batches of ``size``; each round asks every engine once for every column. Without
    ``rounds`` there are as many as ``budget`` seconds allow."""
    stored, unseen = texts.stored, texts.unseen
    seconds: dict[str, list[float]] = {column: [] for column in COLUMNS}
    worst = dict.fromkeys(("hit", "pruned"), 0.0)
    answers: dict[str, Reply] = {}
    label = f"{len(stored[0])} tokens, batches of {size}"
    for engine in live.values():
        engine.ask(unseen[:size])  # the first batch of a shape is slow
    for dropped in (0.0, PRUNED):
        for start in range(0, len(stored), size):
            live["reuse"].ask(stored[start : start + size], dropped=dropped)
    number, wanted = 0, rounds or MOST_ROUNDS
    started = time.monotonic()
    while number < wanted:
        hit, miss = _batch(stored, number, size), _batch(unseen, number, size)
        half = size // 2
        # Who is asked what, and how many hits that must be.
        asked: dict[str, tuple[Mode, list[Prompts], int]] = {
            "standard": ("standard", [hit], 0),
            "floor": ("floor", [hit], 0),
            "hit": ("reuse", [hit], size),
            "pruned": ("reuse", [hit], size),
            "cold": ("reuse", [hit], size),
            "miss": ("reuse", [miss], 0),
            "mixed": ("reuse", [hit[:half] + miss[half:]] if half else [hit, miss], half or 1),
        }
        # In another order every round, so that no column always follows the same one.
        order = COLUMNS[number % len(COLUMNS) :] + COLUMNS[: number % len(COLUMNS)]
        for column in order:
            mode, batches, hits = asked[column]
            # Off the clock: no engine comes to its turn colder than another.
            live[mode].ask([batches[0][0][:WAKING]])
            dropped = PRUNED if column == "pruned" else 0.0
            replies = [
                live[mode].ask(batch, cold=column == "cold", dropped=dropped) for batch in batches
            ]
            if (found := sum(reply.hits for reply in replies)) != hits:
                raise RuntimeError(
                    f"{label}: {hits} of a batch of {column!r} must be hits, got {found}; the "
                    "figures would be those of something else"
                )
            answers[column] = replies[0]
            total = sum(reply.seconds for reply in replies)
            seconds[column].append(total / sum(map(len, batches)))
        for column in worst:
            error = _error(answers[column], answers["standard"])
            worst[column] = max(worst[column], error)
        if number == 0 and rounds is None:
            allowed = round(budget / (time.monotonic() - started))
            wanted = min(MOST_ROUNDS, max(FEWEST_ROUNDS, allowed))
        number += 1
    console.print(f"{label}: {number} rounds")
    tokens = len(stored[0])
    return {
        **{f"{column}_ms": _ms(seconds[column], 50) for column in COLUMNS},
        "p99_ms": {column: _ms(seconds[column], 99) for column in COLUMNS},
        "tokens_per_second": {
            column: round(tokens / statistics.median(seconds[column])) for column in COLUMNS
        },
        "hit_speedup": _ratios(seconds["standard"], seconds["hit"]),
        "pruned_speedup": _ratios(seconds["standard"], seconds["pruned"]),
        "cold_speedup": _ratios(seconds["standard"], seconds["cold"]),
        "mixed_speedup": _ratios(seconds["standard"], seconds["mixed"]),
        "floor_speedup": _ratios(seconds["standard"], seconds["floor"]),
        "miss_overhead": [
            round(1 / ratio - 1, 4)
            for ratio in reversed(_ratios(seconds["standard"], seconds["miss"]))
        ],
        "hit_over_floor": _ratios(seconds["floor"], seconds["hit"]),
        "pruned_over_floor": _ratios(seconds["floor"], seconds["pruned"]),
        "batch": size,
        "rounds": number,
        "worst_error": {column: round(error, 5) for column, error in worst.items()},
    }


def _batch(texts: list[list[int]], number: int, size: int) -> list[list[int]]:
    return [texts[(number * size + place) % len(texts)] for place in range(size)]


def _error(found: Reply, exact: Reply) -> float:
    """The largest relative error of an answer."""
    a, b = torch.tensor(found.answers), torch.tensor(exact.answers)
    return float(((a - b).norm(dim=1) / b.norm(dim=1)).max())


def _ms(seconds: list[float], percent: float) -> float:
    return round(float(torch.tensor(seconds).quantile(percent / 100)) * 1e3, 2)


def _ratios(before: list[float], after: list[float]) -> list[float]:
    """5 %, median and 95 % of the ratios of pairs."""
    ratios = torch.tensor(before) / torch.tensor(after)
    return [round(float(ratios.quantile(q)), 4) for q in (0.05, 0.5, 0.95)]


def texts_of(model: Path, length: int) -> Texts:
    """Texts that have exactly ``length`` tokens, cut out of news."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    stream = tokenizer("\n\n".join(news(2000))).input_ids
    wanted = max(2, min(MANY, MANY_TOKENS // length))
    found: list[list[int]] = []
    start = 0
    while len(found) < 2 * wanted:
        ids = stream[start : start + length]
        start += max(1, length // 8)
        if len(ids) < length:
            raise RuntimeError(f"the corpus must have {2 * wanted} texts of {length} tokens")
        # Cut at a token and read again, as a corpus is read, a text may have other tokens.
        if tokenizer(tokenizer.decode(ids).strip()).input_ids == ids:
            found.append(ids)
            start += length
    return Texts(found[:wanted], found[wanted:])


def build(model: Path, texts: dict[int, Texts], folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [tokenizer.decode(ids) for part in texts.values() for ids in part.stored]
    build_store(model, rows, folder, max(texts), "--layers", "2-29", *MEAN_EMBEDDINGS)


def bench_settings(store: Path) -> dict[str, Any]:
    """The plugin's settings."""
    return {
        "store": str(store.resolve()),
        "plan": str(own_maps_plan(store).resolve()),
        # A late lookup would be a miss. It is waited for, and the wait is on the clock.
        "lookup_deadline_ms": 60_000.0,
        "resident_mib": 16_384,
        "canary_share": 0.0,  # their share is a setting
        "only_where_it_pays": False,  # where it does not is to be seen
    }


def own_maps_plan(store: Path) -> Path:
    """Every layer but the first two from the nearest entry, which is the text's own."""
    manifest = Manifest.read(store)
    namespace = manifest.namespace
    layers = range(FIRST_REUSED, namespace.num_layers)
    plan = Plan.reusing(namespace.num_layers, namespace.num_kv_heads, layers, OWN_MAPS, 0)
    path = store.with_name("plan.json")
    path.write_text(json.dumps(plan.to_dict()))
    return path


def store_figures(store: Path) -> dict[str, Any]:
    manifest = Manifest.read(store)
    sizes: dict[int, list[int]] = {}
    for entry in manifest.entries:
        sizes.setdefault(entry.length, []).append(entry.size)
    return {
        "entries": len(manifest.entries),
        "bytes_per_entry": {length: round(statistics.mean(of)) for length, of in sizes.items()},
    }


def recording_figures(
    folder: Path, texts: dict[int, Texts], measured: dict[str, Any]
) -> dict[str, Any]:
    """What recording took, its first text's checks included, and how often as long as vLLM takes
    to answer the same texts one by one."""
    build = json.loads((folder / "build.json").read_text())
    seconds = build["recorded"] / build["sequences_per_second"]
    prefill_ms = sum(
        measured[str(length)]["standard_ms"] * len(part.stored) for length, part in texts.items()
    )
    return {
        "texts": build["recorded"],
        "sequences_per_second": round(build["sequences_per_second"], 2),
        "prefills": round(seconds * 1e3 / prefill_ms, 2),
    }


def machine() -> dict[str, Any]:
    flags = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    name = next((line.split(":")[1].strip() for line in flags.splitlines() if "name" in line), "")
    return {
        "cpu": name or platform.processor(),
        "features": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if f" {f}" in flags],
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {n: version(n) for n in ("attncache-vllm", "vllm", "torch")},
    }


def show(report: dict[str, Any]) -> None:
    table = Table(title="ms per sequence (medians); ratios of pairs: 5 %, median, 95 %")
    for header in ("tokens", "batch", *COLUMNS):
        table.add_column(header)
    ratios = {
        "hit speed-up": "hit_speedup",
        "pruned": "pruned_speedup",
        "of the floor": "hit_over_floor",
        "pruned of the floor": "pruned_over_floor",
    }
    for header in (*ratios, "miss overhead"):
        table.add_column(header)
    for length, alone in report["lengths"].items():
        for row in (alone, *([alone["many"]] if "many" in alone else [])):
            table.add_row(
                length,
                str(row["batch"]),
                *(f"{row[f'{name}_ms']:.1f}" for name in COLUMNS),
                *(" ".join(f"{ratio:.2f}" for ratio in row[key]) for key in ratios.values()),
                " ".join(f"{share:.1%}" for share in row["miss_overhead"]),
            )
    # As wide as it has to be, in a log as well.
    Console(width=200).print(table)
    recording = report["recording"]
    console.print(
        f"recording: {recording['texts']} texts, {recording['sequences_per_second']} a second, "
        f"{recording['prefills']} times as long as vLLM takes to answer them"
    )


def plot(report: dict[str, Any], path: Path) -> None:
    """Speed-ups over vLLM's own backend by length, batches of one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lengths = [int(length) for length in report["lengths"]]
    for name in ("floor", "pruned", "hit", "cold", "mixed"):
        triples = [row[f"{name}_speedup"] for row in report["lengths"].values()]
        low, middle, high = (list(part) for part in zip(*triples, strict=True))
        axes.plot(lengths, middle, marker="o", label=name)
        axes.fill_between(lengths, low, high, alpha=0.2)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="tokens", ylabel="speed-up over vLLM's own backend")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
