# SPDX-License-Identifier: Apache-2.0
"""From a selected backend to hooked attention modules: checks in the front end, then the worker."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from attncache_vllm.config import RecordSettings, Settings, load_settings
from attncache_vllm.engine import compat, metrics
from attncache_vllm.engine.layer import (
    AttentionModule,
    ReuseAttention,
    find_attention_modules,
    why_not_reusable,
)
from attncache_vllm.engine.namespace import namespace_of, weights_fingerprint
from attncache_vllm.engine.record import RecordAttention, Recorder, activate
from attncache_vllm.engine.runtime import Lookups, Serving
from attncache_vllm.engine.step import sequences_of
from attncache_vllm.errors import SettingsError, StoreError
from attncache_vllm.reuse.feature import Projector
from attncache_vllm.reuse.plan import Plan
from attncache_vllm.store.local import LocalStore
from attncache_vllm.store.manifest import FILE_NAME as MANIFEST_NAME
from attncache_vllm.store.manifest import Manifest
from attncache_vllm.store.protocol import Namespace

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = compat.get_logger(__name__)


def why_engine_bypassed(vllm_config: VllmConfig) -> str | None:
    """The reason why no layer of this engine can reuse maps; None when layers can."""
    parallel = vllm_config.parallel_config
    if vllm_config.model_config.runner_type != "pooling":
        return "generation runner: start with --runner pooling"
    if vllm_config.model_config.use_mla:
        return "multi-head latent attention"
    if vllm_config.cache_config.enable_prefix_caching:
        return "prefix caching: start with --no-enable-prefix-caching"
    if vllm_config.scheduler_config.enable_chunked_prefill:
        return "chunked prefill: start with --no-enable-chunked-prefill"
    if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
        return "tensor or pipeline parallelism"
    if vllm_config.lora_config is not None:
        return "LoRA adapters"
    if vllm_config.model_config.is_encoder_decoder:
        return "encoder-decoder model"
    return None


def check_before_start(vllm_config: VllmConfig) -> None:
    """Refuse bad settings and a store of another model before any process is spawned.

    Raises:
        SettingsError, StoreError: with rule, value and remedy. A selected backend is never
            silently off.
    """
    settings = load_settings(vllm_config.additional_config)
    bypassed = why_engine_bypassed(vllm_config)
    if settings.record is not None:
        if bypassed is not None:
            raise SettingsError(f"maps cannot be recorded by this engine: {bypassed}")
        if (settings.store / MANIFEST_NAME).exists():
            _check_begun_with(Manifest.read(settings.store), settings.record)
        return
    # The weights are not loaded yet: here the store's own stand for them, the worker compares.
    weights = Manifest.read(settings.store).namespace.weights
    with LocalStore.open(settings.store, namespace=namespace_of(vllm_config, weights)) as store:
        Plan.from_dict(store.plan)


def attach(model: torch.nn.Module, vllm_config: VllmConfig) -> None:
    """Hook the attention modules of a loaded model whose weights are not repacked yet."""
    settings = load_settings(vllm_config.additional_config)
    modules = find_attention_modules(model)
    namespace = namespace_of(vllm_config, weights_fingerprint(model))
    if settings.record is not None:
        _attach_recording(modules, vllm_config, settings, namespace)
    else:
        _attach_serving(modules, vllm_config, settings, namespace)


def _attach_serving(
    modules: list[AttentionModule],
    vllm_config: VllmConfig,
    settings: Settings,
    namespace: Namespace,
) -> None:
    store = LocalStore.open(settings.store, namespace=namespace)
    plan = _effective_plan(store, settings)
    if len(plan.layers) != namespace.num_layers:
        raise StoreError(
            f"a plan needs an entry for each of the model's {namespace.num_layers} layers, got "
            f"{len(plan.layers)}; build the store again"
        )
    treatments: Counter[str] = Counter()
    reusable: list[AttentionModule] = []
    engine_reason = why_engine_bypassed(vllm_config)
    if not modules:
        engine_reason = engine_reason or "no attention module with a qkv_proj was found"
        treatments[f"bypassed: {engine_reason}"] = namespace.num_layers
    for found in modules:
        reason = engine_reason or why_not_reusable(found, _hidden_size(vllm_config))
        if reason is not None:
            treatments[f"bypassed: {reason}"] += 1
        elif found.index in plan.reused_layers:
            treatments["reused"] += 1
            reusable.append(found)
        else:
            treatments["exact"] += 1
    for treatment, count in treatments.items():
        metrics.LAYERS.labels(treatment).set(count)
        if treatment.startswith("bypassed"):
            logger.warning("attncache: %d layers %s", count, treatment)

    projector = Projector.from_bytes(store.projector_bytes)
    if projector.hidden_size != _hidden_size(vllm_config):
        raise StoreError(
            f"the store's projector takes inputs of width {projector.hidden_size}, the model has "
            f"{_hidden_size(vllm_config)}; build the store again for this model"
        )
    if reusable:
        _hook_serving(modules, reusable, plan, projector, store, settings)
    else:
        # Nothing will be looked up, but sequences are counted with the reason.
        reason = engine_reason or next(iter(treatments), "no layer").removeprefix("bypassed: ")
        outcomes = metrics.Outcomes(settings.log_interval_s)
        compat.leave_bypass_counter(vllm_config, functools.partial(_count_bypass, reason, outcomes))
    stats = store.stats()
    logger.info(
        "attncache: %s, namespace %s, %d entries, %d of %d layers with reuse (%s), gate <= %s, "
        "%.1f MiB in the store, up to %d MiB resident",
        "active" if reusable else "every sequence is bypassed",
        namespace.digest()[:12],
        stats.entries,
        len(reusable),
        namespace.num_layers,
        ", ".join(str(found.index) for found in reusable) or "none",
        max((plan.layers[found.index].max_distance for found in reusable), default="-"),
        stats.bytes / 2**20,
        settings.resident_mib,
    )


def _hook_serving(
    modules: list[AttentionModule],
    reusable: list[AttentionModule],
    plan: Plan,
    projector: Projector,
    store: LocalStore,
    settings: Settings,
) -> None:
    from attncache_vllm.engine import ops

    attention = reusable[0].attention
    lookups = Lookups(
        store,
        projector,
        plan,
        settings,
        heads=(attention.num_heads, attention.num_kv_heads),
        device=reusable[0].module.qkv_proj.weight.device,
    )
    feature = _feature_module(modules, plan.feature_layer)
    serving = Serving(plan, lookups, settings, projector.slots, feature.name)
    for found in reusable:
        found.attention.attncache = ReuseAttention(found, serving)
        ops.replace_forward(found.module, found.name)
    ops.observe_input(feature.module, feature.name, serving.observe, feature.attention)


def _count_bypass(reason: str, outcomes: metrics.Outcomes, source: compat.MetadataSource) -> None:
    # A sequence in chunks counts at its first one, where context and query have equal length.
    whole, _ = sequences_of(source)
    outcomes.bypass(reason, len(whole))
    outcomes.log(logger)


def _attach_recording(
    modules: list[AttentionModule],
    vllm_config: VllmConfig,
    settings: Settings,
    namespace: Namespace,
) -> None:
    from attncache_vllm.engine import ops

    assert settings.record is not None
    wanted = [found for found in modules if found.index in settings.record.layers]
    missing = sorted(set(settings.record.layers) - {found.index for found in wanted})
    if missing:
        raise SettingsError(
            f"layers to record must be attention layers of the model, got {missing!r}; it has "
            f"{[found.index for found in modules]!r}"
        )
    for found in wanted:
        reason = why_not_reusable(found, _hidden_size(vllm_config))
        if reason is not None:
            raise SettingsError(
                f"layer {found.index} cannot be recorded: {reason}; leave it out with --layers"
            )
    store = _open_for_recording(settings.store, settings.record, namespace)
    feature = _feature_module(modules, settings.record.feature_layer)
    recorder = Recorder(store, settings.record, feature.name)
    for found in wanted:
        found.attention.attncache = RecordAttention(found, recorder)
        ops.replace_forward(found.module, found.name)
    ops.observe_input(feature.module, feature.name, recorder.observe, feature.attention)
    activate(recorder)
    logger.info("attncache: recording layers %s into %s", settings.record.layers, settings.store)


def _open_for_recording(path: Path, record: RecordSettings, namespace: Namespace) -> LocalStore:
    if not (path / MANIFEST_NAME).exists():
        return LocalStore.create(path, namespace, record.model_dump(mode="json"))
    _check_begun_with(Manifest.read(path), record)
    return LocalStore.open(path, writable=True, namespace=namespace)


def _check_begun_with(manifest: Manifest, record: RecordSettings) -> None:
    asked = record.model_dump(mode="json")
    if manifest.build != asked:
        raise SettingsError(
            f"a store is extended with the settings it was begun with, {manifest.build!r}, "
            f"got {asked!r}; give the same ones or another --store"
        )


def _effective_plan(store: LocalStore, settings: Settings) -> Plan:
    plan = Plan.from_dict(store.plan)
    if settings.max_distance is None:
        return plan
    return dataclasses.replace(
        plan,
        layers=tuple(
            dataclasses.replace(layer, max_distance=settings.max_distance) for layer in plan.layers
        ),
    )


def _feature_module(modules: list[AttentionModule], index: int) -> AttentionModule:
    for found in modules:
        if found.index == index:
            return found
    raise SettingsError(
        f"the feature layer must be an attention layer of the model, got {index!r}; it has "
        f"{[found.index for found in modules]!r}"
    )


def _hidden_size(vllm_config: VllmConfig) -> int:
    return int(vllm_config.model_config.get_hidden_size())
