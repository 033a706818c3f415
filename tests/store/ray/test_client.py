# SPDX-License-Identifier: Apache-2.0
"""A server's side of the store: its gateway is a thread of this process, its shards are as well."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_samples import FakeCalls, edition_of, make_entries
from store_samples import (
    ANY_LENGTH,
    ARTIFACTS,
    NAMESPACE,
    assert_same,
    make_features,
    make_record,
    make_sketch,
)

from attncache_vllm.errors import NamespaceMismatch, StoreError, StoreTimeout
from attncache_vllm.store.protocol import GrowingStore
from attncache_vllm.store.ray import client, connection, link
from attncache_vllm.store.ray.channel import Channel
from attncache_vllm.store.ray.client import RayStore
from attncache_vllm.store.ray.fanout import Fanout
from attncache_vllm.store.ray.gateway import Gateway
from attncache_vllm.store.ray.placement import Placement
from attncache_vllm.store.ray.ring import entry_id
from attncache_vllm.store.ray.transfer import load

ENTRIES = 12
TENANT = "ab" * 16


class GatewayThread:
    """Stands for the process of a gateway."""

    running: list[GatewayThread]
    calls: FakeCalls

    def __init__(self, command: list[str], pass_fds: list[int], **options: Any) -> None:
        self.channel = Channel(socket.socket(fileno=os.dup(pass_fds[0])), 1.0)
        gateway = Gateway(self.channel, lambda: Fanout(self.calls))
        threading.Thread(target=gateway.serve, daemon=True).start()
        self.running.append(self)

    def kill(self) -> None:
        self.channel.close()

    def wait(self) -> int:
        return -9


@pytest.fixture
def calls(tmp_path: Path, store_path: Path) -> FakeCalls:
    calls = FakeCalls(tmp_path / "shards", Placement(1, 2, 1))
    load(Fanout(calls), store_path)
    return calls


@pytest.fixture
def gateways(monkeypatch: pytest.MonkeyPatch, calls: FakeCalls) -> list[GatewayThread]:
    monkeypatch.setattr(GatewayThread, "running", [], raising=False)
    monkeypatch.setattr(GatewayThread, "calls", calls, raising=False)
    monkeypatch.setattr(connection.subprocess, "Popen", GatewayThread)
    monkeypatch.setattr(link, "_LOOK_SECONDS", 0.05)
    return GatewayThread.running


@pytest.fixture
def store(gateways: list[GatewayThread]) -> Iterator[RayStore]:
    store = RayStore.connect("ray:auto", NAMESPACE)
    yield store
    store.close()


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = soon(seconds)
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


IDS = [entry_id("", make_record(number).token_hash) for number in range(ENTRIES)]


def nearest(store: RayStore, tenant: str = "", seconds: float = 5.0) -> list[int]:
    """The id that is nearest to each entry's feature, -1 for none."""
    found = store.lookup(
        make_features(ENTRIES),
        [ANY_LENGTH] * ENTRIES,
        tenants=[tenant] * ENTRIES,
        neighbours=1,
        deadline=soon(seconds),
    )
    return [row[0].entry_id if row else -1 for row in found]


def test_what_was_published_is_there(store: RayStore, store_path: Path) -> None:
    edition = edition_of(store_path)
    assert (store.namespace, store.build, store.plan) == (NAMESPACE, edition.build, edition.plan)
    assert store.projector_bytes == b"projector"
    assert {name: store.artifact(name) for name in ARTIFACTS} == ARTIFACTS
    assert store.artifact("more") is None


def test_entries_are_found_and_loaded(store: RayStore) -> None:
    assert nearest(store) == IDS
    found = store.overlaps([make_sketch(3)], tenants=[""], neighbours=ENTRIES, deadline=soon())
    assert max(o.common for o in found[0]) == len(make_sketch(3))
    assert IDS[3] in {o.entry_id for o in found[0] if o.common == len(make_sketch(3))}
    records = store.load([*IDS, 1], deadline=soon())
    for number, record in enumerate(records[:-1]):
        assert record is not None
        assert_same(record, make_record(number))
        assert not record.maps[1].flags.writeable
    assert records[-1] is None
    token_ids = store.token_ids([IDS[5], 1], deadline=soon())
    np.testing.assert_array_equal(token_ids[0], make_record(5).token_ids)
    assert token_ids[1] is None


def test_another_tenant_finds_nothing(store: RayStore) -> None:
    assert nearest(store, TENANT) == [-1] * ENTRIES
    assert store.overlaps([make_sketch(3)], tenants=[TENANT], neighbours=4, deadline=soon()) == [[]]


def test_more_records_than_fit_one_answer_are_loaded(store: RayStore) -> None:
    assert all(record is not None for record in store.load(IDS * 6, deadline=soon()))


def test_an_admitted_entry_is_found_by_its_tenant_only(store: RayStore) -> None:
    assert isinstance(store, GrowingStore)
    assert store.wants(make_record(50).token_hash, TENANT)
    assert store.admit(make_record(50), make_features(51)[50], TENANT)
    assert not store.wants(make_record(50).token_hash, TENANT)
    assert store.wants(make_record(50).token_hash, ""), "another's"
    assert not store.admit(make_record(50), make_features(51)[50], TENANT), "each once"
    own = entry_id(TENANT, make_record(50).token_hash)
    eventually(lambda: own in nearest(store, TENANT))
    [record] = store.load([own], deadline=soon())
    assert record is not None
    assert_same(record, make_record(50))
    assert own not in nearest(store)
    assert store.health().faults["dropped"] == 0


def test_an_entry_that_no_shard_takes_is_counted(store: RayStore) -> None:
    assert store.put(make_record(51), feature=make_features(1)[0, :3]) == entry_id(
        "", make_record(51).token_hash
    )
    eventually(lambda: store.health().faults["dropped"] == 1)
    assert store.health().faults["refused"] == 1
    with pytest.raises(StoreError, match="must have its feature"):
        store.put(make_record(51))


def test_stats_tell_what_the_shards_hold(store: RayStore) -> None:
    nearest(store)
    eventually(lambda: store.stats().entries == ENTRIES)
    stats = store.stats()
    assert (stats.lookups, stats.late, stats.damaged) == (1, 0, 0)
    assert stats.bytes == sum(s.stats()["bytes"] for s in GatewayThread.calls.shards.values())


def test_a_damaged_record_is_a_miss_and_counted(store: RayStore, calls: FakeCalls) -> None:
    record = make_entries(1)[0][2].copy()
    record[-1] ^= 1
    for shard in calls.shards.values():
        shard.load = lambda edition, ids: [record for _ in ids]
    assert store.load([IDS[0]], deadline=soon()) == [None]
    assert store.stats().damaged == store.health().faults["damaged"] == 1


def test_hung_shards_are_a_timeout_in_time(store: RayStore, calls: FakeCalls) -> None:
    calls.hung = {0, 1}
    started = time.monotonic()
    with pytest.raises(StoreTimeout):
        nearest(store, seconds=0.2)
    assert time.monotonic() - started < 0.4
    assert store.stats().late == 1


def test_one_hung_shard_leaves_the_other_in_time(store: RayStore, calls: FakeCalls) -> None:
    calls.hung = {0}
    found = nearest(store, seconds=0.3)
    assert sum(entry in IDS for entry in found) > 0


def test_what_is_wrong_with_shards_is_told_and_outlives_a_gateway(
    store: RayStore, calls: FakeCalls, gateways: list[GatewayThread]
) -> None:
    assert store.health().out == 0
    calls.hung = {0}
    for _ in range(3):
        with contextlib.suppress(StoreTimeout):  # a busy machine may bring the answer too late
            nearest(store, seconds=0.1)
    eventually(lambda: store.health().out == 1)
    late = store.health().faults["late"]
    assert late >= 3
    calls.hung = set()
    gateways[0].kill()
    eventually(lambda: len(gateways) == 2 and not store._link.connection.over)
    assert store.health().faults["late"] >= late
    assert store.health().faults["gateway"] == 1
    eventually(lambda: store.health().out == 0)


def test_a_deadline_that_has_passed_is_not_sent(store: RayStore, calls: FakeCalls) -> None:
    calls.asked.clear()
    with pytest.raises(StoreTimeout):
        nearest(store, seconds=-0.1)
    assert "lookup" not in [method for _, method in calls.asked]


def test_a_gateway_that_ends_is_replaced(store: RayStore, gateways: list[GatewayThread]) -> None:
    gateways[0].kill()
    with pytest.raises(StoreError):
        while True:
            nearest(store)
    eventually(lambda: len(gateways) == 2 and not store._link.connection.over)
    eventually(lambda: _works(store))
    assert nearest(store) == IDS


def test_a_gateway_that_hangs_is_asked_no_more_and_replaced(
    store: RayStore, gateways: list[GatewayThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateways[0].channel, "send", lambda *frame: None)
    for _ in range(3):
        with pytest.raises(StoreTimeout):
            nearest(store, seconds=0.05)
    started = time.monotonic()
    with pytest.raises(StoreError, match="must answer, got nothing"):
        nearest(store)
    assert time.monotonic() - started < 1.0
    monkeypatch.setattr(link, "_SILENT_SECONDS", 1.0)
    eventually(lambda: len(gateways) == 2)
    monkeypatch.setattr(link, "_SILENT_SECONDS", 10.0)
    eventually(lambda: _works(store))


def _works(store: RayStore) -> bool:
    try:
        return nearest(store) == IDS
    except StoreError:
        return False


def test_a_closed_store_raises_store_errors(store: RayStore) -> None:
    store.close()
    with pytest.raises(StoreError):
        nearest(store)


def test_another_model_is_refused_with_the_differences(gateways: list[GatewayThread]) -> None:
    other = dataclasses.replace(NAMESPACE, dtype="float32")
    with pytest.raises(NamespaceMismatch, match=r"dtype: store has 'bfloat16'.*'float32'"):
        RayStore.connect("ray:auto", other)


def test_shards_without_an_edition_are_refused(
    gateways: list[GatewayThread], calls: FakeCalls, store_path: Path
) -> None:
    for shard in calls.shards.values():
        shard.delete(edition=edition_of(store_path).digest)
    with pytest.raises(StoreError, match=r"must hold an edition, got none; .*store load"):
        RayStore.connect("ray:auto", NAMESPACE)


@pytest.mark.parametrize(
    ("address", "cluster"),
    [
        ("ray:auto", "auto"),
        ("ray:10.0.0.1:6379", "10.0.0.1:6379"),
        ("ray://head:10001", "ray://head:10001"),
    ],
)
def test_addresses_are_those_of_ray(address: str, cluster: str) -> None:
    assert client._cluster_of(address) == cluster


@pytest.mark.parametrize("address", ["ray:", "ray:host", "ray://", "ray:host:port", "maps", "ray"])
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(StoreError, match="must be ray:auto"):
        RayStore.connect(address, None)


def test_no_deadline_is_one_far_away(store: RayStore) -> None:
    assert store.token_ids([1], deadline=math.inf) == [None]


def test_a_request_that_the_gateway_refuses_does_not_end_it(store: RayStore) -> None:
    with pytest.raises(StoreError, match="neighbours must be an integer"):
        store.overlaps([make_sketch(1)], tenants=[""], neighbours=1 << 20, deadline=soon())
    assert nearest(store) == IDS
