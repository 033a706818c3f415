# SPDX-License-Identifier: Apache-2.0
"""Ask a stock server and a reusing one the same, one after the other, and compare the answers.

Nothing here is timed: that takes both servers alive, asked in turn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from openai import BadRequestError
from torch import Tensor

from attncache_vllm.calibrate.progress import progress
from attncache_vllm.errors import AttnCacheError, SettingsError
from attncache_vllm.evaluate.files import (
    read_edits,
    read_labels,
    read_pairs,
    read_prompts,
    read_texts,
)
from attncache_vllm.evaluate.next_token import choice_tokens, model_folder, output_embeddings
from attncache_vllm.evaluate.server import MODEL_NAME, Server, serve
from attncache_vllm.evaluate.shares import Counts, shares
from attncache_vllm.evaluate.tasks import Edits, Figures, Labels, Pairs, Prompts, Task, Texts
from attncache_vllm.reuse.plan import Plan
from attncache_vllm.store.manifest import Manifest

BATCH = 32  # texts a request
# A lookup that is late is a miss, and how many are depends on the machine: not the question here.
# Nor are canaries, whose answers are exact, nor what pays on this machine.
PATIENT = {"lookup_deadline_ms": 60_000.0, "canary_share": 0.0, "only_where_it_pays": False}


@dataclass(frozen=True)
class EvaluateOptions:
    """What ``attncache evaluate`` was asked for.

    ``published_gate`` None leaves the published rule out. ``settings`` are those of the plugin
    beside ``store``; ``serve_options`` those of ``vllm serve``, for all servers.
    """

    model: str
    store: Path
    out: Path
    texts: Path | None = None
    pairs: Path | None = None
    labels: Path | None = None
    prompts: Path | None = None
    edits: Path | None = None
    published_gate: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    serve_options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answers:
    """What one server answered to one task, and what it counted meanwhile."""

    embeddings: Tensor  # [N, D] float64
    counts: Counts


@dataclass(frozen=True)
class Served:
    """A server's answers to every task, and its canaries' errors afterwards."""

    answers: list[Answers]
    canaries: list[dict[str, Any]]  # layer, source, error


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Run the evaluation; the report, as ``report.json`` holds it.

    Raises:
        SettingsError: no task, or a file, setting or model that does not fit its task.
        StoreError: the store cannot be read or is not published.
        AttnCacheError: a server did not start, or refused a text.
    """
    manifest = Manifest.read(options.store)
    if manifest.published is None:
        raise SettingsError(
            f"evaluation needs a store that can be served, got {str(options.store)!r} without a "
            "plan; finish its 'attncache build'"
        )
    # Files are read before a server is started: a mistake in them is found at once.
    tasks = read_tasks(options)
    settings = {**PATIENT, **options.settings, "store": str(options.store)}
    plan = _plan(manifest, settings)
    reused = _serve(options, tasks, "attncache", settings)
    published_rule = None
    if options.published_gate is not None:
        rule = published_plan(manifest, options.published_gate)
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / "published-plan.json"
        path.write_text(json.dumps(rule.to_dict()) + "\n")
        by_rule = {**settings, "plan": str(path.resolve())}
        published_rule = rule, _serve(options, tasks, "published-rule", by_rule)
    exact = _serve(options, tasks, "stock", None)

    kv_heads = manifest.namespace.num_kv_heads
    rows = []
    with progress() as bar:
        for number, task in enumerate(bar.track(tasks, description="comparing")):
            truth = exact.answers[number].embeddings
            row = _row(task, plan, kv_heads, truth, reused.answers[number], options.seed)
            beside = None
            if published_rule is not None:
                rule, served = published_rule
                beside = _row(task, rule, kv_heads, truth, served.answers[number], options.seed)
            rows.append(
                {"model": Path(options.model).name, "workload": task.name, "metric": task.metric}
                | row
                | {"published_rule": beside}
            )
    return {
        "model": options.model,
        "store": str(options.store),
        "entries": len(manifest.entries),
        "plan": plan.to_dict(),
        "calibration": manifest.published.report.get("calibration"),
        "published_gate": options.published_gate,
        "settings": {key: value for key, value in settings.items() if key != "store"},
        "serve_options": list(options.serve_options),
        "seed": options.seed,
        "versions": {name: version(name) for name in ("attncache-vllm", "vllm", "torch")},
        "rows": rows,
        "canaries": reused.canaries,
    }


def read_tasks(options: EvaluateOptions) -> list[Task]:
    """The tasks whose files are given, in a fixed order.

    Raises:
        SettingsError: none is given, or one does not fit.
    """
    tasks: list[Task] = []
    if options.texts is not None:
        tasks.append(Texts(read_texts(options.texts)))
    if options.pairs is not None:
        tasks.append(Pairs(read_pairs(options.pairs)))
    if options.labels is not None:
        tasks.append(Labels.split(read_labels(options.labels), options.seed))
    if options.prompts is not None:
        tasks.append(_prompts(options, options.prompts))
    if options.edits is not None:
        tasks.append(Edits(read_edits(options.edits)))
    if not tasks:
        raise SettingsError(
            "an evaluation needs a task, got none; give --texts, --pairs, --labels, --prompts or "
            "--edits"
        )
    return tasks


def published_plan(manifest: Manifest, gate: float) -> Plan:
    """AttnCache's own rule: every recorded layer from the nearest entry within ``gate``."""
    assert manifest.published is not None
    namespace = manifest.namespace
    try:
        return Plan.reusing(
            namespace.num_layers,
            namespace.num_kv_heads,
            manifest.build["layers"],
            gate,
            Plan.from_dict(manifest.published.plan).feature_layer,
        )
    except ValueError as error:
        raise SettingsError(str(error)) from None


def _prompts(options: EvaluateOptions, path: Path) -> Prompts:
    from transformers import AutoTokenizer

    from attncache_vllm.serve_options import engine_args

    prompts = read_prompts(path)
    config = engine_args(options.model, options.serve_options).create_model_config()
    pooling = config.pooler_config.seq_pooling_type
    if pooling != "LAST":
        raise SettingsError(
            f"prompts need the embedding of the last token, got {pooling} pooling; add "
            '--pooler-config \'{"seq_pooling_type": "LAST"}\' --no-enable-prefix-caching'
        )
    folder = model_folder(options.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = [choice_tokens(tokenizer, prompt.choices) for prompt in prompts]
    return Prompts(prompts, tokens, output_embeddings(folder))


def _plan(manifest: Manifest, settings: dict[str, Any]) -> Plan:
    """The plan that a server with ``settings`` follows."""
    assert manifest.published is not None
    data: object = manifest.published.plan
    try:
        if (path := settings.get("plan")) is not None:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        return Plan.from_dict(data)
    except (OSError, ValueError) as error:
        raise SettingsError(f"the plan must be readable, got {error}") from None


def _serve(
    options: EvaluateOptions, tasks: Sequence[Task], name: str, settings: dict[str, Any] | None
) -> Served:
    """Answers to all tasks by a server of its own; without ``settings`` it is stock vLLM."""
    arguments = list(options.serve_options)
    if settings is not None:
        arguments += ["--attention-backend", "attncache"]
        arguments += ["--additional-config", json.dumps({"attncache": settings})]
    log = options.out / f"{name}.log"
    wanted = [task.sent if settings else task.sent + task.exact_only for task in tasks]
    answers = []
    with progress() as bar:
        sent = bar.add_task(f"{name}: starting, see {log}", total=sum(map(len, wanted)))
        with serve(options.model, arguments, log) as server:
            bar.update(sent, description=name)
            for task, texts in zip(tasks, wanted, strict=True):
                before = Counts.of(server)
                vectors: list[list[float]] = []
                for start in range(0, len(texts), BATCH):
                    batch = texts[start : start + BATCH]
                    vectors += embed(server, batch, task.raw)
                    bar.advance(sent, len(batch))
                counts = Counts.of(server).since(before)
                answers.append(Answers(torch.tensor(vectors, dtype=torch.float64), counts))
            canaries = [
                {**labels, "layer": int(labels["layer"]), "error": value}
                for labels, value in server.samples("attncache_canary_error")
            ]
    return Served(answers, canaries)


def embed(server: Server, texts: list[str], raw: bool) -> list[list[float]]:
    """Embeddings of ``texts`` from ``/v1/embeddings``.

    Args:
        server: who is asked.
        texts: any number; all in one request.
        raw: not normalised, and too long a text is an error; otherwise it is cut.

    Raises:
        AttnCacheError: the server refuses.
    """
    # -1 is the longest that the server takes.
    body: dict[str, Any] = {"use_activation": False} if raw else {"truncate_prompt_tokens": -1}
    try:
        answer = server.client().embeddings.create(
            model=MODEL_NAME, input=texts, encoding_format="float", extra_body=body
        )
    except BadRequestError as error:
        raise AttnCacheError(f"the server refused a text: {error.message}") from None
    return [item.embedding for item in answer.data]


def _row(
    task: Task, plan: Plan, kv_heads: int, exact: Tensor, reused: Answers, seed: int
) -> dict[str, Any]:
    figures: Figures = task.figures(exact, reused.embeddings, seed)
    return {
        "texts": len(reused.embeddings),
        **shares(plan, kv_heads, reused.counts),
        **figures.values,
        "ci95": {name: list(bounds) for name, bounds in figures.ci95.items()},
        "counts": reused.counts.plain(),
    }
