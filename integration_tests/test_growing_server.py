# SPDX-License-Identifier: Apache-2.0
"""A compiled ``vllm serve`` on a store of shards that learns from the texts it misses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from attncache_vllm.reuse.plan import Plan, SourcePlan
from attncache_vllm.store import LocalStore
from benchmarks.ray_nodes import eventually, ray_nodes
from benchmarks.server import MEAN_EMBEDDINGS, MODEL_NAME, Server, serve
from integration_tests import models
from integration_tests.compare import cosines
from integration_tests.conftest import PATIENT, Texts
from integration_tests.processes import START_SECONDS, run, script, shown_on_failure

RECORDED = 8
NUM_LAYERS = 4
# One layer is not served from entries: an admitted entry lacks it.
GROUPS = ((), *((0, 1),) * (NUM_LAYERS - 1))
# As for a text that a build has recorded, see test_sources.py.
LIKE_EXACT = 0.9995


@pytest.fixture(scope="module")
def server(texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("growing")
    small, store = models.make("llama", folder / "llama"), folder / "store"
    build(small, store, texts.recorded[:RECORDED], folder)
    with (
        pytest.MonkeyPatch.context() as patch,
        ray_nodes(folder, nodes=1) as nodes,
    ):
        nodes.store("up", "--config", nodes.settings())
        nodes.store("load", store, "--address", nodes.address)
        for name, value in nodes.environment.items():
            patch.setenv(name, value)
        settings = {"store": f"ray:{nodes.address}", **PATIENT, "admit_per_minute": 6000}
        options = [
            *("--attention-backend", "attncache", "--max-model-len", "512"),
            *("--additional-config", json.dumps({"attncache": settings})),
        ]
        log = folder / "vllm-serve.log"
        with serve(small, options, log) as server, shown_on_failure(log):
            yield server


def build(model: Path, store: Path, texts: tuple[str, ...], folder: Path) -> None:
    """A store of every layer of ``texts`` whose plan serves the last layers of aligned entries."""
    corpus = folder / "texts.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [script("attncache"), "build", model, "--corpus", corpus, "--store", store]
    options = ["--layers", f"0-{NUM_LAYERS - 1}", *MEAN_EMBEDDINGS]
    ended = run([*map(str, command), *options], folder, START_SECONDS)
    assert ended.code == 0, ended.log
    plan = Plan(0, NUM_LAYERS, {"aligned": SourcePlan(GROUPS, gate=0.3)})
    with LocalStore.open(store, writable=True) as opened:
        opened.publish_plan(plan.to_dict(), {}, {})


def embed(server: Server, text: str, salt: str | None = None) -> NDArray[np.float32]:
    salted = None if salt is None else {"cache_salt": salt}
    response = server.client().embeddings.create(model=MODEL_NAME, input=text, extra_body=salted)
    return np.array([response.data[0].embedding], dtype=np.float32)


def counted(server: Server) -> dict[str, float]:
    """Hits by source and misses by reason: counted before a request is answered."""
    return {
        **server.counters("attncache_hits", "source"),
        **server.counters("attncache_misses", "reason"),
    }


def admitted(server: Server) -> dict[str, float]:
    """Admissions by outcome, which a thread of idle priority counts some time after the answer."""
    return server.counters("attncache_admissions", "outcome")


def grown(server: Server, before: dict[str, float]) -> dict[str, float]:
    after = counted(server)
    return {
        name: after[name] - before.get(name, 0)
        for name in after
        if after[name] > before.get(name, 0)
    }


def hit(server: Server, text: str, salt: str | None = None) -> NDArray[np.float32]:
    """The answer to ``text`` once an entry serves it, which it does a while after it was missed."""
    answers: list[NDArray[np.float32]] = []

    def is_hit() -> bool:
        before = counted(server)
        answers.append(embed(server, text, salt))
        return grown(server, before) == {"aligned": 1}

    # The thread that admits is one of idle priority, and a worker polls for a second after it has
    # answered: asked without a pause, it leaves no time for that on a machine with other work.
    eventually(is_hit, 180.0, pause=2.0)
    return answers[-1]


def test_a_text_that_was_missed_is_a_hit_later_and_is_answered_alike(
    server: Server, texts: Texts
) -> None:
    text, before, earlier = texts.unrelated[0], counted(server), admitted(server)
    exact = embed(server, text)
    assert grown(server, before).items() >= {"recorded": 1}.items()
    reused = hit(server, text)
    assert cosines(reused, exact).min() >= LIKE_EXACT
    assert not np.array_equal(reused, exact)
    assert grown(server, before)["recorded"] == 1
    eventually(lambda: admitted(server) == {"recorded": earlier.get("recorded", 0) + 1})


def test_an_edited_copy_of_an_admitted_text_is_served_from_it(server: Server, texts: Texts) -> None:
    text = texts.unrelated[1]
    embed(server, text)
    hit(server, text)
    words = text.split()
    words[len(words) // 2] = "indeed"
    before = counted(server)
    embed(server, " ".join(words))
    assert grown(server, before) == {"aligned": 1}


def test_what_a_tenant_was_missed_is_an_entry_of_that_tenant_only(
    server: Server, texts: Texts
) -> None:
    text = texts.unrelated[2]
    exact = embed(server, text, "a secret")
    assert cosines(hit(server, text, "a secret"), exact).min() >= LIKE_EXACT
    for salt in (None, "another secret"):
        # One text is recorded at a time: no other is while the last one still is.
        eventually(lambda: admitted(server)["recorded"] == counted(server)["recorded"], 180.0)
        before = counted(server)
        embed(server, text, salt)
        assert grown(server, before).items() >= {"recorded": 1}.items()


def test_a_recorded_text_of_the_build_is_a_hit_as_ever(server: Server, texts: Texts) -> None:
    before = counted(server)
    for text in texts.recorded[:RECORDED]:
        embed(server, text)
    assert grown(server, before) == {"aligned": RECORDED}
    assert server.counters("attncache_store_faults", "kind") == {}
