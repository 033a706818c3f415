# SPDX-License-Identifier: Apache-2.0
"""A shard as an actor of Ray, and the calls that reach it."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from attncache_vllm.errors import StoreError, StoreInUse
from attncache_vllm.store.checks import unpack
from attncache_vllm.store.folder import storing
from attncache_vllm.store.manifest import write_atomic
from attncache_vllm.store.ray import ring
from attncache_vllm.store.ray.calls import GROUP_OF, PROTOCOL, K
from attncache_vllm.store.ray.machines import folder_of
from attncache_vllm.store.ray.placement import Placement
from attncache_vllm.store.ray.shard import Limits, Shard

logger = logging.getLogger(__name__)

RAY_NAMESPACE = "attncache"
# To join by Ray Client; see `join`.
_ATTEMPTS = 3

_THREADS = {"read": 4, "write": 1, "control": 2}
# Of one caller: a shard that hangs must not make its callers grow.
_MAX_PENDING = 256
_EXPIRE_SECONDS = 60.0
_LOCKED_SECONDS = 120.0
_PLACEMENT = "placement"


class ShardActor:
    """The process around one ``Shard``.

    A call names the caller's protocol, which must be its own, and a method: see ``calls``.
    """

    def __init__(
        self,
        number: int,
        placement: dict[str, object],
        folder: str,
        limits: Limits,
        key_file: str | None,
    ) -> None:
        own = folder_of(Path(folder), number)
        with storing(f"read the key file {key_file}"):
            key = None if key_file is None else Path(key_file).read_bytes()
        self._number = number
        self._shard = _shard_of(own, limits, key)
        self._placement_file = own / _PLACEMENT
        self._placement = self._later(Placement.from_dict(placement))
        threading.Thread(target=self._keep_expiring, daemon=True).start()

    @ray.method(concurrency_group="read")
    def read(self, protocol: int, method: str, *args: Any) -> Any:
        # For callers of any protocol. In the group of lookups: a shard that answers it answers
        # those.
        return self._describe() if method == "describe" else self._call(protocol, method, args)

    @ray.method(concurrency_group="write")
    def write(self, protocol: int, method: str, *args: Any) -> Any:
        return self._call(protocol, method, args)

    @ray.method(concurrency_group="control")
    def control(self, protocol: int, method: str, *args: Any) -> Any:
        return self._call(protocol, method, args)

    def _call(self, protocol: int, method: str, args: tuple[Any, ...]) -> Any:
        if protocol != PROTOCOL:
            raise StoreError(
                f"this shard speaks protocol {PROTOCOL}, got a call of {protocol!r}; "
                "run servers and shards of one release"
            )
        if method not in GROUP_OF:
            raise StoreError(f"a call must be one of {', '.join(GROUP_OF)}, got {method!r}")
        return self._place(*args) if method == "place" else getattr(self._shard, method)(*args)

    def _describe(self) -> dict[str, Any]:
        return {
            "protocol": PROTOCOL,
            "ring": ring.VERSION,
            "number": self._number,
            "placement": self._placement.to_dict(),
            "rearmed_at": self._shard.rearmed_at(),
            "stats": self._shard.stats(),
            "node": ray.get_runtime_context().get_node_id(),
            "pid": os.getpid(),
        }

    def _place(self, placement: dict[str, object]) -> None:
        """Agree with ``placement`` from now on, restarts included, unless it is an older one."""
        self._placement = self._later(Placement.from_dict(placement))

    def _later(self, given: Placement) -> Placement:
        """The later one of ``given`` and what is on disk, which it then is on disk as well."""
        with storing(f"keep the placement in {self._placement_file}"):
            try:
                known = Placement.from_dict(unpack(self._placement_file.read_bytes()))
            except (FileNotFoundError, ValueError):
                known = None
            if known is not None and known.generation >= given.generation:
                return known
            write_atomic(self._placement_file, given.to_bytes())
            return given

    def _keep_expiring(self) -> None:
        while True:
            time.sleep(_EXPIRE_SECONDS)
            try:
                self._shard.expire()
            except Exception:
                logger.exception("shard %d could not forget what is too old", self._number)


def _shard_of(folder: Path, limits: Limits, key: bytes | None) -> Shard:
    """The shard in a folder, as soon as nobody else has it.

    Ray does not try a constructor again that has failed, and on shared storage the lock of a node
    that died outlives it for a while.
    """
    given_up = time.monotonic() + _LOCKED_SECONDS
    while True:
        try:
            return Shard(folder, limits, key)
        except StoreInUse as error:
            if time.monotonic() > given_up:
                raise
            logger.warning("waiting for a folder: %s", error)
            time.sleep(1)


def join(address: str) -> None:
    """Become a driver of the Ray cluster at ``address``; ``StoreError`` if it cannot be reached."""
    for left in reversed(range(_ATTEMPTS)):
        try:
            ray.init(
                address=address,
                namespace=RAY_NAMESPACE,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
            return
        except Exception as error:
            # Ray Client's proxy forks a process for each client while its own threads run, and now
            # and then that one never begins (Ray 2.60).
            if isinstance(error, ConnectionAbortedError) and left:
                continue
            # Of Ray Client's the first line is a title, and the last one says why.
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = " ... ".join(dict.fromkeys(lines[:1] + lines[-1:]))
            raise StoreError(
                f"the Ray cluster at {address!r} must be reachable, got {type(error).__name__}: "
                f"{reason}; bring it up with 'attncache store up', and set RAY_AUTH_MODE=token if "
                "it asks for a token"
            ) from error


def on(machine: str) -> dict[str, float]:
    """What an actor or a task must ask for to run on nodes of the machine with this address. A
    machine that was restarted has it again, where the id of its node is another one."""
    return {f"node:{machine}": 0.001}


def shard_name(number: int) -> str:
    return f"attncache-shard-{number}"


def start_shard(
    number: int,
    placement: Placement,
    folder: Path,
    limits: Limits,
    key_file: Path | None,
    num_cpus: float,
    machine: str | None,
) -> Any:
    """The handle of a shard's actor, which is started unless it is there.

    It is detached and restarted without end, on any node, or on nodes of the machine with this
    address only, as soon as there is one. A call is never repeated by Ray: the
    deadlines of lookups are shorter than its retries, and puts are known by their ids.
    """
    return (
        ray.remote(concurrency_groups=dict(_THREADS))(ShardActor)
        .options(
            name=shard_name(number),
            namespace=RAY_NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_task_retries=0,
            max_pending_calls=_MAX_PENDING,
            scheduling_strategy="SPREAD",
            num_cpus=num_cpus,
            resources={} if machine is None else on(machine),
        )
        .remote(
            number,
            placement.to_dict(),
            str(folder),
            limits,
            None if key_file is None else str(key_file),
        )
    )


class RayCalls:
    """Calls of shards by their numbers; see ``Calls``."""

    def __init__(self) -> None:
        self._handles: dict[int, Any] = {}

    def present(self) -> list[int]:
        """The numbers of the shards that Ray knows, ascending; asks the head."""
        prefix = shard_name(0).removesuffix("0")
        return sorted(
            int(name.removeprefix(prefix))
            for name in ray.util.list_named_actors()
            if name.startswith(prefix)
        )

    def resolve(self, shard: int) -> None:
        """Find the shard's actor anew; asks the head."""
        try:
            self._handles[shard] = ray.get_actor(shard_name(shard), namespace=RAY_NAMESPACE)
        except ValueError as error:
            raise StoreError(
                f"shard {shard} must run, got none; run 'attncache store up'"
            ) from error

    def submit(self, shard: int, method: str, *args: Any) -> Any:
        """Start a call; never waits."""
        if shard not in self._handles:
            raise StoreError(f"shard {shard} is not known here yet")
        group = getattr(self._handles[shard], GROUP_OF[method])
        return group.remote(PROTOCOL, method, *args)

    def gather(self, pending: Mapping[K, Any], deadline: float) -> dict[K, Any]:
        """What has been answered by the deadline: the answer, or the exception in its place."""
        timeout = max(0.0, deadline - time.monotonic())
        refs = list(pending.values())
        done = set(ray.wait(refs, num_returns=len(refs), timeout=timeout)[0]) if refs else set()
        answered = {key: ref for key, ref in pending.items() if ref in done}
        try:
            # All at once: each call into Ray takes as long as the search of a small shard.
            return dict(zip(answered, ray.get(list(answered.values())), strict=True))
        except Exception:
            return {key: _answer_of(ref) for key, ref in answered.items()}


def _answer_of(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except Exception as error:  # whatever Ray or the shard raised
        return error
