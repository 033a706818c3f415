# SPDX-License-Identifier: Apache-2.0
"""The seams in the model runner: prompts, and whose a request is."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from attncache_vllm.engine import compat
from attncache_vllm.engine.compat import tenants
from attncache_vllm.tenants import SHARED_TENANT, tenant_of

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
