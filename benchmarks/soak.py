# SPDX-License-Identifier: Apache-2.0
"""``make soak``: two servers and four shards, two tenants, and shards that die, hang and fill up.

Every answer is compared with the text's exact one, and whatever hits while texts are asked for
under another tenant's salt is a leak. Maps serve nothing but the text that they are of, so that an
answer is either as exact as that or wrong. Writes ``report.json`` below ``--out``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from openai import OpenAI, OpenAIError
from rich.console import Console
from transformers import AutoTokenizer

from attncache_vllm.reuse.feature import Projector
from attncache_vllm.reuse.sketch import sketch
from attncache_vllm.store.local import LocalStore
from attncache_vllm.store.protocol import Record, token_hash
from attncache_vllm.store.ray.client import RayStore
from attncache_vllm.store.ray.edition import Edition
from attncache_vllm.store.ray.ring import entry_id
from attncache_vllm.tenants import tenant_of
from benchmarks.assets import ensure
from benchmarks.bench import own_maps_plan
from benchmarks.corpus import news
from benchmarks.ray_nodes import RayNodes, eventually, ray_nodes
from benchmarks.recording import build_store
from benchmarks.server import MEAN_EMBEDDINGS, MODEL_NAME, Server, serve

SHARDS = 4
SALTS = ("tenant one", "tenant two")
TEXTS = 24  # of each tenant, and as many that nobody has stored
WORDS, TOKENS = 75, 256  # so that nothing is cut
# Three engines are started, for minutes: none is worth being compiled.
OPTIONS = ("--max-model-len", str(TOKENS), "--enforce-eager")
# Own maps differ from exact attention by rounding, about half a percent.
TOLERANCE = 0.02
# Two tenants' entries and what a third may have at most are more than a shard holds.
TENANT_MIB, SHARD_MIB = 32, 48
HOGGED = 160
STALL_SECONDS, PAUSE_SECONDS = 10.0, 8.0
QUIET = "before", "after"
console = Console()


@dataclass
class Round:
    """Requests of one kind to one server, one after the other, and how many of them hit."""

    phase: str
    kind: str  # own, foreign or unseen
    ms: list[float] = field(default_factory=list)
    failed: int = 0
    wrong: int = 0
    hits: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quiet", type=float, default=60.0, help="seconds before and after faults")
    parser.add_argument("--faults", type=int, default=3, help="rounds of all faults")
    parser.add_argument("--deadline-ms", type=float, help="of lookups [default: the setting's]")
    parser.add_argument("--out", type=Path, default=Path("build/soak"))
    options = parser.parse_args()
    # Ended politely or not, the context managers end servers and nodes.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = run(options.quiet, options.faults, options.deadline_ms, options.out)
    except KeyboardInterrupt:
        console.print("interrupted")
        sys.exit(130)
    console.print_json(data=report)
    if report["failed"] or report["wrong"] or report["cross_tenant_hits"]:
        sys.exit(1)


def run(quiet: float, faults: int, deadline_ms: float | None, folder: Path) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = ensure("smollm2")
    articles = [" ".join(text.split()[:WORDS]) for text in news(3 * TEXTS, 2000)]
    texts = {
        salt: articles[number * TEXTS : (number + 1) * TEXTS]
        for number, salt in enumerate((*SALTS, None))
    }
    stored = [text for salt in SALTS for text in texts[salt]]
    store = build_store(model, stored, folder, TOKENS, "--layers", "2-29", *MEAN_EMBEDDINGS)
    exact = exact_answers(model, articles, folder)
    with ExitStack() as stack:
        console.print("[bold]Ray[/]: two nodes, four shards")
        (folder / "ray").mkdir()
        nodes = stack.enter_context(ray_nodes(folder / "ray", nodes=2))
        os.environ.update(nodes.environment)
        settings = nodes.settings(
            shards=SHARDS, shard_mib=SHARD_MIB, tenant_mib=TENANT_MIB, num_cpus=0.25
        )
        nodes.store("up", "--config", settings)
        ids = fill_shards(nodes, store, texts, model)
        # vLLM would have both compute on the same cores, and poll there when they are idle.
        cores = sorted(os.sched_getaffinity(0))
        servers = [
            stack.enter_context(
                serve(
                    model,
                    server_options(nodes, store, deadline_ms),
                    folder / f"server-{number}.log",
                    cores=cores[number::2],
                )
            )
            for number in range(2)
        ]
        traffic = Traffic(servers, texts, exact)
        with traffic.running():
            traffic.phase = "before"
            time.sleep(quiet)
            traffic.phase = "faults"
            killed, stalls, gone = 0, 0, 0
            for number in range(faults):
                hog(nodes, store)
                held = ids.keys() - missing(nodes, ids)  # full shards give up what is worth least
                killed += kill(nodes, number % SHARDS)
                stalls += stall(nodes, (number + 1) % SHARDS)
                nodes.store("down", "--address", nodes.address)
                nodes.store("up", "--config", settings)
                gone += len(held & missing(nodes, ids))
            traffic.phase = "recovery"
            time.sleep(2 * PAUSE_SECONDS)
            traffic.phase = "after"
            time.sleep(quiet)
        evicted = len(missing(nodes, ids)) - gone
    report = summarise(traffic.rounds, killed, stalls, gone, evicted)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def exact_answers(model: Path, texts: Sequence[str], folder: Path) -> dict[str, np.ndarray]:
    console.print("exact answers, by vLLM's own backend")
    with serve(model, OPTIONS, folder / "stock.log") as stock:
        client = stock.client()
        return {text: embed(client, text, None) for text in texts}


def server_options(nodes: RayNodes, store: Path, deadline_ms: float | None) -> list[str]:
    settings: dict[str, Any] = {
        "store": f"ray:{nodes.address}",
        "plan": str(own_maps_plan(store).resolve()),
        "resident_mib": 16,  # a few entries: the others come from the shards every time
        "canary_share": 0.0,
        "only_where_it_pays": False,
    }
    if deadline_ms is not None:
        settings["lookup_deadline_ms"] = deadline_ms
    selected = ["--attention-backend", "attncache", "--additional-config"]
    return [*OPTIONS, *selected, json.dumps({"attncache": settings})]


def fill_shards(
    nodes: RayNodes, store: Path, texts: dict[str | None, list[str]], model: Path
) -> dict[int, bytes]:
    """Put each tenant's texts into the shards, for that tenant alone; token hashes by id."""
    # Ray reads its token's environment when it is imported.
    from attncache_vllm.store.ray import cluster

    console.print("each tenant's entries into the shards")
    tokenizer = AutoTokenizer.from_pretrained(model)
    with LocalStore.open(store) as opened:
        with cluster.joined(nodes.address):
            edition = Edition.of(opened).to_bytes()
            cluster.attach().fanout.every("publish", edition, deadline=time.monotonic() + 60)
        records = {record.token_hash: record for _, record in opened.records()}
        project = projecting(opened)
        with connected(nodes) as shards:
            ids = {}
            for salt in SALTS:
                for text in texts[salt]:
                    record = records[token_hash(tokenizer(text).input_ids)]
                    tenant = tenant_of(salt)
                    shards.admit(record, project(record), tenant)
                    ids[entry_id(tenant, record.token_hash)] = record.token_hash
            eventually(lambda: not lost(shards, ids), seconds=120)
    return ids


def projecting(store: LocalStore) -> Callable[[Record], np.ndarray]:
    """From a record to its feature, as a server computes it."""
    projector = Projector.from_bytes(store.projector_bytes)

    def project(record: Record) -> np.ndarray:
        with torch.inference_mode():
            found: np.ndarray = projector(torch.from_numpy(record.pooled)[None]).numpy()[0]
        return found

    return project


@contextmanager
def connected(nodes: RayNodes) -> Iterator[RayStore]:
    store = RayStore.connect(f"ray:{nodes.address}", None)
    try:
        yield store
    finally:
        store.close()


def lost(shards: RayStore, ids: dict[int, bytes]) -> list[int]:
    """The entries that cannot be loaded, or are not what was put."""
    found = shards.load(list(ids), deadline=time.monotonic() + 30)
    return [
        number
        for number, record in zip(ids, found, strict=True)
        if record is None or record.token_hash != ids[number]
    ]


def missing(nodes: RayNodes, ids: dict[int, bytes]) -> set[int]:
    """What is gone, once every shard answers."""
    with connected(nodes) as shards:
        eventually(lambda: not shards.out(), seconds=120)
        return set(lost(shards, ids))


# -- faults ----------------------------------------------------------------------------------------


def kill(nodes: RayNodes, shard: int) -> int:
    """Kill a shard's process; Ray starts it again."""
    console.print(f"shard {shard} is killed")
    os.kill(nodes.pids()[shard], signal.SIGKILL)
    time.sleep(PAUSE_SECONDS)
    return 1


def stall(nodes: RayNodes, shard: int) -> int:
    """Stop a shard's process for a while."""
    console.print(f"shard {shard} hangs for {STALL_SECONDS:.0f} s")
    process = nodes.pids()[shard]
    os.kill(process, signal.SIGSTOP)
    time.sleep(STALL_SECONDS)
    os.kill(process, signal.SIGCONT)
    time.sleep(PAUSE_SECONDS)
    return 1


def hog(nodes: RayNodes, store: Path) -> None:
    """Another tenant puts more than it may have: shards are full, and evict."""
    console.print("a third tenant fills the shards")
    draw = np.random.default_rng(time.time_ns())
    with LocalStore.open(store) as opened, connected(nodes) as shards:
        project = projecting(opened)
        [(_, record)] = itertools.islice(opened.records(), 1)
        for _ in range(HOGGED):
            tokens = draw.integers(0, 49_000, record.length, dtype=np.int32)
            junk = replace(
                record, token_hash=token_hash(tokens), token_ids=tokens, sketch=sketch(tokens)
            )
            shards.admit(junk, project(junk), tenant_of("hog"))
        time.sleep(PAUSE_SECONDS)


# -- traffic ---------------------------------------------------------------------------------------


class Traffic:
    """One thread a server, asking until it is told to stop."""

    def __init__(
        self,
        servers: Sequence[Server],
        texts: dict[str | None, list[str]],
        exact: dict[str, np.ndarray],
    ) -> None:
        self.phase = "warm-up"
        self.rounds: list[Round] = []
        self._servers = servers
        self._texts = texts
        self._exact = exact
        self._over = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Ask while the block lasts, once each server has warmed up."""
        threads = [
            threading.Thread(target=self._ask_on, args=(server, random.Random(number)))
            for number, server in enumerate(self._servers)
        ]
        for server in self._servers:
            client = server.client()
            for text in self._texts[None][:4]:
                embed(client, text, None)
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in threads:
                thread.join()

    def _ask_on(self, server: Server, draw: random.Random) -> None:
        client = server.client()
        for kind, count in itertools.cycle((("own", 8), ("foreign", 4), ("unseen", 2))):
            if self._over.is_set():
                return
            one = Round(self.phase, kind)
            before = hits(server)
            for _ in range(count):
                self._ask(client, one, *self._drawn(kind, draw))
            one.hits = hits(server) - before
            if self.phase == one.phase:  # else it is of neither
                self.rounds.append(one)

    def _drawn(self, kind: str, draw: random.Random) -> tuple[str, str | None]:
        """A text, and the salt that it is asked for with."""
        if kind == "unseen":
            return draw.choice(self._texts[None]), draw.choice((*SALTS, None))
        owner = draw.choice(SALTS)
        text = draw.choice(self._texts[owner])
        others = [salt for salt in (*SALTS, None) if salt != owner]
        return text, owner if kind == "own" else draw.choice(others)

    def _ask(self, client: OpenAI, one: Round, text: str, salt: str | None) -> None:
        started = time.perf_counter()
        try:
            answer = embed(client, text, salt)
        except OpenAIError:
            one.failed += 1
            return
        one.ms.append((time.perf_counter() - started) * 1e3)
        exact = self._exact[text]
        one.wrong += bool(np.linalg.norm(answer - exact) > TOLERANCE * np.linalg.norm(exact))


def embed(client: OpenAI, text: str, salt: str | None) -> np.ndarray:
    extra: dict[str, Any] = {"truncate_prompt_tokens": TOKENS}
    if salt is not None:
        extra["cache_salt"] = salt
    answer = client.embeddings.create(
        model=MODEL_NAME, input=text, encoding_format="float", extra_body=extra
    )
    return np.asarray(answer.data[0].embedding, dtype=np.float64)


def hits(server: Server) -> float:
    return server.counters("attncache_sequences", "outcome").get("hit", 0.0)


def summarise(
    rounds: Sequence[Round], killed: int, stalls: int, lost: int, evicted: int
) -> dict[str, Any]:
    def rate(phase: str) -> float:
        own = [one for one in rounds if one.phase == phase and one.kind == "own"]
        asked = sum(len(one.ms) for one in own)
        return round(sum(one.hits for one in own) / max(1, asked), 4)

    faulty = sorted(ms for one in rounds if one.phase not in QUIET for ms in one.ms)
    calm = sorted(ms for one in rounds if one.phase in QUIET for ms in one.ms)
    return {
        "requests": sum(len(one.ms) + one.failed for one in rounds),
        "failed": sum(one.failed for one in rounds),
        "wrong": sum(one.wrong for one in rounds),
        "p50_ms": round(statistics.median(faulty), 1),
        "p99_ms": round(float(np.quantile(faulty, 0.99)), 1),
        "p99_ms_no_faults": round(float(np.quantile(calm, 0.99)), 1),
        "shards_killed": killed,
        "stalls": stalls,
        "cross_tenant_hits": int(sum(one.hits for one in rounds if one.kind == "foreign")),
        "hit_rate_before": rate("before"),
        "hit_rate_during": rate("faults"),
        "hit_rate_after": rate("after"),
        "lost_entries_after_restart": lost,
        "evicted_entries": evicted,
    }


if __name__ == "__main__":
    main()
