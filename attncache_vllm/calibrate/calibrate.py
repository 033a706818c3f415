# SPDX-License-Identifier: Apache-2.0
"""``attncache calibrate``: which KV groups of which layers may be served, from where, and when.

Texts are parted by seed: some make templates and corrections, some choose the plan, some check it,
and some, which took part in nothing, tell what it keeps.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from attncache_vllm import __version__
from attncache_vllm.calibrate.aligned import CHOOSE_RATE, AlignedChooser
from attncache_vllm.calibrate.budget import Budget
from attncache_vllm.calibrate.choose import Chosen
from attncache_vllm.calibrate.corpus import Text, how_many, token_hash
from attncache_vllm.calibrate.edits import Tokens, vocabulary_of
from attncache_vllm.calibrate.measure import Task
from attncache_vllm.calibrate.model import CalibratedModel
from attncache_vllm.calibrate.neighbour import NeighbourChooser
from attncache_vllm.calibrate.progress import progress
from attncache_vllm.calibrate.rehearse import Rehearsal, edited_others
from attncache_vllm.calibrate.saving import SavingModel
from attncache_vllm.calibrate.template import TemplateChooser
from attncache_vllm.calibrate.trials import Trials
from attncache_vllm.errors import SettingsError
from attncache_vllm.reuse.correct import corrections_to_bytes
from attncache_vllm.reuse.plan import Plan, SourcePlan
from attncache_vllm.reuse.template import Templates
from attncache_vllm.store.local import LocalStore
from attncache_vllm.store.manifest import Manifest

TRIALS_NAME = "calibration.json"
# Fewer texts say too little about ranks.
MIN_TEXTS = 24
# What is measured and averaged is bounded by the time it takes, which goes with the tokens, and
# measured texts by their number as well: ranks of their pairs need no more, however short they are.
MAX_FIT_TOKENS = 75_000
MAX_CHOOSE_TOKENS = 24_576
MAX_CHECK_TOKENS = 32_768
MAX_REHEARSED_TOKENS = 32_768
MAX_MEASURED_TEXTS = 256


@dataclass(frozen=True)
class CalibrateOptions:
    """What ``attncache calibrate`` was asked for. ``task`` is that of the budget, if it has one."""

    model: str
    store: Path
    budget: Budget
    task: Task | None = None
    sources: tuple[str, ...] = ("template", "aligned")
    min_tokens: int = 16
    max_tokens: int = 512
    seed: int = 0
    serve_options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Splits:
    """Token ids of the texts, by what they are used for."""

    fit: list[Tokens]
    choose: list[Tokens]
    check: list[Tokens]
    rehearse: list[Tokens]


def calibrate(options: CalibrateOptions, texts: Sequence[Text]) -> dict[str, Any]:
    """Calibrate the store's plan; returns the report that is published with it.

    Cut off, it goes on with the next trial when called again.

    Raises:
        SettingsError, StoreError: with rule, value and remedy.
    """
    started = time.monotonic()
    manifest = Manifest.read(options.store)
    longest = max((entry.length for entry in manifest.entries), default=options.max_tokens)
    max_tokens = max(options.max_tokens, longest)
    model = CalibratedModel(options.model, options.store, max_tokens, options.serve_options)
    try:
        splits = _split(model, options, texts)
        trials = Trials(options.store / TRIALS_NAME, _fingerprint(options, splits, manifest))
        saving = _saving(model, splits)
        chosen, artifacts, bands = _choose(model, options, splits, trials, saving)
        report = _report(options, splits, chosen, saving, bands)
        with LocalStore.open(options.store) as store:
            plan = replace(Plan.from_dict(store.plan), sources=_sources(chosen))
            report["rehearsed"] = _rehearsed(
                model, options, splits, store, plan, chosen, artifacts.get("templates")
            )
        report["seconds"] = round(time.monotonic() - started, 1)
        # Not before: who writes to a store keeps others from it.
        with LocalStore.open(options.store, writable=True) as store:
            published = store.manifest.published
            assert published is not None
            told = {**published.report, "calibration": report}
            store.publish_plan(plan.to_dict(), told, artifacts)
        trials.discard()
    finally:
        model.close()
    return report


def _split(model: CalibratedModel, options: CalibrateOptions, texts: Sequence[Text]) -> Splits:
    tokens: dict[bytes, Tokens] = {}
    with progress() as bar:
        for text in bar.track(texts, description="reading texts"):
            ids = model.tokenize(text.text, text.pair, options.max_tokens)
            if len(ids) >= options.min_tokens:
                tokens.setdefault(token_hash(ids.tolist()), ids)
    if len(tokens) < MIN_TEXTS:
        raise SettingsError(
            f"a calibration needs at least {MIN_TEXTS} different texts of at least "
            f"{options.min_tokens} tokens, got {len(tokens)}; give a larger corpus"
        )
    every = [tokens[key] for key in sorted(tokens)]
    random.Random(options.seed).shuffle(every)
    part = min(MAX_MEASURED_TEXTS, len(every) // 5)
    measured = []
    for max_tokens in (MAX_CHECK_TOKENS, MAX_CHOOSE_TOKENS, MAX_REHEARSED_TOKENS):
        measured.append(every[: how_many(every[:part], max_tokens)])
        every = every[len(measured[-1]) :]
    check, choose, rehearse = measured
    return Splits(every[: how_many(every, MAX_FIT_TOKENS)], choose, check, rehearse)


def _fingerprint(options: CalibrateOptions, splits: Splits, manifest: Manifest) -> str:
    """Everything that the result of a trial depends on."""
    digest = hashlib.sha256()
    digest.update(json.dumps([__version__, manifest.namespace.digest(), options.seed]).encode())
    digest.update(json.dumps(options.serve_options).encode())
    if options.task is not None:
        digest.update(json.dumps([options.task.sent, options.task.exact_only]).encode())
    for part in vars(splits).values():
        for tokens in part:
            digest.update(token_hash(tokens.tolist()))
    for entry in manifest.entries:
        digest.update(entry.token_hash)
    return digest.hexdigest()


def _saving(model: CalibratedModel, splits: Splits) -> SavingModel:
    lengths = sorted(len(tokens) for tokens in splits.check)
    config = model.config
    return SavingModel(
        model.calibrator.layouts,
        hidden=config.get_hidden_size(),
        head_size=config.get_head_size(),
        num_layers=config.hf_text_config.num_hidden_layers,
        length=lengths[len(lengths) // 2],
    )


def _choose(
    model: CalibratedModel,
    options: CalibrateOptions,
    splits: Splits,
    trials: Trials,
    saving: SavingModel,
) -> tuple[dict[str, Chosen], dict[str, bytes], list[dict[str, Any]]]:
    """What was chosen by source, what is published beside the plan, and the neighbours' bands."""
    bands: list[dict[str, Any]] = []
    chosen: dict[str, Chosen] = {}
    artifacts: dict[str, bytes] = {}
    if "template" in options.sources:
        parts = splits.fit, splits.choose, splits.check
        templates = TemplateChooser(model, *parts, options.task, trials, saving)
        found = templates.choose(options.budget)
        if found is not None:
            chosen["template"] = found
            artifacts["templates"] = templates.selected(found).to_bytes()
    if "aligned" in options.sources:
        vocabulary = vocabulary_of(splits.fit, model.special_tokens())
        aligned = AlignedChooser(model, options.store, options.seed, vocabulary, trials, saving)
        chosen.update(aligned.choose(options.budget))
    if "neighbour" in options.sources:
        neighbours = NeighbourChooser(
            model, options.store, splits.choose, splits.check, trials, saving
        )
        nearest, bands = neighbours.choose(options.budget)
        # It comes before a template, which serves every text: it must save more.
        least = chosen["template"].predicted["saving"] if "template" in chosen else 0.0
        if nearest is not None and nearest.predicted["saving"] > least:
            chosen["neighbour"] = nearest
    corrections = {
        (source, layer): correction
        for layer, of_layer in model.calibrator.corrections.items()
        for source, correction in of_layer.items()
        if source in chosen and layer in chosen[source].plan.corrected
    }
    if corrections:
        artifacts["corrections"] = corrections_to_bytes(corrections)
    return chosen, artifacts, bands


def _report(
    options: CalibrateOptions,
    splits: Splits,
    chosen: dict[str, Chosen],
    saving: SavingModel,
    bands: list[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "budget": asdict(options.budget),
        "texts": {name: len(part) for name, part in vars(splits).items()},
        "tokens": saving.length,
        "sensitivity": {source: part.sensitivity for source, part in chosen.items()},
        "curve": {source: part.curve for source, part in chosen.items()},
        "predicted": {source: part.predicted for source, part in chosen.items()},
        "neighbour_bands": bands,
        "seed": options.seed,
    }


def _rehearsed(
    model: CalibratedModel,
    options: CalibrateOptions,
    splits: Splits,
    store: LocalStore,
    plan: Plan,
    chosen: dict[str, Chosen],
    templates: bytes | None,
) -> dict[str, Any]:
    """What the plan keeps of texts like the corpus, and of edited copies of entries if those may be
    served; nothing if nothing may."""
    if not chosen:
        return {}
    layouts = model.calibrator.layouts
    made = Templates({}) if templates is None else Templates.from_bytes(templates, layouts)
    rehearsal = Rehearsal(model, store, plan, made)
    found = {"corpus": rehearsal.figures(splits.rehearse)}
    if "aligned" in chosen:
        taken = chosen["aligned"].predicted["entries"]
        vocabulary = vocabulary_of(splits.fit, model.special_tokens())
        seed, longest = options.seed, model.max_tokens
        copies = edited_others(store, taken, CHOOSE_RATE, vocabulary, longest, seed)
        if copies:
            figures = rehearsal.figures(list(copies.values()))
            found["edits"] = {**figures, "entries": list(copies)}
    return found


def _sources(chosen: dict[str, Chosen]) -> dict[Any, SourcePlan]:
    return {source: part.plan for source, part in chosen.items()}
