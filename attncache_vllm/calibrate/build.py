# SPDX-License-Identifier: Apache-2.0
"""``attncache build``: record maps through vLLM, train the projector, publish the store.

Recording runs the model in vLLM itself, with the same ops and seams as serving. It can be cut off
at any time and continues where it stopped: what is committed stays, and texts that are already in
the store are skipped.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from attncache_vllm.calibrate.corpus import Text as CorpusText
from attncache_vllm.calibrate.corpus import token_hash
from attncache_vllm.calibrate.model import model_config
from attncache_vllm.calibrate.progress import progress
from attncache_vllm.calibrate.train import (
    MIN_ENTRIES,
    TrainReport,
    digest,
    map_distance,
    train_projector,
)
from attncache_vllm.errors import AttnCacheError, SettingsError, StoreError
from attncache_vllm.names import CodecName
from attncache_vllm.reuse.codecs import decode_blocks
from attncache_vllm.reuse.feature import Projector
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.plan import Plan, last_third
from attncache_vllm.serve_options import engine_args
from attncache_vllm.store import LocalStore, Record
from attncache_vllm.store.manifest import Manifest

Layouts = dict[int, MapLayout]

COMMIT_EVERY = 16
KV_CACHE_BYTES = 2**30
EPOCHS = 20
# When two maps are compared about this many rows of the longest text stand for all of them, but
# at least every 16th.
SAMPLED_ROWS = 32
# A pair of which one text is half as long as the other counts as a tenth of the mass apart.
LENGTH_WEIGHT = 0.2


@dataclass(frozen=True)
class BuildOptions:
    """What ``attncache build`` was asked for. ``layers`` None means the last third;
    ``serve_options`` are those of ``vllm serve`` that decide what the model computes."""

    model: str
    store: Path
    layers: tuple[int, ...] | None = None
    feature_layer: int = 0
    max_entries: int = 1000
    max_bytes: int | None = None
    min_tokens: int = 16
    max_tokens: int = 512
    max_distance: float = 0.2
    factory: str = "auto"
    codec: CodecName = "tiles-u8-lse"
    slots: int = 8
    seed: int = 0
    serve_options: tuple[str, ...] = ()


def build(options: BuildOptions, texts: Sequence[CorpusText]) -> dict[str, Any]:
    """Build or extend the store; returns figures for the user.

    A store that was calibrated keeps its projector, plan and artifacts: new entries only become
    findable, because the calibrated gate is in units of the projector's distances.

    Raises:
        SettingsError, StoreError: with rule, value and remedy.
    """
    num_layers, longest = _limits(options)
    options = replace(options, max_tokens=min(options.max_tokens, longest))
    try:
        layers = options.layers or last_third(num_layers)
        # The KV heads of each layer are known once the model is loaded.
        plan = Plan.reusing(num_layers, 1, layers, options.max_distance, options.feature_layer)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    recorded, layouts = _record(options, plan.reused_layers, texts)
    neighbour = plan.sources["neighbour"]
    groups = tuple(
        tuple(range(layouts[layer].num_kv_heads)) if layer in layouts else ()
        for layer in range(num_layers)
    )
    plan = replace(plan, sources={"neighbour": replace(neighbour, groups=groups)})
    return {**recorded, "num_layers": num_layers, **_publish(options, plan, layouts)}


def _limits(options: BuildOptions) -> tuple[int, int]:
    """Number of layers of the model, and the longest sequence vLLM takes for it."""
    config = model_config(options.model, options.serve_options)
    return int(config.hf_text_config.num_hidden_layers), int(config.max_model_len)


def _record(
    options: BuildOptions, layers: tuple[int, ...], texts: Sequence[CorpusText]
) -> tuple[dict[str, Any], Layouts]:
    from vllm.v1.engine.exceptions import EngineDeadError

    llm = _recording_engine(options, layers)
    try:
        layouts = {
            layer: MapLayout(heads, kv_heads, Mask(causal, window))
            for layer, heads, kv_heads, causal, window in llm.collective_rpc("attncache_layouts")[0]
        }
        report = _record_texts(llm, options, texts)
        llm.collective_rpc("attncache_close")
        return report, layouts
    except EngineDeadError:
        raise AttnCacheError(
            "the engine stopped while recording; its log above says why. What was committed stays: "
            "call again to continue"
        ) from None
    except BaseException:
        # Interrupted: keep what was recorded since the last flush, if that is still possible.
        with contextlib.suppress(Exception):
            llm.collective_rpc("attncache_flush", timeout=10)
        raise
    finally:
        # The store is closed: nothing is worth the seconds that vLLM gives its workers to end.
        llm.llm_engine.engine_core.shutdown(timeout=0)


def _recording_engine(options: BuildOptions, layers: tuple[int, ...]) -> Any:
    from vllm import LLM

    record = {
        "layers": list(layers),
        "feature_layer": options.feature_layer,
        "slots": options.slots,
        "codec": options.codec,
    }
    arguments = engine_args(options.model, options.serve_options)
    # Whole sequences, one per step: what recording needs, whatever the model's pooling.
    arguments.enable_prefix_caching = False
    arguments.enable_chunked_prefill = False
    arguments.max_num_seqs = 1
    arguments.max_model_len = options.max_tokens
    arguments.max_num_batched_tokens = options.max_tokens
    # One sequence at a time needs little, and nothing of it is kept.
    arguments.kv_cache_memory_bytes = KV_CACHE_BYTES
    arguments.enforce_eager = True
    arguments.attention_backend = "attncache"
    arguments.worker_extension_cls = "attncache_vllm.engine.record.RecorderExtension"
    arguments.additional_config = {"attncache": {"store": str(options.store), "record": record}}
    try:
        return LLM.from_engine_args(arguments)
    except RuntimeError as error:
        # Raised in another process, whose log has the cause; a traceback of this one has not.
        raise AttnCacheError(f"vLLM could not start to record: {error}") from None


def _record_texts(llm: Any, options: BuildOptions, texts: Sequence[CorpusText]) -> dict[str, Any]:
    tokenizer = llm.get_tokenizer()
    stats = llm.collective_rpc("attncache_stats")[0]
    known = {entry.token_hash for entry in Manifest.read(options.store).entries}
    skipped = recorded = 0
    total = min(options.max_entries, len(known) + len(texts))
    started = time.monotonic()
    with progress() as bar:
        task = bar.add_task("recording", total=total, completed=len(known))
        for text in texts:
            if stats["entries"] >= options.max_entries:
                break
            if options.max_bytes is not None and stats["bytes"] >= options.max_bytes:
                break
            # Truncated as a tokenizer does it: special tokens at the end stay.
            token_ids = tokenizer(
                text.text, text.pair, truncation=True, max_length=options.max_tokens
            ).input_ids
            identity = token_hash(token_ids)
            if identity in known or len(token_ids) < options.min_tokens:
                skipped += 1
                continue
            known.add(identity)
            _prefill(llm, text, token_ids, options.max_tokens)
            stats = llm.collective_rpc("attncache_commit", args=(token_ids,))[0]
            recorded += 1
            bar.update(task, completed=stats["entries"])
            if stats["entries"] % COMMIT_EVERY == 0:
                llm.collective_rpc("attncache_flush")
        # The last record may still be written, which counts.
        stats = llm.collective_rpc("attncache_stats")[0]
    return {
        "recorded": recorded,
        "skipped": skipped,
        "sequences_per_second": recorded / (time.monotonic() - started),
        "parity": stats["parity"],
    }


def _prefill(llm: Any, text: CorpusText, token_ids: list[int], max_tokens: int) -> None:
    """Run one text, or one pair as the model's cross-encoder joins them."""
    if text.pair is None:
        prompt = {"prompt_token_ids": token_ids}
        llm.encode([prompt], pooling_task=llm.pooling_task, use_tqdm=False)
        return
    try:
        truncate = {"truncate_prompt_tokens": max_tokens}
        llm.score(text.text, text.pair, use_tqdm=False, tokenization_kwargs=truncate)
    except ValueError as error:
        raise SettingsError(
            'a corpus with "text_pair" needs a model that scores pairs, got '
            f"{llm.model_config.architecture}: {error}"
        ) from None


@dataclass(frozen=True)
class Published:
    """What a store is published with, apart from what follows from its entries."""

    plan: dict[str, Any]
    report: dict[str, Any]
    projector: bytes
    artifacts: dict[str, bytes]


def _publish(options: BuildOptions, plan: Plan, layouts: Layouts) -> dict[str, Any]:
    with LocalStore.open(options.store, writable=True) as store:
        # Before anything is dropped: nothing is published after that.
        kept = _calibrated(store)
        store.drop_damaged()
        if (entries := len(store.manifest.entries)) < MIN_ENTRIES:
            raise SettingsError(
                f"a store needs at least {MIN_ENTRIES} entries to train its projector, got "
                f"{entries} of at least {options.min_tokens} tokens; give a larger corpus"
            )
        if kept is None:
            pooled, projector, report = _train(store, layouts, options.seed)
            new = Published(plan.to_dict(), asdict(report), projector.to_bytes(), {})
        else:
            pooled, new = _stacked([record.pooled for record in _read_back(store)]), kept
            projector = Projector.from_bytes(kept.projector)
        with torch.inference_mode():
            features = projector(pooled).numpy()
        store.publish(features=features, factory=options.factory, **vars(new))
        stats = store.stats()
    return {
        "entries": stats.entries,
        "bytes": stats.bytes,
        "layers": list(Plan.from_dict(new.plan).reused_layers),
        "training": new.report if kept is None else None,
    }


def _calibrated(store: LocalStore) -> Published | None:
    """What a calibrated store keeps; ``None`` for one that was built only."""
    published = store.manifest.published
    if published is None or "calibration" not in published.report:
        return None
    try:
        projector = store.projector_bytes
    except StoreError as error:
        _warn(f"the calibration is lost with the projector, calibrate again: {error}")
        return None
    found = {name: store.artifact(name) for name in published.artifacts}
    artifacts = {name: data for name, data in found.items() if data is not None}
    return Published(published.plan, published.report, projector, artifacts)


def _read_back(store: LocalStore) -> Iterator[Record]:
    """All records, in order, with a progress bar."""
    with progress() as bar:
        total = len(store.manifest.entries)
        for _, record in bar.track(store.records(), total=total, description="reading back"):
            yield record


def _train(
    store: LocalStore, layouts: Layouts, seed: int
) -> tuple[torch.Tensor, Projector, TrainReport]:
    """Feature inputs of all entries, ``[N, slots, hidden]`` float32, and a projector for them."""
    lengths = [entry.length for entry in store.manifest.entries]
    stride = max(1, min(16, max(lengths) // SAMPLED_ROWS))
    # From a row that every entry has, so that any two entries can be compared.
    positions = range(min(*lengths, stride) - 1, max(lengths), stride)
    inputs, digests = [], []
    for record in _read_back(store):
        # First, middle and last recorded layer: the label is an average, and these span it.
        layers = sorted(record.maps)
        maps = [
            decode_blocks(
                record.codec,
                torch.from_numpy(record.maps[layer].copy()),
                layouts[layer],
                record.length,
            )
            for layer in sorted({layers[0], layers[len(layers) // 2], layers[-1]})
        ]
        inputs.append(record.pooled)
        digests.append(digest(maps, positions))
    pooled = _stacked(inputs)
    with progress() as bar:
        task = bar.add_task("training", total=EPOCHS)
        projector, report = train_projector(
            pooled,
            lambda i, j: map_distance(digests[i], digests[j], LENGTH_WEIGHT),
            seed=seed,
            epochs=EPOCHS,
            on_epoch=lambda epoch, *_: bar.update(task, completed=epoch),
        )
    return pooled, projector, report


def _stacked(inputs: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(inputs)).float()


def _warn(message: str) -> None:
    Console(stderr=True, markup=False, emoji=False).print(f"warning: {message}", soft_wrap=True)
