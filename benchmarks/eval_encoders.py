# SPDX-License-Identifier: Apache-2.0
"""``make eval-encoders``: what reuse costs a real encoder on a public benchmark.

MiniLM embeds the sentences of the STS benchmark's test split through a real server, once stock and
once with reuse, whose store holds sentences of the training and dev splits. Either time Spearman's
correlation between the cosine of two sentences and people's scores is taken over all pairs.
Nothing here is timed. Writes ``report.json`` below ``--out``.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from attncache_vllm.calibrate.fidelity import compare, spearman
from attncache_vllm.store.manifest import Manifest
from benchmarks.assets import ensure
from benchmarks.corpus import Pair, stsb_pairs
from benchmarks.server import MODEL_NAME, group, serve

MAX_TOKENS = 64  # the longest test sentence has 46
BATCH = 32
RESAMPLES = 1000
# vLLM's choice for a float32 pooling model is float16, which is slow on CPUs without FP16 units.
DTYPE = ("--dtype", "bfloat16")
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", default="2-3", help="layers with reuse, of 0-5")
    parser.add_argument("--entries", type=int, default=4000, help="sentences in the store")
    parser.add_argument(
        "--max-distance", type=float, default=1.0, help="gate; by default every match is taken"
    )
    parser.add_argument("--out", type=Path, default=Path("build/eval-encoders"))
    options = parser.parse_args()
    # Ended politely or not, the context managers below end the servers.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(options.layers, options.entries, options.max_distance, options.out)
    except KeyboardInterrupt:
        console.print("interrupted")
        sys.exit(130)


def run(layers: str, entries: int, max_distance: float, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model, pairs = ensure("minilm"), stsb_pairs("test")
    sentences = unique(pairs)
    exact, _ = embed(model, sentences, [], folder / "stock.log")
    store = build_store(model, layers, entries, max_distance, set(sentences), folder)
    settings = {"store": str(store), "min_tokens": 1, "lookup_deadline_ms": 10_000}
    selected = ["--attention-backend", "attncache"]
    selected += ["--additional-config", json.dumps({"attncache": settings})]
    reused, outcomes = embed(model, sentences, selected, folder / "attncache.log")
    report = summarise(model, store, pairs, exact, reused, outcomes)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    show(report)
    console.print(f"written to {folder / 'report.json'}")


def unique(pairs: Sequence[Pair]) -> list[str]:
    """The different sentences of ``pairs``, in their order."""
    return list(dict.fromkeys(text for pair in pairs for text in (pair.first, pair.second)))


def build_store(
    model: Path, layers: str, entries: int, max_distance: float, unseen: set[str], folder: Path
) -> Path:
    """Record sentences of the training and dev splits with the command a user would call."""
    store, corpus = folder / "store", folder / "corpus.jsonl"
    # Some test sentences stand in the other splits, too: their own maps would be exact.
    recorded = [
        text for text in unique(stsb_pairs("train") + stsb_pairs("dev")) if text not in unseen
    ]
    random.Random(0).shuffle(recorded)  # the splits are sorted by source
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in recorded))
    command = [
        *(sys.executable, "-m", "attncache_vllm", "build", str(model), *DTYPE),
        *("--corpus", str(corpus), "--store", str(store), "--layers", layers),
        *("--min-tokens", "2", "--max-tokens", str(MAX_TOKENS)),
        *("--max-entries", str(entries), "--max-distance", str(max_distance)),
    ]
    with (
        (folder / "build.log").open("w") as log,
        console.status(f"attncache build: see {log.name}"),
        group(command, stdout=log, stderr=log) as process,
    ):
        if process.wait() != 0:
            raise SystemExit(f"attncache build failed; see {log.name}")
    return store


def embed(
    model: Path, texts: Sequence[str], arguments: list[str], log: Path
) -> tuple[Tensor, Counter[str]]:
    """Embeddings ``[N, D]`` float64 of ``texts`` by a server of its own, and its outcomes."""
    console.print(f"[bold]vllm serve[/] {model.name} {' '.join(arguments[:2])}")
    with serve(model, [*DTYPE, *arguments], log, task=()) as server:
        client = server.client()
        before = Counter(server.counters("attncache_sequences", "outcome"))
        vectors = []
        for start in track(range(0, len(texts), BATCH), "embedding", console=console):
            batch = list(texts[start : start + BATCH])
            answer = client.embeddings.create(
                model=MODEL_NAME, input=batch, encoding_format="float"
            )
            vectors += [item.embedding for item in answer.data]
        outcomes = Counter(server.counters("attncache_sequences", "outcome"))
        outcomes.subtract(before)
    return torch.tensor(vectors, dtype=torch.float64), outcomes


def summarise(
    model: Path,
    store: Path,
    pairs: Sequence[Pair],
    exact: Tensor,
    reused: Tensor,
    outcomes: Counter[str],
) -> dict[str, Any]:
    manifest = Manifest.read(store)
    assert manifest.published is not None
    layers = manifest.published.plan["layers"]
    gold = torch.tensor([pair.score for pair in pairs], dtype=torch.float64)
    by_exact, by_reuse = similarities(exact, pairs), similarities(reused, pairs)
    interval = difference_interval(by_exact, by_reuse, gold)
    return {
        "model": model.name,
        "task": "STS-B test, Spearman",
        "exact": round(spearman(by_exact, gold), 4),
        "reuse": round(spearman(by_reuse, gold), 4),
        "layers_reused": sum(layer["source"] == "cached" for layer in layers),
        "layers_total": len(layers),
        "hit_rate": round(outcomes["hit"] / len(exact), 4),
        "details": {
            "pairs": len(pairs),
            "sentences": len(exact),
            "outcomes": {key: int(count) for key, count in sorted(outcomes.items())},
            "store_entries": len(manifest.entries),
            "store_bytes": sum(entry.size for entry in manifest.entries),
            "max_distance": max(layer["max_distance"] for layer in layers),
            "difference_95": [round(bound, 4) for bound in interval],
            **{key: round(value, 4) for key, value in asdict(compare(exact, reused)).items()},
            "dtype": DTYPE[1],
            "versions": {name: version(name) for name in ("attncache-vllm", "vllm", "torch")},
        },
    }


def similarities(embeddings: Tensor, pairs: Sequence[Pair]) -> Tensor:
    """Cosine of the two sentences of each pair; rows of ``embeddings`` as ``unique(pairs)``."""
    row = {text: number for number, text in enumerate(unique(pairs))}
    first = embeddings[[row[pair.first] for pair in pairs]]
    second = embeddings[[row[pair.second] for pair in pairs]]
    return torch.cosine_similarity(first, second, dim=-1)


def difference_interval(
    exact: Tensor, reused: Tensor, gold: Tensor, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of Spearman(reused, gold) - Spearman(exact, gold), all ``[N]``.

    Pairs are drawn anew, the same for both: what is left is what reuse changes.
    """
    draw = torch.Generator().manual_seed(seed)
    differences = []
    for _ in range(RESAMPLES):
        picked = torch.randint(len(gold), (len(gold),), generator=draw)
        differences.append(
            spearman(reused[picked], gold[picked]) - spearman(exact[picked], gold[picked])
        )
    low, high = torch.quantile(torch.tensor(differences), torch.tensor([0.025, 0.975])).tolist()
    return low, high


def show(report: dict[str, Any]) -> None:
    table = Table(title=report["task"], show_header=False)
    for key, value in (report | report["details"]).items():
        if key != "details":
            table.add_row(key, str(value))
    console.print(table)


if __name__ == "__main__":
    main()
