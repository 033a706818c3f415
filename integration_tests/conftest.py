# SPDX-License-Identifier: Apache-2.0
"""Shared model, texts, store and reference answers; the logs of failing tests."""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from attncache_vllm.calibrate.build import COMMIT_EVERY
from attncache_vllm.errors import StoreError
from attncache_vllm.store.manifest import Manifest
from benchmarks import assets, corpus
from integration_tests import probe
from integration_tests.engine import Engine, Prompt, TokenIds
from integration_tests.processes import LIVE_LOGS, Exit, end_group, run, script, started, tail

NUM_LAYERS = 30
MAX_TOKENS = 128
# Recorded texts find themselves at up to 0.002: features are kept in float16, and a compiled model
# rounds the feature layer's input otherwise than the one that recorded. The nearest unrelated text
# is 0.3 away.
OWN_TEXTS_ONLY = 0.01
# On a busy machine a lookup may take longer than a server would want to wait for it; tests that
# count hits are not about that, nor about hits that are computed exactly to compare with, nor about
# what pays for models as small and texts as short as theirs.
PATIENT = {
    "max_distance": OWN_TEXTS_ONLY,
    "lookup_deadline_ms": 60_000.0,
    "canary_share": 0.0,
    "only_where_it_pays": False,
}

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# Files of tests run at once, each of whose engines would take the same cores.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_getaffinity"):
    worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    cores = sorted(os.sched_getaffinity(0))[worker :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)) or "auto")
os.environ.setdefault("VLLM_CACHE_ROOT", str(assets.cache_root() / "vllm"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Show with a failing test what the processes that run have logged last."""
    report = yield
    if report.failed:
        for title, log in LIVE_LOGS.items():
            report.sections.append((f"end of the log of {title}", tail(log)))
    return report


@dataclass(frozen=True)
class Texts:
    """Texts of the tests: ``recorded`` ones are in the store, the others are unrelated.

    ``short`` are token ids of fewer than ``min_tokens`` tokens, one token included; ``lengths``
    are unrelated sequences of all sorts of lengths, longer than any entry included.
    """

    recorded: tuple[str, ...]
    unrelated: tuple[str, ...]
    short: tuple[TokenIds, ...]
    lengths: tuple[TokenIds, ...]

    @property
    def everything(self) -> tuple[Prompt, ...]:
        return (*self.recorded, *self.unrelated, *self.short, *self.lengths)


@pytest.fixture(scope="session", autouse=True)
def temporary_files_of_engines() -> Iterator[None]:
    """vLLM leaves files in the folder for temporary files. (Short: it also holds sockets.)"""
    with tempfile.TemporaryDirectory(prefix="attncache-") as folder:
        os.environ["TMPDIR"] = folder
        yield


@pytest.fixture(scope="session")
def model() -> Path:
    return assets.ensure("smollm2")


@pytest.fixture(scope="session")
def texts(model: Path) -> Texts:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    articles = corpus.news(60, min_chars=3000, seed=1)
    draw = random.Random(0)
    cut = [" ".join(article.split()[: draw.randint(20, 75)]) for article in articles[:36]]
    sizes = [len(tokenizer(text).input_ids) for text in cut]
    assert min(sizes) >= 16 and max(sizes) <= MAX_TOKENS, "whole texts must fit into entries"
    rows = [tuple(tokenizer(article).input_ids) for article in articles[36:]]
    short = [row[:n] for row, n in zip(rows, (1, 1, 2, 3, 5, 8, 13, 15), strict=False)]
    longer = (16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 400)
    lengths = [row[:n] for row, n in zip(rows[8:], longer, strict=False)]
    return Texts(tuple(cut[:24]), tuple(cut[24:]), tuple(short), tuple(lengths))


@pytest.fixture(scope="session")
def corpus_file(texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts.recorded))
    return path


@pytest.fixture
def attncache(tmp_path: Path) -> Any:
    """Run the command ``attncache`` to its end."""

    def call(*arguments: object) -> Exit:
        return run([script("attncache"), *map(str, arguments)], tmp_path)

    return call


@dataclass(frozen=True)
class ResumedBuild:
    """A build that was killed after ``committed`` entries, and the report of the one after it."""

    store: Path
    arguments: tuple[object, ...]
    committed: int
    report: dict[str, Any]


@pytest.fixture(scope="session")
def resumed_build(
    model: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> ResumedBuild:
    """The store of all tests: every layer of all recorded texts, begun by a build that was killed.

    A store that has survived this is as good as any other, and one start of an engine is saved.
    """
    folder = tmp_path_factory.mktemp("build")
    store = folder / "store"
    arguments: tuple[object, ...] = ("build", model, "--corpus", corpus_file, "--store", store)
    arguments += ("--layers", f"0-{NUM_LAYERS - 1}", "--max-tokens", MAX_TOKENS, "--json")
    command = [script("attncache"), *map(str, arguments)]
    with started(command, folder / "killed-build.log") as process:
        while (committed := _committed(store)) < COMMIT_EVERY and process.poll() is None:
            time.sleep(0.02)
        assert process.poll() is None, tail(folder / "killed-build.log")
        end_group(process.pid, grace=0)
    ended = run(command, folder)
    assert ended.code == 0, ended.log
    return ResumedBuild(store, arguments, committed, json.loads(ended.stdout))


def _committed(store: Path) -> int:
    try:
        return len(Manifest.read(store).entries)
    except StoreError:
        return 0


@pytest.fixture(scope="session")
def store(resumed_build: ResumedBuild) -> Path:
    return resumed_build.store


@pytest.fixture(scope="session")
def embedder(model: Path) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for embeddings of whole texts, computed without torch.compile."""
    return {
        "model": str(model),
        "runner": "pooling",
        "convert": "embed",
        "pooler_config": {"seq_pooling_type": "MEAN"},
        "max_model_len": 512,
        # All texts of the tests fit into one step.
        "max_num_batched_tokens": 8192,
        "enforce_eager": True,
        "worker_extension_cls": probe.PATH,
    }


@dataclass(frozen=True)
class Stock:
    """What vLLM answers and is made of when the backend is not selected."""

    answers: dict[Prompt, NDArray[np.float32]]
    attention: list[dict[str, Any]]
    plugin_modules: list[str]

    def of(self, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        """Embeddings ``[B, D]``, each computed alone."""
        return np.stack([self.answers[prompt] for prompt in prompts])


@pytest.fixture(scope="session")
def stock(
    embedder: dict[str, Any], texts: Texts, tmp_path_factory: pytest.TempPathFactory
) -> Stock:
    """The plugin is installed, another backend is in force. The engine has ended."""
    return stock_engine(tmp_path_factory.mktemp("stock") / "engine.log", {}, embedder, texts)


def stock_engine(log: Path, env: dict[str, str], embedder: dict[str, Any], texts: Texts) -> Stock:
    with Engine(log, env, **embedder) as engine:
        answers = engine.embed_alone(texts.everything)
        return Stock(
            dict(zip(texts.everything, answers, strict=True)),
            engine.probe("probe_attention"),
            engine.probe("probe_modules"),
        )
