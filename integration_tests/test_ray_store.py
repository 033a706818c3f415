# SPDX-License-Identifier: Apache-2.0
"""The store of shards on a real Ray cluster of two nodes, and every fault that it must outlive."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_samples import (
    ARTIFACTS,
    NAMESPACE,
    assert_same,
    build_store,
    make_features,
    make_record,
    make_sketch,
)

from attncache_vllm.errors import StoreError, StoreTimeout
from attncache_vllm.store import MAX_LENGTH, LocalStore
from attncache_vllm.store.ray.client import RayStore
from attncache_vllm.store.ray.ring import entry_id
from attncache_vllm.tenants import tenant_of
from benchmarks.ray_nodes import RayNodes, eventually, ray_nodes

ENTRIES = 40
IDS = [entry_id("", make_record(number).token_hash) for number in range(ENTRIES)]
TENANT = "ab" * 16
# What a step of a server would wait.
STEP_SECONDS = 0.3


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ray-embedded") / "store"
    build_store(path, ENTRIES)
    return path


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, embedded: Path) -> Iterator[RayNodes]:
    with ray_nodes(tmp_path_factory.mktemp("ray-nodes"), nodes=2) as nodes:
        nodes.store("up", "--config", nodes.settings())
        nodes.store("load", embedded, "--address", nodes.address)
        yield nodes


@pytest.fixture
def store(nodes: RayNodes, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayStore]:
    for name, value in nodes.environment.items():
        monkeypatch.setenv(name, value)
    store = RayStore.connect(f"ray:{nodes.address}", NAMESPACE)
    yield store
    store.close()


def nearest(store: RayStore, tenant: str = "", seconds: float = 10.0) -> list[int]:
    """The id that is nearest to each entry's feature, -1 for none."""
    found = store.lookup(
        make_features(ENTRIES),
        [(1, MAX_LENGTH)] * ENTRIES,
        tenants=[tenant] * ENTRIES,
        neighbours=1,
        deadline=time.monotonic() + seconds,
    )
    return [row[0].entry_id if row else -1 for row in found]


def complete(store: RayStore, seconds: float = 10.0) -> bool:
    """Whether every entry is found and its record is what was put."""
    with contextlib.suppress(StoreError):
        if nearest(store, seconds=seconds) != IDS:
            return False
        records = store.load(IDS, deadline=time.monotonic() + seconds)
        if any(record is None for record in records):
            return False
        for number, record in enumerate(records):
            assert record is not None
            assert_same(record, make_record(number))
        return True
    return False


def test_answers_are_those_of_the_embedded_store(
    nodes: RayNodes, store: RayStore, embedded: Path
) -> None:
    assert len({shard["node"] for shard in nodes.status()["shards"]}) == 2, "spread over nodes"
    assert complete(store)
    assert {name: store.artifact(name) for name in ARTIFACTS} == ARTIFACTS
    queries = make_features(ENTRIES)[::-1] * 1.01
    lengths = [(1 + i, 20 + 8 * i) for i in range(ENTRIES)]
    sketches = [make_sketch(i) for i in range(ENTRIES)]
    deadline = time.monotonic() + 10
    tenants = [""] * ENTRIES
    with LocalStore.open(embedded) as local:
        near = local.lookup(queries, lengths, tenants=tenants, neighbours=8, deadline=deadline)
        overlapping = local.overlaps(
            sketches, tenants=tenants, neighbours=ENTRIES, deadline=deadline
        )
    found = store.lookup(queries, lengths, tenants=tenants, neighbours=8, deadline=deadline)
    for answer, expected in zip(found, near, strict=True):
        assert [n.entry_id for n in answer] == [IDS[n.entry_id] for n in expected]
        assert [n.distance for n in answer] == pytest.approx([n.distance for n in expected])
    shared = store.overlaps(sketches, tenants=tenants, neighbours=ENTRIES, deadline=deadline)
    for some, expected in zip(shared, overlapping, strict=True):
        assert {(o.entry_id, o.common) for o in some} == {
            (IDS[o.entry_id], o.common) for o in expected
        }


def test_an_entry_of_a_tenant_is_found_by_that_tenant_only(store: RayStore) -> None:
    assert store.admit(make_record(90), make_features(91)[90], TENANT)
    own = entry_id(TENANT, make_record(90).token_hash)
    eventually(lambda: own in nearest(store, TENANT))
    assert own not in nearest(store)
    assert set(nearest(store, "cd" * 16)) == {-1}


def test_ray_client_reaches_the_store_from_outside_of_the_cluster(
    nodes: RayNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in nodes.environment.items():
        monkeypatch.setenv(name, value)
    address = f"ray://127.0.0.1:{nodes.client_port}"
    store = RayStore.connect(address, NAMESPACE)
    try:
        assert complete(store, seconds=30.0)
        tenant = tenant_of("of a client")
        assert store.admit(make_record(91), make_features(92)[91], tenant)
        own = entry_id(tenant, make_record(91).token_hash)
        eventually(lambda: own in nearest(store, tenant))
        # Not by Ray Client as well: its head now and then hangs when it forks for a second client.
        nodes.store("delete", "--tenant-salt", "of a client", "--address", nodes.address)
        assert set(nearest(store, tenant)) == {-1}
        assert store.health().out == 0
    finally:
        store.close()


def test_a_command_without_the_token_is_refused(nodes: RayNodes, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("another token, as long as the right one is\n")
    ran = subprocess.run(
        [sys.executable, "-m", "attncache_vllm", "store", "status", "--address", nodes.address],
        env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(wrong)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 2
    assert "must be reachable" in ran.stderr


def test_with_one_replica_the_others_answer_and_the_killed_one_comes_back_warm(
    nodes: RayNodes, store: RayStore
) -> None:
    assert complete(store)
    os.kill(nodes.pids()[0], signal.SIGKILL)
    found = nearest(store)
    rest = [i in IDS for i in found]
    assert sum(rest) > 0
    eventually(lambda: complete(store))
    assert nodes.status()["shards"][0]["entries"] > 0


def test_a_hung_shard_costs_some_deadlines_then_nothing_and_recovers(
    nodes: RayNodes, store: RayStore
) -> None:
    assert complete(store)
    pid = nodes.pids()[1]
    os.kill(pid, signal.SIGSTOP)
    try:
        eventually(lambda: 1 in store.out() or not nearest_in_step(store))
        eventually(lambda: 1 in store.out())
        slow = 0
        for _ in range(20):
            started = time.monotonic()
            assert any(i in IDS for i in nearest(store, seconds=STEP_SECONDS))
            slow += time.monotonic() - started > STEP_SECONDS / 2
        assert slow <= 2
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually(lambda: complete(store) and store.out() == {})


def nearest_in_step(store: RayStore) -> bool:
    with contextlib.suppress(StoreTimeout):
        nearest(store, seconds=STEP_SECONDS)
        return True
    return False


def test_a_gateway_that_is_killed_is_replaced(store: RayStore) -> None:
    store._link.connection._process.kill()
    with pytest.raises(StoreError):
        while True:
            nearest(store, seconds=STEP_SECONDS)
    started = time.monotonic()
    with pytest.raises(StoreError):
        nearest(store)
    assert time.monotonic() - started < 0.1, "nobody waits for a gateway that is not there"
    eventually(lambda: complete(store))


def test_a_gateway_that_hangs_is_replaced(store: RayStore) -> None:
    first = store._link.connection._process.pid
    os.kill(first, signal.SIGSTOP)
    eventually(lambda: complete(store))
    assert store._link.connection._process.pid != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_resharding_loses_nothing_while_servers_look_up(nodes: RayNodes, store: RayStore) -> None:
    assert complete(store)
    misses: list[float] = []
    over = threading.Event()

    def keep_asking() -> None:
        while not over.wait(0.05):
            if not complete(store):
                misses.append(time.monotonic())

    server = threading.Thread(target=keep_asking)
    server.start()
    try:
        for shards, replicas in ((3, 1), (3, 2), (2, 1)):
            nodes.store("reshard", "--config", nodes.settings(shards=shards, replicas=replicas))
            status = nodes.status()
            assert len(status["shards"]) == shards
            # Those of the tenant as well.
            copies = sum(shard["entries"] for shard in status["shards"])
            assert copies == replicas * (ENTRIES + 1)
    finally:
        over.set()
        server.join()
    assert misses == []
    assert entry_id(TENANT, make_record(90).token_hash) in nearest(store, TENANT)


def test_with_two_replicas_the_loss_of_any_shard_loses_nothing(
    nodes: RayNodes, store: RayStore
) -> None:
    nodes.store("reshard", "--config", nodes.settings(replicas=2))
    eventually(lambda: complete(store))
    for shard in (0, 1):
        os.kill(nodes.pids()[shard], signal.SIGKILL)
        for _ in range(20):
            assert complete(store)
        eventually(lambda: complete(store) and not store.out())
    nodes.store("reshard", "--config", nodes.settings(replicas=1))


def test_a_drained_node_holds_nothing(nodes: RayNodes, store: RayStore) -> None:
    nodes.store("drain", "--shard", 1, "--address", nodes.address)
    assert complete(store)
    assert nodes.status()["shards"][1]["entries"] == 0
    nodes.store("drain", "--back", "--address", nodes.address)
    assert nodes.status()["shards"][1]["entries"] > 0
    assert complete(store)


def test_a_saved_store_is_the_one_that_was_loaded(nodes: RayNodes, tmp_path: Path) -> None:
    nodes.store("save", tmp_path / "saved", "--address", nodes.address)
    with LocalStore.open(tmp_path / "saved") as saved:
        assert saved.verify().ok
        assert {r.token_hash for _, r in saved.records()} == {
            make_record(number).token_hash for number in range(ENTRIES)
        }


def test_a_shard_waits_for_its_machine_and_comes_back_to_it_warm(
    nodes: RayNodes, store: RayStore
) -> None:
    assert complete(store)
    nodes.lose()
    eventually(lambda: store.health().out == 1)
    time.sleep(10)
    assert store.health().out == 1, "it does not begin anew on the other machine"
    assert any(i in IDS for i in nearest(store))
    nodes.start()
    eventually(lambda: complete(store) and store.health().out == 0, 120.0)


def test_the_loss_of_the_head_is_outlived_and_shards_come_back_warm(
    nodes: RayNodes, store: RayStore
) -> None:
    assert complete(store)
    nodes.stop()
    with pytest.raises(StoreError):
        while True:
            nearest(store, seconds=STEP_SECONDS)
            time.sleep(0.2)
    nodes.start()
    nodes.start()
    nodes.store("up", "--config", nodes.settings())
    eventually(lambda: complete(store), 120.0)
