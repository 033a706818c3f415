# SPDX-License-Identifier: Apache-2.0
"""How long a batch of features is searched for among many, on one thread, and how many of the true
nearest are found: ``python -m benchmarks.lookup``. Writes ``lookup.json`` below ``--out``.

Features are drawn around a tenth as many centres, since texts come in kinds; queries are entries
with noise added, near ones as an edited text's and far ones as another text's of its kind. The time
is that of the store's own search: proposals of the index and exact distances of them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from rich.console import Console

from attncache_vllm.store.index import FeatureIndex, chosen_factory
from attncache_vllm.store.records import MAX_LENGTH

DIM, QUERIES, NEIGHBOURS = 128, 32, 8
REPEATS = 50
# Of queries, in units of the distance between entries of one kind.
NOISE = {"near": 0.1, "far": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", default="10000,100000", help="numbers, with commas")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    rows = []
    for count in map(int, options.entries.split(",")):
        for factory in dict.fromkeys(("Flat", chosen_factory("auto", count, DIM))):
            rows.append(measure(count, factory))
            Console().print(rows[-1])
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "lookup.json").write_text(json.dumps(rows, indent=2) + "\n")


def measure(count: int, factory: str) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    features, lengths = drawn_entries(draw, count)
    started = time.perf_counter()
    index = FeatureIndex(features, lengths.tolist(), factory)
    found: dict[str, Any] = {
        "entries": count,
        "factory": factory,
        "build_s": round(time.perf_counter() - started, 2),
    }
    faiss.omp_set_num_threads(1)  # what a search is kept to, for the search to compare with as well
    for kind, noise in NOISE.items():
        queries, usable = drawn_queries(draw, features, lengths, noise)
        seconds = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            answers = index.search(queries, usable, NEIGHBOURS, math.inf)
            seconds.append(time.perf_counter() - started)
        exact = [nearest(features, lengths, *pair) for pair in zip(queries, usable, strict=True)]
        hits = [
            bool(answer) and answer[0].entry_id == best
            for answer, best in zip(answers, exact, strict=True)
        ]
        found[kind] = {
            "ms": round(statistics.median(seconds) * 1e3, 3),
            "p99_ms": round(float(np.quantile(seconds, 0.99)) * 1e3, 3),
            "nearest_found": round(statistics.mean(hits), 3),
        }
    return found


def drawn_entries(draw: np.random.Generator, count: int) -> tuple[Any, Any]:
    """Features float32 ``[count, DIM]`` and lengths int64 ``[count]``."""
    centres = 4 * draw.standard_normal((max(1, count // 10), DIM), dtype=np.float32)
    features = centres[draw.integers(len(centres), size=count)]
    features += draw.standard_normal(features.shape, dtype=np.float32)
    return features, draw.integers(64, 512, count)


def drawn_queries(
    draw: np.random.Generator, features: Any, lengths: Any, noise: float
) -> tuple[Any, list[tuple[int, int]]]:
    """Features float32 ``[QUERIES, DIM]``, each with the lengths that will do for it."""
    queried = draw.integers(len(features), size=QUERIES)
    queries = features[queried]
    queries += noise * draw.standard_normal(queries.shape, dtype=np.float32)
    return queries, [(int(length), MAX_LENGTH) for length in lengths[queried]]


def nearest(features: Any, lengths: Any, query: Any, bounds: tuple[int, int]) -> int:
    distances = np.linalg.norm(features - query, axis=1)
    distances[(lengths < bounds[0]) | (lengths > bounds[1])] = np.inf
    return int(distances.argmin())


if __name__ == "__main__":
    main()
