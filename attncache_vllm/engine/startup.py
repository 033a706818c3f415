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
from attncache_vllm.engine.eligibility import Reach, reach_of, reaches_of, why_engine_bypassed
from attncache_vllm.engine.layer import ReuseModule, ReuseScores
from attncache_vllm.engine.modules import AttentionModule, find_attention_modules
from attncache_vllm.engine.namespace import namespace_of, weights_fingerprint
from attncache_vllm.engine.record import Recorder, RecordModule, RecordScores, activate
from attncache_vllm.engine.runtime import Lookups, Serving
from attncache_vllm.engine.step import prompts_of
from attncache_vllm.errors import SettingsError, StoreError
from attncache_vllm.reuse.feature import Projector
from attncache_vllm.reuse.plan import LayerPlan, Plan
from attncache_vllm.store.local import LocalStore
from attncache_vllm.store.manifest import FILE_NAME as MANIFEST_NAME
from attncache_vllm.store.manifest import Manifest
from attncache_vllm.store.protocol import Namespace

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = compat.get_logger(__name__)


def check_before_start(vllm_config: VllmConfig) -> None:
    """Refuse bad settings and a store of another model before any process is spawned.

    Raises:
        SettingsError, StoreError: with rule, value and remedy. A selected backend is never
            silently off.
    """
    settings = load_settings(vllm_config.additional_config)
    if settings.record is not None:
        bypassed = why_engine_bypassed(vllm_config)
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
    namespace = namespace_of(vllm_config, weights_fingerprint(model, modules))
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
    engine_reason = why_engine_bypassed(
        vllm_config, reuse_with_prefix_caching=settings.reuse_with_prefix_caching
    )
    reaches = reaches_of(modules, vllm_config, namespace.num_layers)
    if engine_reason is not None:
        reaches = [Reach("nothing", engine_reason)] * namespace.num_layers
    treatments = Counter(_treatment(reach, plan.layers[i]) for i, reach in enumerate(reaches))
    for treatment, count in treatments.items():
        metrics.LAYERS.labels(treatment).set(count)
        if treatment.startswith(("bypassed", "partly")):
            logger.warning("attncache: %d layers %s", count, treatment)
    reusable = [
        found
        for found in modules
        if found.index in plan.reused_layers and reaches[found.index].skips != "nothing"
    ]

    projector = Projector.from_bytes(store.projector_bytes)
    if projector.hidden_size != _hidden_size(vllm_config):
        raise StoreError(
            f"the store's projector takes inputs of width {projector.hidden_size}, the model has "
            f"{_hidden_size(vllm_config)}; build the store again for this model"
        )
    if reusable:
        _hook_serving(modules, reusable, reaches, plan, projector, store, settings)
    else:
        # Nothing will be looked up, but sequences are counted with the reason.
        reason = next((reaches[i].reason for i in plan.reused_layers), None) or "an exact plan"
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


def _treatment(reach: Reach, layer: LayerPlan) -> str:
    """A layer's label in log and metrics."""
    if reach.skips == "nothing":
        return f"bypassed: {reach.reason}"
    if layer.source == "exact":
        return "exact"
    return "reused" if reach.skips == "module" else f"partly: {reach.reason}"


def _hook_serving(
    modules: list[AttentionModule],
    reusable: list[AttentionModule],
    reaches: list[Reach],
    plan: Plan,
    projector: Projector,
    store: LocalStore,
    settings: Settings,
) -> None:
    from attncache_vllm.engine import ops

    lookups = Lookups(
        store,
        projector,
        plan,
        settings,
        layouts={found.index: found.layout for found in reusable},
        device=next(reusable[0].module.parameters()).device,
    )
    feature = _feature_module(modules, plan.feature_layer)
    serving = Serving(plan, lookups, settings, projector.slots, feature.name)
    for found in reusable:
        if reaches[found.index].skips == "module":
            ops.replace_forward(found, ReuseModule(found, serving))
        else:
            found.attention.attncache_scores = ReuseScores(found, serving)
    ops.observe_input(feature, serving.observe)


def _count_bypass(reason: str, outcomes: metrics.Outcomes, source: compat.MetadataSource) -> None:
    prompts = prompts_of(source)
    outcomes.bypass(reason, len(prompts.whole) + prompts.ending)
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
    reaches = {found.index: reach_of(found, vllm_config) for found in wanted}
    for index, reach in reaches.items():
        if reach.skips == "nothing":
            raise SettingsError(
                f"layer {index} cannot be recorded: {reach.reason}; leave it out with --layers"
            )
    feature = _feature_module(modules, settings.record.feature_layer)
    store = _open_for_recording(settings.store, settings.record, namespace)
    layouts = {found.index: found.layout for found in wanted}
    recorder = Recorder(store, settings.record, feature.name, layouts)
    for found in wanted:
        found.attention.attncache_scores = RecordScores(found, recorder)
        if reaches[found.index].skips == "module":
            ops.replace_forward(found, RecordModule(found, recorder))
    ops.observe_input(feature, recorder.observe)
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
