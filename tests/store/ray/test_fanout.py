# SPDX-License-Identifier: Apache-2.0
"""Answers of shards put together: those of the embedded store, whatever shard is out."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_samples import FakeCalls, edition_of, make_entries
from store_samples import ANY_LENGTH, NAMESPACE, make_features, make_record, make_sketch

from attncache_vllm.errors import StoreError, StoreTimeout
from attncache_vllm.store import LocalStore
from attncache_vllm.store.ray.breaker import Breaker
from attncache_vllm.store.ray.calls import FULL
from attncache_vllm.store.ray.fanout import Fanout
from attncache_vllm.store.ray.moving import move
from attncache_vllm.store.ray.placement import Placement
from attncache_vllm.store.ray.ring import entry_id
from attncache_vllm.store.ray.shard import Limits
from attncache_vllm.store.ray.transfer import load, save
from attncache_vllm.store.records import encode_record

ENTRIES = 12
LENGTHS = np.array([ANY_LENGTH], dtype=np.int64)


class Clock:
    """Real time, and what a test adds to it."""

    ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


class Store:
    """Filled shards, their fan-out, and what was put into them."""

    def __init__(self, calls: FakeCalls, fanout: Fanout, edition: str, clock: Clock) -> None:
        self.calls = calls
        self.fanout = fanout
        self.edition = edition
        self.clock = clock
        self.ids = [entry_id for entry_id, *_ in make_entries(ENTRIES)]

    def found(self, seconds: float = 5.0) -> set[int]:
        """The ids of all entries that a lookup finds."""
        ids, _, _ = self.fanout.lookup(
            self.edition, [""], make_features(1), LENGTHS, ENTRIES, self.clock() + seconds
        )
        return set(ids[ids >= 0].tolist())

    def loaded(self) -> set[int]:
        records = self.fanout.load(self.edition, self.ids, self.clock() + 5)
        return {i for i, record in zip(self.ids, records, strict=True) if record is not None}


def make_store(tmp_path: Path, store_path: Path, shards: int, replicas: int) -> Store:
    clock = Clock()
    calls = FakeCalls(tmp_path / "shards", Placement(1, shards, replicas), clock)
    fanout = Fanout(calls, new_breaker=lambda: Breaker(clock=clock), clock=clock)
    assert load(fanout, store_path) == {"kept": ENTRIES, "known": 0, "refused": 0}
    return Store(calls, fanout, edition_of(store_path).digest, clock)


@pytest.fixture(params=[1, 2], ids=["one replica", "two replicas"])
def store(request: pytest.FixtureRequest, tmp_path: Path, store_path: Path) -> Store:
    return make_store(tmp_path, store_path, 3, request.param)


@pytest.fixture
def single(tmp_path: Path, store_path: Path) -> Store:
    return make_store(tmp_path, store_path, 3, 1)


@pytest.fixture
def double(tmp_path: Path, store_path: Path) -> Store:
    return make_store(tmp_path, store_path, 3, 2)


def test_lookups_answer_as_the_embedded_store_does(store: Store, store_path: Path) -> None:
    queries = make_features(ENTRIES) + np.float32(0.01)
    bounds = [(1, 40 + 20 * i) for i in range(ENTRIES)]
    with LocalStore.open(store_path) as embedded:
        expected = embedded.lookup(
            queries, bounds, tenants=[""] * ENTRIES, neighbours=5, deadline=math.inf
        )
    ids, distances, lengths = store.fanout.lookup(
        store.edition, [""] * ENTRIES, queries, np.array(bounds), 5, store.clock() + 5
    )
    for row, answer in enumerate(expected):
        assert ids[row, : len(answer)].tolist() == [store.ids[n.entry_id] for n in answer]
        np.testing.assert_allclose(
            distances[row, : len(answer)], [n.distance for n in answer], rtol=1e-6
        )
        assert lengths[row, : len(answer)].tolist() == [n.length for n in answer]
        assert (ids[row, len(answer) :] == -1).all()


def test_overlaps_answer_as_the_embedded_store_does(store: Store, store_path: Path) -> None:
    sketches = [make_sketch(i) for i in range(ENTRIES)]
    with LocalStore.open(store_path) as embedded:
        expected = embedded.overlaps(
            sketches, tenants=[""] * ENTRIES, neighbours=ENTRIES, deadline=math.inf
        )
    ids, common, _ = store.fanout.overlaps(
        store.edition, [""] * ENTRIES, sketches, ENTRIES, store.clock() + 5
    )
    for row, answer in enumerate(expected):
        # Equal counts come in the order of ids, which differ.
        assert {(store.ids[o.entry_id], o.common) for o in answer} == {
            pair for pair in zip(ids[row].tolist(), common[row].tolist(), strict=True)
        }
        assert (np.diff(common[row]) <= 0).all()


def test_another_tenant_finds_nothing(store: Store) -> None:
    ids, _, _ = store.fanout.lookup(
        store.edition, ["ab" * 16], make_features(1), LENGTHS, 5, store.clock() + 5
    )
    assert (ids == -1).all()


def test_records_and_token_ids_come_from_the_owners(store: Store) -> None:
    store.calls.asked.clear()
    records = store.fanout.load(store.edition, store.ids, store.clock() + 5)
    token_ids = store.fanout.token_ids(store.edition, store.ids, store.clock() + 5)
    for number, (record, ids) in enumerate(zip(records, token_ids, strict=True)):
        assert record is not None and ids is not None
        np.testing.assert_array_equal(record, make_entries(ENTRIES)[number][2])
        np.testing.assert_array_equal(ids, make_record(number).token_ids)
    asked = [shard for shard, method in store.calls.asked if method == "load"]
    assert sorted(asked) == sorted({store.fanout.placement.owners(i)[0] for i in store.ids})


def test_with_two_replicas_the_loss_of_any_shard_loses_nothing(double: Store) -> None:
    for shard in range(3):
        double.calls.dead = {shard}
        assert double.found() == double.loaded() == set(double.ids)
        double.clock.ahead += 60
        double.calls.dead = set()
        double.fanout.tend()


def test_with_one_replica_the_other_shards_still_answer(single: Store) -> None:
    single.calls.dead = {1}
    rest = {i for i in single.ids if single.fanout.placement.owners(i) != (1,)}
    assert 0 < len(rest) < ENTRIES
    assert single.found() == single.loaded() == rest


def test_a_shard_that_is_back_without_its_entries_is_made_up_for(double: Store) -> None:
    double.calls.shards[0].remove(double.edition, double.ids)
    assert double.found() == double.loaded() == set(double.ids)


def test_a_hung_shard_costs_three_deadlines_and_then_nothing(double: Store) -> None:
    double.calls.hung = {2}
    for _ in range(3):
        started = time.monotonic()
        assert double.found(seconds=0.05) == set(double.ids)
        assert time.monotonic() - started >= 0.05
    started = time.monotonic()
    assert double.found(seconds=5.0) == double.loaded() == set(double.ids)
    assert time.monotonic() - started < 2.5
    assert set(double.fanout.out()) == {2}


def test_a_shard_that_answers_a_probe_is_asked_again(single: Store) -> None:
    single.calls.hung = {2}
    for _ in range(3):
        single.found(seconds=0.01)
    single.calls.hung = set()
    assert single.found() < set(single.ids), "only a probe closes its breaker"
    single.fanout.tend()
    assert set(single.fanout.out()) == {2}, "it has to cool down first"
    single.clock.ahead += 1.5
    single.fanout.tend()
    assert single.fanout.out() == {}
    assert single.found() == set(single.ids)


def test_no_answer_in_time_is_a_timeout_and_no_shard_an_error(single: Store) -> None:
    single.calls.hung = {0, 1, 2}
    for _ in range(3):
        with pytest.raises(StoreTimeout, match="none of 3 shards"):
            single.found(seconds=0.01)
    with pytest.raises(StoreError, match="one of 3 shards must answer") as caught:
        single.found()
    assert not isinstance(caught.value, StoreTimeout)


def test_a_refusal_is_passed_on_and_opens_no_breaker(single: Store) -> None:
    for _ in range(5):
        with pytest.raises(StoreError, match=r"none of 3 shards could answer.*features must be"):
            single.fanout.lookup(
                single.edition, [""], make_features(1)[:, :3], LENGTHS, 5, single.clock() + 5
            )
    assert single.fanout.out() == {}


def test_faults_are_counted_by_their_kind(single: Store) -> None:
    assert single.fanout.faults() == {}
    single.calls.hung = {0}
    single.found(seconds=0.01)
    single.calls.hung, single.calls.dead = set(), {1}
    single.found()
    single.calls.dead = set()
    single.calls.protocols[2] = 99
    single.clock.ahead += 6
    single.fanout.tend()
    del single.calls.protocols[2]
    bad = [(*make_entries(1)[0][:1], np.zeros(3, np.float32), *make_entries(1)[0][2:])]
    single.fanout.put(single.edition, "ab", bad, single.clock() + 5)
    faults = single.fanout.faults()
    assert faults == {"late": 1, "dead": 1, "version": 1, "refused": 1}


def test_entries_that_a_full_shard_refuses_are_counted(single: Store) -> None:
    for shard in single.calls.shards.values():
        shard._kept._limits = Limits(max_bytes=1 << 20, tenant_bytes=1)
    [said] = single.fanout.put(single.edition, "ab", make_entries(1), single.clock() + 5)
    assert said == [FULL]
    assert single.fanout.faults()["full"] == 1


def test_what_shards_find_damaged_is_counted_from_now_on(single: Store) -> None:
    counts = {shard: 7 for shard in single.calls.shards}
    for number, shard in single.calls.shards.items():
        stats = shard.stats()
        shard.stats = lambda number=number, stats=stats: stats | {"damaged": counts[number]}
    fanout = Fanout(single.calls, clock=single.clock)
    for count, expected in ((7, 0), (9, 2), (1, 3)):  # the last one was restarted
        counts[0] = count
        single.clock.ahead += 6
        fanout.tend()
        assert fanout.faults().get("damaged", 0) == expected


def test_a_shard_of_another_release_is_left_out(tmp_path: Path) -> None:
    calls = FakeCalls(tmp_path, Placement(1, 2, 1), clock := Clock())
    calls.protocols[0] = 99
    fanout = Fanout(calls, new_breaker=lambda: Breaker(clock=clock), clock=clock)
    for _ in range(3):
        clock.ahead += 6
        fanout.tend()
    assert "protocol 1, got 99" in fanout.out()[0]
    clock.ahead += 60
    fanout.tend()
    assert set(fanout.out()) == {0}, "no probe may leave it half-open for good"
    calls.protocols[0] = 1
    clock.ahead += 60
    fanout.tend()
    assert fanout.out() == {}


def test_a_slow_shard_is_there_for_those_who_wait_for_it(tmp_path: Path) -> None:
    class SlowCalls(FakeCalls):
        def gather(self, pending: Mapping[Any, Any], deadline: float) -> dict[Any, Any]:
            in_time = deadline - self.clock() > 5
            return super().gather(pending, deadline) if in_time else {}

    calls = SlowCalls(tmp_path, Placement(1, 2, 1))
    with pytest.raises(StoreError, match="it does not answer in time"):
        Fanout(calls)
    assert Fanout(calls, describe_seconds=10.0).placement == Placement(1, 2, 1)


def test_no_shard_at_all_says_what_to_do(tmp_path: Path) -> None:
    calls = FakeCalls(tmp_path, Placement(1, 1, 1))
    calls.dead = {0}
    with pytest.raises(StoreError, match=r"shard 0: ConnectionError.*attncache store up"):
        Fanout(calls)
    del calls.shards[0]
    with pytest.raises(StoreError, match="got none at all"):
        Fanout(calls)


@pytest.mark.parametrize(
    ("before", "after"), [((2, 1), (3, 1)), ((3, 2), (2, 2)), ((2, 1), (2, 2))]
)
def test_another_placement_loses_nothing_and_servers_follow(
    tmp_path: Path, store_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    store = make_store(tmp_path, store_path, *before)
    for number in range(before[0], after[0]):
        store.calls.start(number, Placement(1, *before))
    server = Fanout(store.calls, clock=store.clock)
    store.fanout.meet(range(max(before[0], after[0])))
    target = Placement(2, *after)
    moved = move(store.fanout, target, adoption_seconds=0.0)
    assert moved.stranded == 0 and moved.copied > 0
    store.clock.ahead += 6
    server.tend()
    assert server.placement == target
    store.fanout = server
    assert store.found() == store.loaded() == set(store.ids)
    for shard in range(max(before[0], after[0])):
        own = {i for i in store.ids if shard in target.owners(i)} if shard < after[0] else set()
        assert set(store.calls.shards[shard].ids(store.edition).tolist()) == own


def test_a_drained_shard_holds_nothing_and_is_given_nothing(single: Store) -> None:
    move(single.fanout, Placement(2, 3, 1, drained=(1,)), adoption_seconds=0.0)
    single.clock.ahead += 6
    single.fanout.tend()
    assert single.calls.shards[1].stats()["entries"] == 0
    assert single.found() == single.loaded() == set(single.ids)
    [said] = single.fanout.put(single.edition, "ab", make_entries(1), single.clock() + 5)
    assert said == ["kept"]
    assert single.calls.shards[1].stats()["entries"] == 0


def test_entries_without_room_stop_a_move_before_anything_is_removed(single: Store) -> None:
    for number in (3, 4, 5):
        single.calls.start(number, Placement(1, 3, 1))
        single.calls.shards[number].put = lambda *args: ["refused: full"] * len(args[3])
    single.fanout.meet(range(6))
    with pytest.raises(StoreError, match="every entry must find room"):
        move(single.fanout, Placement(2, 6, 1), adoption_seconds=0.0)
    assert single.fanout.placement.generation == 1
    assert single.found() == single.loaded() == set(single.ids)


def test_what_is_saved_is_what_was_loaded(store: Store, store_path: Path, tmp_path: Path) -> None:
    assert save(store.fanout, tmp_path / "saved") == ENTRIES
    with LocalStore.open(store_path) as first, LocalStore.open(tmp_path / "saved") as second:
        assert (first.plan, first.projector_bytes) == (second.plan, second.projector_bytes)
        assert second.artifact("templates") == first.artifact("templates")
        hashes = [{r.token_hash for _, r in opened.records()} for opened in (first, second)]
        assert hashes[0] == hashes[1]
        # Each entry lies where its own feature is.
        for number in range(ENTRIES):
            [[found]] = second.lookup(
                make_features(ENTRIES)[[number]],
                [ANY_LENGTH],
                tenants=[""],
                neighbours=1,
                deadline=math.inf,
            )
            [record] = second.load([found.entry_id], deadline=math.inf)
            assert found.distance == 0 and record is not None
            assert record.token_hash == make_record(number).token_hash


def test_what_lacks_a_layer_of_the_build_is_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "layers"
    with LocalStore.create(path, NAMESPACE, {"layers": [1, 3]}) as built:
        for number in range(ENTRIES):
            built.put(make_record(number))
        built.publish({}, b"projector", {}, make_features(ENTRIES))
    store = make_store(tmp_path, path, 2, 1)
    admitted = make_record(ENTRIES)
    record = b"".join(encode_record(replace(admitted, maps={3: admitted.maps[3]})))
    number = entry_id("", admitted.token_hash)
    entry = (number, make_features(1)[0], np.frombuffer(record, np.uint8), 0.0)
    assert store.fanout.put(store.edition, "", [entry], store.clock() + 5) == [["kept"]]
    assert number in store.found()
    assert save(store.fanout, tmp_path / "saved") == ENTRIES


def test_what_is_loaded_again_is_known(store: Store, store_path: Path) -> None:
    assert load(store.fanout, store_path) == {"kept": 0, "known": ENTRIES, "refused": 0}
