# SPDX-License-Identifier: Apache-2.0
"""Seam 12: whose a request is."""

from __future__ import annotations

import functools
from typing import Any

from attncache_vllm.tenants import tenant_of

# --- Seam 12: the tenant of a request -----------------------------------------------------------
# Why:      a request's `cache_salt` says whose entries it may be served from. The scheduler knows
#           it and gives the worker a NewRequestData without it.
# How:      NewRequestData.from_request leaves the tenant, a hash of the salt, on what it returns:
#           a plain dataclass, which takes its attributes along when it is pickled. The model
#           runner's _update_states hands it on to the state that it keeps of the request. Hooked
#           only in a process that builds or is sent a configuration with our backend selected, and
#           in one that builds an attention layer of it; nobody else reads the attribute.
# Upstream: vllm/v1/core/sched/output.py, NewRequestData.from_request;
#           vllm/v1/worker/gpu_model_runner.py, GPUModelRunner._update_states (the CPU runner
#           inherits it). Model runner V2 keeps other states and is not hooked.
# When:     when NewRequestData carries the salt.

_TENANT = "attncache_tenant"


def hook_new_requests() -> None:
    """Where the scheduler is: have it say whose the requests are that it sends."""
    from vllm.v1.core.sched.output import NewRequestData

    original = NewRequestData.from_request.__func__
    if getattr(original, "_attncache", False):
        return

    @functools.wraps(original)
    def from_request(cls: type, request: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(cls, request, *args, **kwargs)
        setattr(made, _TENANT, tenant_of(request.cache_salt))
        return made

    from_request._attncache = True  # type: ignore[attr-defined]
    NewRequestData.from_request = classmethod(from_request)


def hook_request_states() -> None:
    """Where the model runner is: keep what the scheduler says for as long as the request is."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner._update_states
    if getattr(original, "_attncache", False):
        return

    @functools.wraps(original)
    def update(self: Any, scheduler_output: Any) -> Any:
        updated = original(self, scheduler_output)
        for made in scheduler_output.scheduled_new_reqs:
            setattr(self.requests[made.req_id], _TENANT, getattr(made, _TENANT, None))
        return updated

    update._attncache = True  # type: ignore[attr-defined]
    GPUModelRunner._update_states = update


def tenant_of_state(state: Any) -> str | None:
    """Whose a request is, by the model runner's state of it; None if nobody said."""
    tenant: str | None = getattr(state, _TENANT, None)
    return tenant
