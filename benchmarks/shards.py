# SPDX-License-Identifier: Apache-2.0
"""How long a server waits for a lookup among the entries of all shards, and how much of that is the
shards' own search: ``python -m benchmarks.shards``. Writes ``shards.json`` below ``--out``.

Shards run on a Ray node of this machine. Features and queries are those of ``benchmarks.lookup``,
entries have a map of one byte, and are put as ``attncache store load`` puts them. Lookups are
measured after the load, when an index has levels, and once more after a restart, when it has one.
Then the first shard is asked in this process, with nothing between and beside it.

An entry is a file of 4 KiB that is synced on its own: with a million of them, choose a
``--folder`` in memory or on a fast disk.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from rich.console import Console

from attncache_vllm.errors import StoreInUse
from attncache_vllm.store.index import chosen_factory
from attncache_vllm.store.protocol import Namespace, Record, token_hash
from attncache_vllm.store.ray.client import RayStore
from attncache_vllm.store.ray.edition import Edition
from attncache_vllm.store.ray.fanout import Fanout
from attncache_vllm.store.ray.ring import entry_id
from attncache_vllm.store.ray.shard import Limits, Shard
from attncache_vllm.store.records import encode_record
from attncache_vllm.tenants import SHARED_TENANT
from benchmarks.lookup import DIM, NEIGHBOURS, NOISE, QUERIES, drawn_entries, drawn_queries
from benchmarks.ray_nodes import RayNodes, ray_nodes

BATCH = 8192
SKETCH = 64
WARM_UP = 20
SECONDS = 600.0
NAMESPACE = Namespace("drawn", "0", "none", "float32", "causal", 1, 1, 1, 1, "none", "0/1")
EDITION = Edition(NAMESPACE, {}, {}, {}, b"", DIM, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--lookups", type=int, default=500)
    parser.add_argument("--folder", type=Path, help="for entries; by default a temporary one")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="shards-", dir=options.folder))
    try:
        found = measure(folder, options.entries, options.shards, options.lookups)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "shards.json").write_text(json.dumps(found, indent=2) + "\n")


def measure(folder: Path, entries: int, shards: int, lookups: int) -> dict[str, Any]:
    console = Console()
    draw = np.random.default_rng(0)
    features, lengths = drawn_entries(draw, entries)
    batches = {kind: drawn_queries(draw, features, lengths, noise) for kind, noise in NOISE.items()}
    found: dict[str, Any] = {"entries": entries, "shards": shards, "queries": QUERIES}
    with ray_nodes(folder, nodes=1) as nodes:
        os.environ.update(nodes.environment)
        config = nodes.settings(shards=shards, shard_mib=1 << 20, num_cpus=1 / shards)
        nodes.store("up", "--config", config)
        # Ray looks at the environment when it is imported.
        from attncache_vllm.store.ray import cluster

        with cluster.joined(nodes.address):
            found["load_s"] = load(cluster.attach().fanout, features, lengths, console.print)
        for state in ("after_load", "after_restart"):
            if state == "after_restart":
                nodes.store("down", "--address", nodes.address)
                found["restart_s"] = timed(lambda: nodes.store("up", "--config", config))
            found[state] = asked(nodes, batches, lookups, features, lengths)
            console.print(state, found[state])
    found["one_shard_alone"] = alone(folder / "shards" / "shard-0", batches, lookups)
    console.print(found)
    return found


def load(fanout: Fanout, features: Any, lengths: Any, report: Callable[[str], None]) -> float:
    """Put all entries into their shards; the seconds that took, without making them."""
    fanout.every("publish", EDITION.to_bytes(), deadline=time.monotonic() + SECONDS)
    seconds = 0.0
    for start in range(0, len(features), BATCH):
        batch = list(entries_of(features, lengths, start))
        started = time.perf_counter()
        said = fanout.put(EDITION.digest, SHARED_TENANT, batch, time.monotonic() + SECONDS)
        seconds += time.perf_counter() - started
        assert all(each == ["kept"] for each in said), said
        report(f"{start + len(batch)} entries, {seconds:.0f} s")
    return round(seconds, 1)


def entries_of(features: Any, lengths: Any, start: int) -> Iterator[tuple[int, Any, Any, float]]:
    """What ``Fanout.put`` takes, of a batch."""
    draw = np.random.default_rng([1, start])
    for feature, length in zip(
        features[start : start + BATCH], lengths[start : start + BATCH].tolist(), strict=True
    ):
        tokens = draw.integers(0, 50_000, length, dtype=np.int32)
        record = Record(
            token_hash=token_hash(tokens),
            length=length,
            codec="none",
            pooled=np.zeros((1, 1), dtype=np.float32),
            maps={0: np.zeros(1, dtype=np.uint8)},
            token_ids=tokens,
            sketch=np.unique(draw.integers(0, 1 << 63, SKETCH, dtype=np.uint64)),
        )
        data = np.frombuffer(b"".join(encode_record(record)), dtype=np.uint8)
        yield entry_id(SHARED_TENANT, record.token_hash), feature, data, 0.0


def asked(
    nodes: RayNodes, batches: dict[str, Any], lookups: int, features: Any, lengths: Any
) -> dict[str, Any]:
    """What a server sees of the shards, by kind of query, and what they take."""
    found: dict[str, Any] = {}
    store = RayStore.connect(f"ray:{nodes.address}", NAMESPACE)
    try:
        for kind, (queries, usable) in batches.items():
            look_up = functools.partial(
                store.lookup,
                queries,
                usable,
                tenants=[SHARED_TENANT] * QUERIES,
                neighbours=NEIGHBOURS,
                deadline=time.monotonic() + SECONDS,
            )
            before = searched(nodes)
            times = [timed(look_up) for _ in range(WARM_UP + lookups)][WARM_UP:]
            calls, microseconds = np.subtract(searched(nodes), before)
            answers = [[n.distance for n in answer] for answer in look_up()]
            found[kind] = {
                "lookup_ms": summary(times),
                "search_ms_mean": round(float(microseconds / calls) / 1e3, 3),
                "recall": recall(answers, queries, usable, features, lengths),
            }
    finally:
        store.close()
    status = nodes.status()["shards"]
    found["shard_entries"] = [shard["entries"] for shard in status]
    found["shard_rss_mib"] = [resident_mib(shard["pid"]) for shard in status]
    return found


def alone(folder: Path, batches: dict[str, Any], lookups: int) -> dict[str, Any]:
    """The search of one shard in this process, by kind of query."""
    shard = opened(folder)
    count = shard.stats()["entries"]
    found: dict[str, Any] = {"entries": count, "index": chosen_factory("auto", count, DIM)}
    try:
        for kind, (queries, usable) in batches.items():
            asked = (EDITION.digest, [SHARED_TENANT] * QUERIES, queries, np.array(usable))
            search = functools.partial(shard.lookup, *asked, NEIGHBOURS)
            times = [timed(search) for _ in range(WARM_UP + lookups)]
            found[kind] = {"search_ms": summary(times[WARM_UP:])}
    finally:
        shard.close()
    return found


def opened(folder: Path) -> Shard:
    """The shard in a folder, as soon as the actor that had it has ended."""
    while True:
        try:
            return Shard(folder, Limits(1 << 40))
        except StoreInUse:
            time.sleep(0.5)


def searched(nodes: RayNodes) -> tuple[int, int]:
    """Lookups of all shards since their start, and the microseconds that their searches took."""
    status = nodes.status()["shards"]
    return sum(s["lookups"] for s in status), sum(s["lookup_us"] for s in status)


def recall(
    answers: list[list[float]], queries: Any, usable: Any, features: Any, lengths: Any
) -> float:
    """The share of the true nearest entries that were found."""
    hits = 0
    for query, (shortest, longest), answer in zip(queries, usable, answers, strict=True):
        rows = (lengths >= shortest) & (lengths <= longest)
        squared, _ = faiss.knn(query[None], features[rows], NEIGHBOURS)
        farthest = math.sqrt(float(squared.max())) * (1 + 1e-5)
        hits += sum(distance <= farthest for distance in answer)
    return round(hits / (len(answers) * NEIGHBOURS), 3)


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def summary(seconds: list[float]) -> dict[str, float]:
    return {
        "mean": round(float(np.mean(seconds)) * 1e3, 3),
        "p50": round(float(np.quantile(seconds, 0.5)) * 1e3, 3),
        "p99": round(float(np.quantile(seconds, 0.99)) * 1e3, 3),
    }


def resident_mib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) // 1024
    raise RuntimeError(f"process {pid} must run")


if __name__ == "__main__":
    main()
