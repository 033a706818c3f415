# SPDX-License-Identifier: Apache-2.0
"""Engines on small models of many families, all in one process.

    python -m integration_tests.families OUT.npz MODEL...

An engine in a process of its own takes half a minute to start on two cores; in this process it
takes two seconds. For each model (a name of :data:`integration_tests.models.MODELS`) a stock engine
answers, a store of every layer is built from some of the texts, and engines with the backend answer
from it, each with a gate of :data:`GATES`.

``OUT.npz`` holds the embeddings ``MODEL/ENGINE/KIND``, float32 ``[B, D]``, and as JSON text the
``report``: for each model what ``build`` returned or why it ``refused``, the layers by treatment,
the counters by engine and kind, the seconds, and ``error``, the traceback of a model that did not
get through.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from benchmarks import assets, corpus
from integration_tests import models
from integration_tests.engine import TokenIds
from integration_tests.probe import Probe

if TYPE_CHECKING:
    from vllm import LLM

RECORDED = 10
MIN_TOKENS = 16  # the backend's default
MAX_TOKENS = 96
GATES = {"own": 0.01, "open": 1e9}
"""Engines with the backend: only a text's own map is near enough, or every map is.

(Recorded texts find themselves at up to 0.002, because features are kept in float16.)
"""
BY_HAND = "a store made by hand, of any weights"

Kinds = dict[str, list[TokenIds]]
Answers = dict[str, NDArray[np.float32]]
Counters = dict[str, int]


def prompts(texts: Sequence[str], articles: Sequence[str]) -> Kinds:
    """Prompts by kind: the texts, and parts of articles that are unrelated to them and longer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.ensure("smollm2"))
    recorded = [tuple(tokenizer(text).input_ids) for text in texts]
    others = [tuple(tokenizer(article).input_ids) for article in articles]
    lengths = {len(ids) for ids in recorded}
    longest = max(lengths)
    assert longest <= MAX_TOKENS, "whole texts must fit into entries"
    absent = [length for length in range(MIN_TOKENS, longest) if length not in lengths]
    return {
        "recorded": recorded,
        "equal length": [ids[: len(own)] for ids, own in zip(others, recorded, strict=True)],
        "other length": [others[i][:length] for i, length in enumerate(absent[::20])],
        "longer": [others[i][: longest + more] for i, more in enumerate((1, 31, 64))],
        "short": [others[i][:length] for i, length in enumerate((1, 2, MIN_TOKENS - 1))],
    }


def examine(
    model: Path,
    texts: Sequence[str],
    asked: Kinds,
    answers: dict[str, Answers],
    report: dict[str, Any],
) -> None:
    """Add to ``answers`` and ``report`` what engines make of a model."""
    from attncache_vllm.calibrate.build import BuildOptions, build
    from attncache_vllm.calibrate.corpus import Text
    from attncache_vllm.engine import metrics, startup
    from attncache_vllm.errors import SettingsError

    with timed(report, "stock"), engine(model) as llm:
        answers["stock"], _ = ask(llm, asked)
    store = model.with_name(f"{model.name}-store")
    layers = range(json.loads((model / "config.json").read_text())["num_hidden_layers"])
    options = BuildOptions(str(model), store, layers=tuple(layers), max_tokens=MAX_TOKENS)
    with timed(report, "build"):
        try:
            report["build"] = build(options, [Text(text) for text in texts])
        except SettingsError as error:
            report["refused"] = str(error)
            make_store_by_hand(model, store)
    for name, gate in GATES.items():
        settings = {
            "store": str(store),
            "max_distance": gate,
            "lookup_deadline_ms": 60_000.0,
            "canary_share": 0.0,
            "only_where_it_pays": False,
        }
        selected = {"attention_backend": "attncache", "additional_config": {"attncache": settings}}
        metrics.LAYERS.clear()  # of the engine before
        with (
            timed(report, name),
            mock.patch.object(startup, "weights_fingerprint", return_value=BY_HAND)
            if "refused" in report
            else nullcontext(),
            engine(model, **selected) as llm,
        ):
            answers[name], report["counters"][name] = ask(llm, asked)
        report["layers"] = layers_by_treatment()


def ask(llm: LLM, asked: Kinds) -> tuple[Answers, dict[str, Counters]]:
    """Each prompt alone, kind by kind; then in one batch ``together`` all of them in a mixed
    order, and in one ``new together`` those that were not recorded."""
    answers, counters = {}, {}
    for kind, sequences in asked.items():
        with counted() as counters[kind]:
            answers[kind] = np.concatenate([embed(llm, [ids]) for ids in sequences])
    everything = [ids for sequences in asked.values() for ids in sequences]
    order = random.Random(0).sample(range(len(everything)), len(everything))
    with counted() as counters["together"]:
        mixed = embed(llm, [everything[i] for i in order])
    answers["together"] = mixed[np.argsort(order)]
    with counted() as counters["new together"]:
        answers["new together"] = embed(llm, everything[len(asked["recorded"]) :])
    return answers, counters


def embed(llm: LLM, sequences: Sequence[TokenIds]) -> NDArray[np.float32]:
    """Embeddings ``[B, D]`` of sequences that are sent together."""
    inputs: list[Any] = [{"prompt_token_ids": list(ids)} for ids in sequences]
    outputs = llm.embed(inputs, use_tqdm=False)
    return np.array([output.outputs.embedding for output in outputs], dtype=np.float32)


@contextmanager
def engine(model: Path, **options: Any) -> Iterator[LLM]:
    """A live engine that embeds whole texts, computed without torch.compile."""
    from vllm import LLM

    llm = LLM(
        str(model),
        runner="pooling",
        convert="embed",
        pooler_config={"seq_pooling_type": "MEAN"},
        max_model_len=2 * MAX_TOKENS,
        # All prompts fit into one step.
        max_num_batched_tokens=4096,
        kv_cache_memory_bytes=2**26,
        enforce_eager=True,
        **options,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def make_store_by_hand(model: Path, store: Path) -> None:
    """A store for a model whose maps cannot be recorded; nothing will read its one entry."""
    from vllm.engine.arg_utils import EngineArgs

    from attncache_vllm.engine.namespace import namespace_of
    from attncache_vllm.reuse.feature import Projector
    from attncache_vllm.reuse.plan import Plan, last_third
    from attncache_vllm.store.local import LocalStore
    from attncache_vllm.store.protocol import Record, token_hash

    config = EngineArgs(str(model), runner="pooling", convert="embed").create_engine_config()
    namespace = namespace_of(config, BY_HAND)
    projector = Projector(config.model_config.get_hidden_size())
    pooled = np.zeros((projector.slots, projector.hidden_size), np.float32)
    maps = {namespace.num_layers - 1: np.zeros(1, np.uint8)}
    with LocalStore.create(store, namespace, build={}) as writer:
        tokens, no_sketch = np.zeros(MIN_TOKENS, np.int32), np.zeros(0, np.uint64)
        identity = token_hash(tokens)
        writer.put(Record(identity, MIN_TOKENS, "none", pooled, maps, tokens, no_sketch))
        writer.publish(
            plan=Plan.reusing(
                namespace.num_layers,
                namespace.num_kv_heads,
                last_third(namespace.num_layers),
                0.2,
            ).to_dict(),
            projector=projector.to_bytes(),
            report={},
            features=np.zeros((1, 128), np.float32),
        )


@contextmanager
def counted() -> Iterator[Counters]:
    """What the backend's counters grow by during the block; known when it ends."""
    before = Probe().probe_counters()
    grown: Counters = {}
    yield grown
    for name, value in Probe().probe_counters().items():
        if "_total{" in name and value != before.get(name, 0):
            grown[name] = int(value - before.get(name, 0))


def layers_by_treatment() -> dict[str, int]:
    prefix = "attncache_layers{"
    return {
        name.removeprefix(prefix).removesuffix("}"): int(value)
        for name, value in Probe().probe_counters().items()
        if name.startswith(prefix)
    }


@contextmanager
def timed(report: dict[str, Any], what: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    report["seconds"][what] = round(time.monotonic() - started, 2)


def main(out: Path, names: Sequence[str]) -> None:
    # Before vLLM is imported: engines in this process, and no kernels that wait for each other.
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", OMP_NUM_THREADS="1")
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.models import registry

    articles = corpus.news(2 * RECORDED, min_chars=1500, seed=2)
    draw = random.Random(0)
    texts = [" ".join(text.split()[: draw.randint(20, 55)]) for text in articles[:RECORDED]]
    asked = prompts(texts, articles[RECORDED:])
    collect = gc.collect
    arrays: dict[str, Any] = {}
    reports: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        # vLLM looks at a class of models in a process of its own, for CUDA's sake: 8 seconds each.
        mock.patch.object(registry, "_run_in_subprocess", lambda look: look()),
        # vLLM collects seven times in the life of an engine: half of the time of a small one.
        mock.patch.object(gc, "collect"),
    ):
        for name in names:
            answers: dict[str, Answers] = {}
            report = reports[name] = {"counters": {}, "seconds": {}, "error": None}
            try:
                with timed(report, "make"):
                    model = models.make(name, Path(folder) / name)
                examine(model, texts, asked, answers, report)
            except Exception:
                report["error"] = traceback.format_exc()
                cleanup_dist_env_and_memory()
            arrays |= {
                f"{name}/{engine}/{kind}": embeddings
                for engine, by_kind in answers.items()
                for kind, embeddings in by_kind.items()
            }
            collect()
    np.savez(out, **arrays, report=json.dumps(reports))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
