# SPDX-License-Identifier: Apache-2.0
"""Bringing shards up and down, and looking after them: what ``attncache store`` does.

These run as a driver of Ray, in a process that may end with the cluster.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray

from attncache_vllm.errors import StoreError
from attncache_vllm.store.ray import moving
from attncache_vllm.store.ray.actor import (
    RAY_NAMESPACE,
    RayCalls,
    join,
    on,
    shard_name,
    start_shard,
)
from attncache_vllm.store.ray.fanout import Fanout
from attncache_vllm.store.ray.machines import Machine, homes, kept_in
from attncache_vllm.store.ray.moving import Moved
from attncache_vllm.store.ray.placement import Placement
from attncache_vllm.store.ray.settings import ClusterSettings

# A shard reads the heads of all its entries when it starts.
_START_SECONDS = 300.0
_SECONDS = 30.0
# A command has time where a server has none, as while shards are busy with what it asked before.
_DESCRIBE_SECONDS = 10.0


@dataclass(frozen=True)
class Cluster:
    """The shards of a cluster, for maintenance."""

    calls: RayCalls
    fanout: Fanout


@contextmanager
def joined(address: str) -> Iterator[None]:
    """Be a driver of the Ray cluster at ``address`` for the block.

    Raises:
        StoreError: it cannot be reached.
    """
    join(address)
    try:
        yield
    finally:
        ray.shutdown()


def start_head(settings: ClusterSettings) -> None:
    """Start a head on this machine, unless there is one at its port.

    Ray 2.60 listens on all interfaces whatever address a node is given: the token keeps others out.

    Raises:
        StoreError: Ray cannot start it.
    """
    environment = dict(os.environ, RAY_AUTH_MODE=settings.authentication)
    if settings.authentication == "token":
        _ray(["get-auth-token", "--generate"], environment)
    if _ray(["health-check", "--address", settings.cluster], environment, check=False) == 0:
        return
    _ray(
        [
            *("start", "--head", "--port", str(settings.port)),
            *("--dashboard-host", "127.0.0.1", "--disable-usage-stats"),
        ],
        environment,
    )


def up(settings: ClusterSettings) -> Cluster:
    """Start the shards that are not there, and let all have the same placement and editions.

    The caller has joined. Shards that were there before keep their entries, their bounds and the
    placement.

    Raises:
        StoreError: a shard does not start, or the store has another number of shards or replicas.
    """
    calls = RayCalls()
    placement = Placement(1, settings.shards, settings.replicas)
    if calls.present():
        placement = _fanout(calls).placement
        _require_same(placement, settings)
    _start(placement, settings)
    fanout = _fanout(calls)
    # Shards that were down may know a later one, from their folders.
    _require_same(fanout.placement, settings)
    shards = range(settings.shards)
    fanout.every("place", fanout.placement.to_dict(), deadline=_soon())
    moving.share_editions(fanout, shards)
    return Cluster(calls, fanout)


def attach() -> Cluster:
    """The shards that run; ``StoreError`` if none does. The caller has joined."""
    calls = RayCalls()
    return Cluster(calls, _fanout(calls))


def status(cluster: Cluster) -> dict[str, Any]:
    """Placement, shards and editions, as plain data; a shard that does not answer has a reason."""
    fanout = cluster.fanout
    numbers = sorted({*range(fanout.placement.shards), *cluster.calls.present()})
    described = fanout.meet(numbers)
    listed = fanout.control("editions", deadline=_soon(), shards=sorted(described))
    editions: dict[str, dict[str, Any]] = {}
    for found in listed.values():
        for digest, about in found.items():
            known = editions.setdefault(
                digest, {"model": about["namespace"]["model"], "current": False, "copies": 0}
            )
            known["current"] |= about["current"]
            known["copies"] += about["entries"]
    return {
        "placement": fanout.placement.to_dict(),
        "shards": [
            {
                "shard": number,
                "answers": number in described,
                **(
                    {"node": described[number].node, "pid": described[number].pid}
                    | described[number].stats
                    if number in described
                    else {"reason": fanout.why(number)}
                ),
            }
            for number in numbers
        ],
        "editions": editions,
    }


def reshard(
    cluster: Cluster, settings: ClusterSettings, report: Callable[[str], None], **options: float
) -> Moved:
    """Have as many shards and replicas as the settings say, without a loss; see ``moving.move``.

    What shards had been drained are used again. With nothing to change, copies that were lost with
    a shard are made again.
    """
    fanout, before = cluster.fanout, cluster.fanout.placement
    target = Placement(before.generation + 1, settings.shards, settings.replicas)
    new = range(before.shards, target.shards)
    _start(before, settings, new)
    fanout.meet(range(max(before.shards, target.shards)))
    moved = moving.move(fanout, target, report=report, **options)
    for shard in range(target.shards, before.shards):
        if moved.stranded == 0:
            _kill(shard)
    return moved


def drain(
    cluster: Cluster, shards: Sequence[int], report: Callable[[str], None], **options: float
) -> Moved:
    """Move all entries off ``shards`` and give them no more; others that were drained before come
    back. With none, all are used.

    Raises:
        StoreError: there is no such shard, none would remain, or see ``moving.move``.
    """
    before = cluster.fanout.placement
    try:
        target = replace(
            before, generation=before.generation + 1, drained=tuple(sorted(set(shards)))
        )
    except ValueError as error:
        raise StoreError(str(error)) from None
    cluster.fanout.meet(range(before.shards))
    return moving.move(cluster.fanout, target, report=report, **options)


def shards_on(cluster: Cluster, node: str) -> list[int]:
    """The shards on the node whose id begins with ``node``; ``StoreError`` if there is none."""
    described = cluster.fanout.meet(range(cluster.fanout.placement.shards))
    found = [shard for shard, about in described.items() if about.node.startswith(node)]
    if not found:
        nodes = sorted({about.node[:12] for about in described.values()})
        raise StoreError(f"a node of shards must be one of {nodes!r}, got {node!r}")
    return found


def delete(cluster: Cluster, tenant: str | None, edition: str | None) -> int:
    """Forget all entries of a tenant, an edition, or both; how many copies that were."""
    if edition is not None:
        edition = _whole_digest(cluster.fanout, edition)
    return sum(cluster.fanout.every("delete", tenant, edition, deadline=_soon()).values())


def rearm(cluster: Cluster) -> None:
    """Tell servers to try tripped layers again."""
    cluster.fanout.every("rearm", deadline=_soon())


def down() -> list[int]:
    """End all shards; what they keep stays in their folders. Returns their numbers."""
    present = RayCalls().present()
    for shard in present:
        _kill(shard)
    return present


def stop_ray() -> None:
    """Stop every process of Ray on this machine."""
    _ray(["stop"], dict(os.environ))


def _fanout(calls: RayCalls) -> Fanout:
    return Fanout(calls, describe_seconds=_DESCRIBE_SECONDS)


def _start(
    placement: Placement, settings: ClusterSettings, shards: Sequence[int] | None = None
) -> None:
    """Start shards, all unless named, and wait until each has read its folder."""
    calls = RayCalls()
    numbers = range(settings.shards) if shards is None else shards
    absent = sorted(set(numbers) - set(calls.present()))
    pinned: dict[int, str] = {}
    if absent and settings.placement == "pinned":
        pinned = homes(range(settings.shards), _machines(settings), settings.num_cpus)
    for number in absent:
        start_shard(
            number,
            placement,
            settings.folder,
            settings.limits,
            settings.key_file,
            settings.num_cpus,
            pinned.get(number),
        )
    deadline = time.monotonic() + _START_SECONDS
    for number in numbers:
        calls.resolve(number)
    pending = {number: calls.submit(number, "describe") for number in numbers}
    answers = calls.gather(pending, deadline)
    for number in numbers:
        answer = answers.get(number, f"nothing for {_START_SECONDS:.0f} s")
        if not isinstance(answer, dict):
            reason = str(answer).strip().rpartition("\n")[2]
            raise StoreError(
                f"shard {number} must start, got {reason!r}; see that nodes have "
                f"{settings.num_cpus:g} free cores for each shard, and can write to "
                f"{settings.folder}"
            )


def _machines(settings: ClusterSettings) -> list[Machine]:
    """The machines that a shard fits on; ``StoreError`` if there is none, or one does not say which
    shards have a folder there."""
    cpus: Counter[str] = Counter()
    for node in ray.nodes():
        if node["Alive"]:
            cpus[node["NodeManagerAddress"]] += node["Resources"].get("CPU", 0.0)
    fitting = {address: each for address, each in cpus.items() if each >= settings.num_cpus}
    if not fitting:
        raise StoreError(
            f"shards need a node with {settings.num_cpus:g} cores, got {dict(cpus)!r}; lower "
            "num_cpus, or start nodes with more"
        )
    look = ray.remote(num_cpus=0, max_retries=0)(kept_in)
    pending = {
        address: look.options(resources=on(address)).remote(settings.folder) for address in fitting
    }
    found = RayCalls().gather(pending, time.monotonic() + _START_SECONDS)
    for address in fitting:
        answer = found.get(address, f"nothing for {_START_SECONDS:.0f} s")
        if not isinstance(answer, dict):
            raise StoreError(
                f"the machine {address} must say which shards it has, got {str(answer)!r:.300}; "
                "see that this release is installed there, or 'ray stop' it"
            )
    return [Machine(address, each, found[address]) for address, each in fitting.items()]


def _require_same(placement: Placement, settings: ClusterSettings) -> None:
    if (placement.shards, placement.replicas) != (settings.shards, settings.replicas):
        raise StoreError(
            f"the store has {placement.shards} shards and {placement.replicas} replicas, got "
            f"settings of {settings.shards} and {settings.replicas}; correct them, or run "
            "'attncache store reshard' with them"
        )


def _whole_digest(fanout: Fanout, prefix: str) -> str:
    listed = fanout.every("editions", deadline=_soon())
    known: set[str] = {digest for editions in listed.values() for digest in editions}
    found = sorted(digest for digest in known if digest.startswith(prefix))
    if len(found) != 1:
        raise StoreError(
            f"{prefix!r} must be the beginning of one edition's digest, got {len(found)}; "
            "see 'attncache store status'"
        )
    return found[0]


def _kill(shard: int) -> None:
    try:
        ray.kill(ray.get_actor(shard_name(shard), namespace=RAY_NAMESPACE), no_restart=True)
    except ValueError:
        return  # it does not run


def _ray(arguments: list[str], environment: dict[str, str], check: bool = True) -> int:
    """Run the command ``ray`` of this environment; its output is shown if it fails and may not."""
    command = shutil.which("ray", path=sysconfig.get_path("scripts")) or "ray"
    ran = subprocess.run(
        [command, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if check and ran.returncode != 0:
        print(ran.stdout, ran.stderr, file=sys.stderr)
        raise StoreError(f"'ray {arguments[0]}' must succeed, got exit code {ran.returncode!r}")
    return ran.returncode


def _soon() -> float:
    return time.monotonic() + _SECONDS
