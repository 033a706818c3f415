# SPDX-License-Identifier: Apache-2.0
"""Where the time of a layer goes: operators of a stock engine, of hits, of misses and of the floor,
profiled in place.

A profiler slows small operators down: compare its shares, and take times from ``make bench``, whose
store this uses: ``python -m benchmarks.layer --bench build/bench``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from attncache_vllm.store.manifest import Manifest
from benchmarks.assets import ensure
from benchmarks.bench import bench_settings, texts_of
from benchmarks.engines import Mode, Prompts, Reply, engines

console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bench", type=Path, default=Path("build/bench"), help="folder of a bench")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model, store = ensure("smollm2"), options.bench / "store"
    layers = Manifest.read(store).namespace.num_layers
    texts = texts_of(model, options.length)
    asked: dict[str, tuple[Mode, Prompts]] = {
        "standard": ("standard", texts.stored[:1]),
        "miss": ("reuse", texts.unseen[:1]),
        "hit": ("reuse", texts.stored[:1]),
        "floor": ("floor", texts.stored[:1]),
    }
    profiles: dict[str, dict[str, float]] = {}
    with engines(model, options.length, options.bench, bench_settings(store)) as live:
        for column, (mode, prompts) in asked.items():
            for _ in range(3):
                live[mode].ask(prompts)
            replies = [live[mode].ask(prompts, profile=True) for _ in range(options.rounds)]
            profiles[column] = _medians(replies)
    path = options.bench / f"layer-{options.length}.json"
    path.write_text(json.dumps(profiles, indent=2) + "\n")
    table = Table(title=f"{options.length} tokens, ms per layer in the operator itself (medians)")
    for header in ("operator", *profiles):
        table.add_column(header)
    names = {name for profile in profiles.values() for name in profile}
    most = {name: max(profile.get(name, 0.0) for profile in profiles.values()) for name in names}
    for name in sorted(names, key=lambda name: -most[name])[:25]:
        cells = (f"{profile.get(name, 0.0) * 1e3 / layers:.3f}" for profile in profiles.values())
        table.add_row(name, *cells)
    console.print(table)
    console.print(f"written to {path}")


def _medians(replies: list[Reply]) -> dict[str, float]:
    names = {name for reply in replies for name in reply.operators}
    middle = len(replies) // 2
    return {
        name: sorted(reply.operators.get(name, 0.0) for reply in replies)[middle] for name in names
    }


if __name__ == "__main__":
    main()
