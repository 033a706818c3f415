# SPDX-License-Identifier: Apache-2.0
"""``make demo``: a real model behind two real servers, stock and with reuse, on real texts.

A store is built from one part of a news corpus. Then other articles and near-duplicates of stored
ones are embedded by both servers, request by request in turn, because a machine's speed drifts.
Whatever comes out is printed and written to ``build/demo/report.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from openai import OpenAI
from rich.console import Console
from rich.progress import track
from rich.table import Table

from attncache_vllm.calibrate.fidelity import compare
from attncache_vllm.reuse.plan import Plan
from attncache_vllm.store.manifest import Manifest
from benchmarks.assets import ensure
from benchmarks.corpus import near_duplicates, news
from benchmarks.ray_nodes import ray_nodes
from benchmarks.recording import build_store
from benchmarks.server import MODEL_NAME, serve

MIB = 1024 * 1024
MAX_TOKENS = 256
NEAR_DUPLICATE_SHARES = (0.02, 0.05, 0.10, 0.20)  # of the words, replaced at random
console = Console()


@dataclass(frozen=True)
class Request:
    """One text answered by both servers."""

    text: str
    outcome: str  # hit, miss or bypass, as the server counted it
    exact_ms: float
    reuse_ms: float
    exact: list[float]
    reuse: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=100, help="texts in the store")
    parser.add_argument("--requests", type=int, default=80, help="half of them near-duplicates")
    parser.add_argument("--store", choices=("embedded", "ray"), default="embedded")
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    options = parser.parse_args()
    # Ended politely or not, the context managers below end the servers.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(options.entries, options.requests, options.store, options.out)
    except KeyboardInterrupt:
        console.print("interrupted")
        sys.exit(130)


def run(entries: int, requests: int, home: str, folder: Path) -> None:
    started = time.monotonic()
    model = ensure("smollm2")
    # Articles that fill MAX_TOKENS: both sides cut there, as services cut or chunk documents.
    articles = [" ".join(text.split()[:MAX_TOKENS]) for text in news(entries + requests, 2000)]
    stored, unseen = articles[:entries], articles[entries : entries + requests // 2]
    per_share = -(-(requests - len(unseen)) // len(NEAR_DUPLICATE_SHARES))
    edited = [
        text
        for number, share in enumerate(NEAR_DUPLICATE_SHARES)
        for text in near_duplicates(stored[number * per_share :][:per_share], share, seed=number)
    ]
    texts = [text for pair in zip(unseen, edited, strict=False) for text in pair]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    store = build_store(model, stored, folder, MAX_TOKENS)
    with served_from(store, home, folder) as address:
        answered, bypasses = ask_both(model, address, texts, folder)
    report = {"store": home, **summarise(model, store, answered, bypasses)}
    report["seconds"] = round(time.monotonic() - started, 1)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    show(report)
    console.print(f"written to {folder / 'report.json'}")


@contextmanager
def served_from(store: Path, home: str, folder: Path) -> Iterator[str]:
    """The address at which servers find the store: its folder, or two shards it was loaded into."""
    if home == "embedded":
        yield str(store)
        return
    (folder / "ray").mkdir()
    console.print("[bold]attncache store up[/], [bold]load[/]: a Ray node with two shards")
    with ray_nodes(folder / "ray", nodes=1) as nodes:
        size = Manifest.read(store).segments
        room = 2 * sum(segment.size for segment in size) // MIB + 64
        nodes.store("up", "--config", nodes.settings(shard_mib=room))
        nodes.store("load", store, "--address", nodes.address)
        os.environ.update(nodes.environment)  # for the servers: Ray's token
        yield f"ray:{nodes.address}"


def ask_both(
    model: Path, address: str, texts: list[str], folder: Path
) -> tuple[list[Request], dict[str, int]]:
    """Every text answered by both servers, and the bypasses among them by reason."""
    common = ["--max-model-len", str(MAX_TOKENS)]
    selected = ["--attention-backend", "attncache", "--additional-config"]
    selected.append(json.dumps({"attncache": {"store": address}}))
    console.print("[bold]vllm serve[/] twice: --attention-backend attncache, and stock")
    with (
        serve(model, [*common, *selected], folder / "attncache.log") as reuse,
        serve(model, common, folder / "stock.log") as stock,
    ):
        clients = {server.url: server.client() for server in (stock, reuse)}
        for warm in ("warm up", "the quick brown fox jumps over the lazy dog " * 20):
            for client in clients.values():
                ask(client, warm)
        warm_bypasses = reuse.counters("attncache_bypasses", "reason")
        answers = []
        for number, text in enumerate(track(texts, "embedding", console=console)):
            before = reuse.counters("attncache_sequences", "outcome")
            # In turn, each server first for every other text of either kind, alone on the machine.
            timed = {}
            for server, other in ((stock, reuse), (reuse, stock))[:: 1 if number // 2 % 2 else -1]:
                other.pause()
                timed[server.url] = ask(clients[server.url], text)
                other.resume()
            after = reuse.counters("attncache_sequences", "outcome")
            (outcome,) = {key for key in after if after[key] != before.get(key, 0.0)}
            (exact_ms, exact), (reuse_ms, reused) = timed[stock.url], timed[reuse.url]
            answers.append(Request(text, outcome, exact_ms, reuse_ms, exact, reused))
        bypasses = {
            reason: int(count - warm_bypasses.get(reason, 0.0))
            for reason, count in reuse.counters("attncache_bypasses", "reason").items()
        }
    return answers, {reason: count for reason, count in bypasses.items() if count}


def ask(client: OpenAI, text: str) -> tuple[float, list[float]]:
    """Embed one text; milliseconds at the client, and the embedding."""
    started = time.perf_counter()
    answer = client.embeddings.create(
        model=MODEL_NAME,
        input=text,
        encoding_format="float",
        extra_body={"truncate_prompt_tokens": MAX_TOKENS},
    )
    return (time.perf_counter() - started) * 1e3, answer.data[0].embedding


def summarise(
    model: Path, store: Path, answered: list[Request], bypasses: dict[str, int]
) -> dict[str, Any]:
    manifest = Manifest.read(store)
    assert manifest.published is not None
    plan = Plan.from_dict(manifest.published.plan)
    hits = [request for request in answered if request.outcome == "hit"]
    return {
        "model": model.name,
        "store_entries": len(manifest.entries),
        "store_bytes": sum(entry.size for entry in manifest.entries),
        "requests": len(answered),
        "hits": len(hits),
        "misses": sum(request.outcome == "miss" for request in answered),
        "bypasses": bypasses,
        "layers_reused": len(plan.reused_layers),
        "layers_total": plan.num_layers,
        "max_distance": plan.sources["neighbour"].gate,
        **_times(answered),
        **fidelity_of(answered),
        "on_hits": {**_times(hits), **fidelity_of(hits)} if len(hits) >= 3 else {},
    }


def _times(answered: list[Request]) -> dict[str, float]:
    ratios = [request.exact_ms / request.reuse_ms for request in answered]
    return {
        "ms_exact_p50": round(statistics.median(r.exact_ms for r in answered), 2),
        "ms_reuse_p50": round(statistics.median(r.reuse_ms for r in answered), 2),
        "speedup_p50": round(statistics.median(ratios), 3),
    }


def fidelity_of(answered: list[Request]) -> dict[str, float]:
    """What the answers with reuse keep of the exact ones; a task's metric is not among it."""
    exact = torch.tensor([request.exact for request in answered])
    reused = torch.tensor([request.reuse for request in answered])
    figures = asdict(compare(exact, reused)).items()
    return {key: round(value, 5) for key, value in figures if value is not None}


def show(report: dict[str, Any]) -> None:
    table = Table(title="attncache demo", show_header=False)
    for key, value in report.items():
        if isinstance(value, dict):
            for inner, figure in value.items():
                table.add_row(f"{key}: {inner}", str(figure))
        else:
            table.add_row(key, str(value))
    console.print(table)


if __name__ == "__main__":
    main()
