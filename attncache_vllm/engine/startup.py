# SPDX-License-Identifier: Apache-2.0
"""From a selected backend to hooked attention modules: checks in the front end, then the worker."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from attncache_vllm.config import Settings, load_settings
from attncache_vllm.engine import compat, costs, metrics
from attncache_vllm.engine.admit import admissions_of
from attncache_vllm.engine.canary import Canaries
from attncache_vllm.engine.eligibility import Reach, reaches_of, why_engine_bypassed
from attncache_vllm.engine.layer import ReuseModule, ReuseScores
from attncache_vllm.engine.lookups import Lookups
from attncache_vllm.engine.meter import Meter
from attncache_vllm.engine.modules import AttentionModule, feature_module, find_attention_modules
from attncache_vllm.engine.namespace import namespace_of, weights_fingerprint
from attncache_vllm.engine.offline import (
    attach_calibration,
    attach_recording,
    check_begun_with,
)
from attncache_vllm.engine.runtime import Serving
from attncache_vllm.engine.step import prompts_of
from attncache_vllm.errors import SettingsError, StoreDamaged, StoreError
from attncache_vllm.reuse.codecs import servable, servable_template
from attncache_vllm.reuse.correct import Correction, Corrections, corrections_from_bytes
from attncache_vllm.reuse.feature import Projector
from attncache_vllm.reuse.layout import MapLayout
from attncache_vllm.reuse.plan import Plan, Source
from attncache_vllm.reuse.template import Templates
from attncache_vllm.store.home import open_store
from attncache_vllm.store.local import LocalStore
from attncache_vllm.store.manifest import FILE_NAME as MANIFEST_NAME
from attncache_vllm.store.manifest import Manifest
from attncache_vllm.store.protocol import Namespace, ServedStore

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
        if (settings.folder / MANIFEST_NAME).exists():
            check_begun_with(Manifest.read(settings.folder), settings.record)
        return
    if isinstance(settings.store, str) and not settings.calibrate:
        # One connection to a cluster is enough, and it is the worker's.
        _check_for_ray(settings.store)
        return
    # The weights are not loaded yet: here the store's own stand for them, the worker compares.
    weights = Manifest.read(settings.folder).namespace.weights
    with LocalStore.open(settings.folder, namespace=namespace_of(vllm_config, weights)) as store:
        effective_plan(store, settings)


def _check_for_ray(address: str) -> None:
    if importlib.util.find_spec("ray") is None:
        raise SettingsError(
            f"a store on a Ray cluster needs the package ray, got {address!r} without it; install "
            "attncache-vllm[ray], or give the folder of a store"
        )


def attach(model: torch.nn.Module, vllm_config: VllmConfig) -> None:
    """Hook the attention modules of a loaded model whose weights are not repacked yet."""
    settings = load_settings(vllm_config.additional_config)
    modules = find_attention_modules(model)
    namespace = namespace_of(vllm_config, weights_fingerprint(model, modules))
    if settings.record is not None:
        attach_recording(modules, vllm_config, settings, namespace)
    elif settings.calibrate:
        attach_calibration(modules, vllm_config, settings, namespace)
    else:
        _attach_serving(modules, vllm_config, settings, namespace)


def _attach_serving(
    modules: list[AttentionModule],
    vllm_config: VllmConfig,
    settings: Settings,
    namespace: Namespace,
) -> None:
    from attncache_vllm.engine import ops

    store = open_store(settings.store, namespace)
    plan = effective_plan(store, settings)
    engine_reason = why_engine_bypassed(
        vllm_config, reuse_with_prefix_caching=settings.reuse_with_prefix_caching
    )
    reaches = reaches_of(modules, vllm_config, namespace.num_layers)
    if engine_reason is not None:
        reaches = [Reach("nothing", engine_reason)] * namespace.num_layers
    treatments = Counter(_treatment(reach, i, plan) for i, reach in enumerate(reaches))
    for treatment, count in treatments.items():
        metrics.LAYERS.labels(treatment).set(count)
        if treatment.startswith(("bypassed", "partly")):
            logger.warning("attncache: %d layers %s", count, treatment)
    reusable = [
        found
        for found in modules
        if found.index in plan.reused_layers and reaches[found.index].skips != "nothing"
    ]
    if reusable:
        serving = _serving(modules, reusable, plan, store, settings, vllm_config, namespace)
        # Not the parameters' dtype: quantized ones are integers.
        corrections = _corrections(store, plan, reusable, vllm_config.model_config.dtype)
        for found in reusable:
            of_layer = {s: c for (s, layer), c in corrections.items() if layer == found.index}
            _hook(found, reaches[found.index], serving, plan, of_layer)
            if serving.admissions is not None:
                serving.admissions.watch(found, serving)
        # Last, so that it comes before whatever stands around the feature layer's module.
        feature = feature_module(modules, plan.feature_layer)
        ops.observe_input(feature, serving.observe)
        if _device(reusable).type == "cuda":
            # What pays is measured against this engine's own misses, which are dearer, too.
            logger.warning(
                "attncache: on GPUs vLLM was faster without this backend in all that was measured, "
                "hits included (docs/performance.md, On a GPU); compare before you serve with it"
            )
        if settings.only_where_it_pays:
            meter = _meter(reusable, plan, store, serving, vllm_config)
            measure = functools.partial(_measure, meter, serving, plan)
            compat.call_when_ready(feature.attention, measure)
    else:
        # Nothing will be looked up, but sequences are counted with the reason.
        reason = next((reaches[i].reason for i in plan.reused_layers), None) or "an exact plan"
        outcomes = metrics.Outcomes(settings.log_interval_s)
        compat.leave_bypass_counter(vllm_config, functools.partial(_count_bypass, reason, outcomes))
    stats = store.stats()
    if not reusable:
        store.close()
    logger.info(
        "attncache: %s, namespace %s, %d entries, %d of %d layers with reuse (%s), %s, "
        "%.1f MiB in the store, up to %d MiB resident",
        "active" if reusable else "every sequence is bypassed",
        namespace.digest()[:12],
        stats.entries,
        len(reusable),
        namespace.num_layers,
        ", ".join(str(found.index) for found in reusable) or "none",
        "; ".join(f"{source} <= {part.gate}" for source, part in plan.sources.items()) or "no plan",
        stats.bytes / 2**20,
        settings.resident_mib,
    )


def _meter(
    reusable: list[AttentionModule],
    plan: Plan,
    store: ServedStore,
    serving: Serving,
    vllm_config: VllmConfig,
) -> Meter:
    form = functools.partial(
        servable,
        device=_device(reusable),
        dtype=vllm_config.model_config.dtype,
        head_size=reusable[0].attention.head_size,
    )
    codec = str(store.build["codec"])
    return Meter(reusable, plan, serving.templates, codec, form, serving.pretending, vllm_config)


def _measure(meter: Meter, serving: Serving, plan: Plan, builders: compat.Builders) -> None:
    """Find out what reuse costs here, in a few seconds."""
    started = time.monotonic()
    config = meter.vllm_config
    look_up = None
    if set(plan.sources) - {"template"}:
        look_up = functools.partial(serving.look_up_in_vain, hidden_size=_hidden_size(config))
    try:
        bounds = [
            int(config.model_config.max_model_len),
            int(config.scheduler_config.max_num_batched_tokens),
            *(compat.most_tokens(found.attention, builders[found.name]) for found in meter.layers),
        ]
        lengths = costs.lengths_up_to(min(bound for bound in bounds if bound is not None))
        most_tokens = min(bound for bound in bounds[1:] if bound is not None)
        with torch.inference_mode():
            serving.costs = meter.measure(builders, lengths, most_tokens, look_up)
    except Exception:
        # What it costs is not known then; what it answers is as good as ever.
        logger.exception("attncache: costs could not be measured, every hit is taken")
        return
    taken = time.monotonic() - started
    logger.info("attncache: %s", costs.log_line(serving.costs, taken))


def _treatment(reach: Reach, layer: int, plan: Plan) -> str:
    """A layer's label in log and metrics."""
    if reach.skips == "nothing":
        return f"bypassed: {reach.reason}"
    if layer not in plan.reused_layers:
        return "exact"
    return "reused" if reach.skips == "module" else f"partly: {reach.reason}"


def _serving(
    modules: list[AttentionModule],
    reusable: list[AttentionModule],
    plan: Plan,
    store: ServedStore,
    settings: Settings,
    vllm_config: VllmConfig,
    namespace: Namespace,
) -> Serving:
    """What the worker holds."""
    layouts = {found.index: found.layout for found in reusable}
    _check_groups(plan, layouts)
    device, dtype = _device(reusable), vllm_config.model_config.dtype
    head_size = reusable[0].attention.head_size
    projector = Projector.from_bytes(store.projector_bytes)
    if projector.hidden_size != _hidden_size(vllm_config):
        raise StoreError(
            f"the store's projector takes inputs of width {projector.hidden_size}, the model has "
            f"{_hidden_size(vllm_config)}; build the store again for this model"
        )
    lookups = None
    if set(plan.sources) - {"template"}:
        groups = namespace.num_layers * namespace.num_kv_heads
        form = functools.partial(servable, device=device, dtype=dtype, head_size=head_size)
        held = settings.resident_bytes
        lookups = Lookups(store, projector, plan, held, layouts, groups, device, form)
    return Serving(
        lookups,
        _templates(store, plan, modules, reusable).served_as(
            functools.partial(servable_template, device=device, dtype=dtype, head_size=head_size)
        ),
        Canaries(plan, settings.canary_share, store.rearmed_at, _rearm_command(settings.store)),
        settings,
        projector.slots,
        feature_module(modules, plan.feature_layer).name,
        groups=namespace.num_layers * namespace.num_kv_heads,
        sources=tuple(plan.sources),
        admissions=admissions_of(store, plan, projector, reusable, settings.admit_per_minute),
    )


def _rearm_command(store: Path | str) -> str:
    if isinstance(store, str):
        return f"attncache store rearm --address {store}"
    return f"attncache rearm {store}"


def _hook(
    found: AttentionModule,
    reach: Reach,
    serving: Serving,
    plan: Plan,
    corrections: dict[Source, Correction],
) -> None:
    """Put reuse inside a layer, and around its module if that helps some hits."""
    from attncache_vllm.engine import ops

    found.attention.attncache_scores = ReuseScores(found, serving, corrections)
    groups: dict[Source, tuple[int, ...]] = {
        source: part.groups[found.index]
        for source, part in plan.sources.items()
        if part.groups[found.index]
    }
    if reach.skips == "module" and groups:
        ops.replace_forward(found, ReuseModule(found, serving, corrections, groups))


def _check_groups(plan: Plan, layouts: Mapping[int, MapLayout]) -> None:
    for source, part in plan.sources.items():
        for layer, layout in layouts.items():
            groups = part.groups[layer]
            if groups and groups[-1] >= layout.num_kv_heads:
                raise StoreError(
                    f"the plan's KV groups of layer {layer} must be below {layout.num_kv_heads}, "
                    f"got {groups!r} for {source!r}; calibrate again for this model"
                )


def _templates(
    store: ServedStore,
    plan: Plan,
    modules: list[AttentionModule],
    reusable: list[AttentionModule],
) -> Templates:
    if "template" not in plan.sources:
        return Templates({})
    data = store.artifact("templates")
    if data is None:
        raise StoreError("the plan uses templates, and the store has none; run attncache calibrate")
    groups = plan.sources["template"].groups
    try:
        # The store may have templates of more layers than reuse them here.
        every = Templates.from_bytes(data, {found.index: found.layout for found in modules})
        served = [found.index for found in reusable if groups[found.index]]
        return every.select({layer: groups[layer] for layer in served})
    except ValueError as error:
        raise StoreDamaged(f"the store's templates cannot be used: {error}") from None


def _corrections(
    store: ServedStore, plan: Plan, reusable: list[AttentionModule], dtype: torch.dtype
) -> Corrections:
    wanted = {
        (source, found.index)
        for source, part in plan.sources.items()
        for found in reusable
        if found.index in part.corrected
    }
    if not wanted:
        return {}
    data = store.artifact("corrections")
    if data is None:
        raise StoreError(
            "the plan uses corrections, and the store has none; run attncache calibrate"
        )
    attention, device = reusable[0].attention, _device(reusable)
    try:
        every = corrections_from_bytes(
            data, attention.num_heads, attention.num_kv_heads, attention.head_size
        )
        return {key: every[key].to(device, dtype) for key in wanted}
    except (ValueError, KeyError) as error:
        raise StoreDamaged(f"the store's corrections cannot be used: {error}") from None


def _count_bypass(reason: str, outcomes: metrics.Outcomes, source: compat.MetadataSource) -> None:
    prompts = prompts_of(source)
    outcomes.bypass(reason, len(prompts.whole) + prompts.ending)
    outcomes.log(logger)


def effective_plan(store: ServedStore, settings: Settings) -> Plan:
    """The store's plan, or the one that the settings name, with the gate that they set.

    Raises:
        SettingsError: the file cannot be read, or its plan is of another model.
        StoreError: the store's plan is of another model.
    """
    plan, num_layers = Plan.from_dict(store.plan), store.namespace.num_layers
    if plan.num_layers != num_layers:
        raise StoreError(
            f"a plan must be for the model's {num_layers} layers, got {plan.num_layers}; "
            "build the store again"
        )
    if settings.plan is not None:
        plan = _read_plan(settings.plan)
        if plan.num_layers != num_layers:
            raise SettingsError(
                f"the plan {str(settings.plan)!r} must be for the model's {num_layers} layers, "
                f"got {plan.num_layers}"
            )
    nearest = plan.sources.get("neighbour")
    if settings.max_distance is None or nearest is None:
        return plan
    gated = dataclasses.replace(nearest, gate=settings.max_distance)
    return dataclasses.replace(plan, sources={**plan.sources, "neighbour": gated})


def _read_plan(path: Path) -> Plan:
    try:
        return Plan.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"the plan must be a JSON file as `attncache inspect --plan` prints it, got "
            f"{str(path)!r}: {error}"
        ) from None


def _device(modules: list[AttentionModule]) -> torch.device:
    parameter: torch.Tensor = next(modules[0].module.parameters())
    return parameter.device


def _hidden_size(vllm_config: VllmConfig) -> int:
    return int(vllm_config.model_config.get_hidden_size())
