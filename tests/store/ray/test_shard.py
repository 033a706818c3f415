# SPDX-License-Identifier: Apache-2.0
"""A shard answers as the embedded store does, and refuses what is not its."""

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from entry_samples import (
    ALICE,
    BOB,
    DIGEST,
    EDITION,
    FEATURES,
    bytes_of,
    find,
    held,
    id_of,
    open_shard,
    other_edition,
    path_of,
    put,
)
from store_samples import ANY_LENGTH, FEATURE_DIM, build_store, make_sketch

from attncache_vllm.errors import StoreError
from attncache_vllm.store import LocalStore
from attncache_vllm.store.ray import shard as shard_module
from attncache_vllm.store.ray.edition import Edition
from attncache_vllm.store.ray.growing import GrowingIndex
from attncache_vllm.store.ray.shard import Limits, Shard


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[Shard]:
    shard = open_shard(tmp_path)
    yield shard
    shard.close()


# -- the same answers as the embedded store ---------------------------------------------------


def test_it_answers_as_the_embedded_store_with_the_same_entries(tmp_path: Path) -> None:
    build_store(tmp_path / "embedded", 40)
    features = np.random.default_rng(3).normal(size=(9, FEATURE_DIM)).astype(np.float32)
    bounds = [(1 + 20 * n, 40 + 30 * n) for n in range(9)]
    sketches = [make_sketch(n) for n in range(0, 45, 5)]
    with LocalStore.open(tmp_path / "embedded") as store:
        shard = open_shard(tmp_path / "shard")
        stored = np.random.default_rng(7).normal(size=(40, FEATURE_DIM)).astype(np.float32)
        for start in range(0, 40, 8):
            rows = range(start, start + 8)
            shard.put(DIGEST, "", stored[rows], [bytes_of(n) for n in rows])
        nearest = store.lookup(features, bounds, tenants=[""] * 9, neighbours=5, deadline=math.inf)
        ids, distances, lengths = shard.lookup(DIGEST, [""] * 9, features, np.array(bounds), 5)
        for row, expected in enumerate(nearest):
            padding = 5 - len(expected)
            assert ids[row].tolist() == [id_of(n.entry_id) for n in expected] + [-1] * padding
            count = len(expected)
            assert distances[row, :count].tolist() == [n.distance for n in expected]
            assert lengths[row, :count].tolist() == [n.length for n in expected]
        sharing = store.overlaps(sketches, tenants=[""] * 9, neighbours=6, deadline=math.inf)
        ids, common, lengths = shard.overlaps(DIGEST, [""] * 9, sketches, 6)
        for row, found in enumerate(sharing):
            # Of equals each store has its own order.
            assert common[row][ids[row] >= 0].tolist() == [o.common for o in found]
        wanted = [id_of(n) for n in (7, 3, 39)]
        for ours, theirs in zip(
            shard.token_ids(DIGEST, wanted),
            store.token_ids([7, 3, 39], deadline=math.inf),
            strict=True,
        ):
            np.testing.assert_array_equal(ours, theirs)
    for number, record in zip((7, 3, 39), shard.load(DIGEST, wanted), strict=True):
        np.testing.assert_array_equal(record, bytes_of(number))
    shard.close()


def test_records_are_read_only_and_outlive_the_entry(shard: Shard) -> None:
    put(shard, [1])
    [record] = shard.load(DIGEST, [id_of(1)])
    assert record is not None and not record.flags.writeable
    assert shard.remove(DIGEST, [id_of(1), 99]) == 1
    np.testing.assert_array_equal(record, bytes_of(1))
    assert shard.load(DIGEST, [id_of(1)]) == shard.token_ids(DIGEST, [id_of(1)]) == [None]


def test_an_unknown_edition_holds_nothing(shard: Shard) -> None:
    put(shard, [1])
    unknown = "0" * 64
    assert find(shard, 1, edition=unknown) == -1
    assert shard.load(unknown, [id_of(1)]) == [None]
    [answer] = put(shard, [1], edition=unknown)
    assert answer.startswith("refused: edition 0000000000000000 is not published here")
    assert shard.edition(unknown) is None


# -- tenants and editions ---------------------------------------------------------------------


def test_tenants_find_their_own_entries_only(shard: Shard) -> None:
    put(shard, [1, 2], ALICE)
    put(shard, [2, 3], BOB)
    put(shard, [4])
    everyone = {tenant: held(shard, tenant) for tenant in (ALICE, BOB, "")}
    assert everyone == {
        ALICE: {id_of(1, ALICE), id_of(2, ALICE)},
        BOB: {id_of(2, BOB), id_of(3, BOB)},
        "": {id_of(4)},
    }
    tenants = [ALICE, BOB, "", "c0ffee"] * 2
    bounds = np.array([ANY_LENGTH] * 8)
    ids, _, _ = shard.lookup(DIGEST, tenants, FEATURES[:8], bounds, 8)
    shared, _, _ = shard.overlaps(DIGEST, tenants, [make_sketch(n) for n in range(8)], 8)
    for row, tenant in enumerate(tenants):
        assert set(ids[row].tolist()) - {-1} == everyone.get(tenant, set())
        assert set(shared[row].tolist()) - {-1} == everyone.get(tenant, set())


def test_editions_hold_their_own_entries_only(shard: Shard) -> None:
    other = shard.publish(other_edition().to_bytes())
    put(shard, [1])
    assert put(shard, [1], edition=other) == ["kept"]
    put(shard, [2], edition=other)
    assert held(shard) == {id_of(1)}
    assert find(shard, 2) == id_of(1)
    assert find(shard, 2, edition=other) == id_of(2)


def test_the_edition_published_last_is_current_for_its_namespace(shard: Shard) -> None:
    namespace = EDITION.namespace.digest()
    assert shard.current(namespace) == DIGEST
    other = shard.publish(other_edition().to_bytes())
    foreign = replace(EDITION, namespace=replace(EDITION.namespace, dtype="float16"))
    shard.publish(foreign.to_bytes())
    assert shard.current(namespace) == other
    assert shard.current("0" * 64) is None
    put(shard, [1])
    found = shard.editions()
    assert {digest: (e["current"], e["entries"]) for digest, e in found.items()} == {
        DIGEST: (False, 1),
        other: (True, 0),
        foreign.digest: (True, 0),
    }
    assert found[foreign.digest]["namespace"]["dtype"] == "float16"
    data = shard.edition(DIGEST)
    assert data is not None and Edition.from_bytes(data) == EDITION
    shard.publish(EDITION.to_bytes())
    assert shard.current(namespace) == DIGEST


def test_deleting_a_tenant_leaves_the_others(shard: Shard, tmp_path: Path) -> None:
    put(shard, [1, 2], ALICE)
    put(shard, [1, 2], BOB)
    assert shard.delete(tenant=ALICE) == 2
    assert (held(shard), find(shard, 1, ALICE)) == ({id_of(1, BOB), id_of(2, BOB)}, -1)
    assert not path_of(tmp_path, 1, ALICE).exists()
    assert put(shard, [1], ALICE) == ["kept"]


def test_tenants_that_are_gone_take_no_memory(shard: Shard) -> None:
    for number in range(20):
        put(shard, [1], f"{number:02x}")
        shard.delete(tenant=f"{number:02x}")
    assert (shard._indexes, shard.stats()["tenants"]) == ({}, 0)


def test_deleting_an_edition_leaves_nothing_of_it(shard: Shard, tmp_path: Path) -> None:
    other = shard.publish(other_edition().to_bytes())
    put(shard, [1])
    put(shard, [1], edition=other)
    assert shard.delete(tenant=ALICE, edition=other) == 0
    assert shard.delete(edition=other) == 1
    assert not (tmp_path / other[:16]).exists()
    assert (shard.edition(other), shard.current(EDITION.namespace.digest())) == (None, None)
    assert held(shard) == {id_of(1)}


@pytest.mark.parametrize("edition", ["", "..", "../../etc", DIGEST[:16], DIGEST.upper()])
def test_what_is_no_edition_is_not_looked_for_on_the_disk(
    shard: Shard, tmp_path: Path, edition: str
) -> None:
    put(shard, [1])
    with pytest.raises(StoreError, match="64 hexadecimal digits"):
        shard.delete(edition=edition)
    assert path_of(tmp_path, 1).exists()


def test_deleting_all_must_be_said(shard: Shard) -> None:
    with pytest.raises(StoreError, match="got neither"):
        shard.delete()


# -- what is refused --------------------------------------------------------------------------


def test_an_entry_is_kept_once(shard: Shard) -> None:
    assert put(shard, [1, 2, 1]) == ["kept", "kept", "known"]
    assert put(shard, [2, 3]) == ["known", "kept"]
    assert held(shard) == {id_of(n) for n in (1, 2, 3)}
    bounds = np.array([ANY_LENGTH])
    ids, _, _ = shard.lookup(DIGEST, [""], FEATURES[:1], bounds, 9)
    assert sorted(ids[0].tolist()) == [-1] * 6 + sorted(held(shard))


def test_a_damaged_record_is_refused_and_the_rest_of_the_batch_kept(
    shard: Shard, tmp_path: Path
) -> None:
    damaged = bytes_of(2).copy()
    damaged[-100] ^= 1
    records = [bytes_of(1), damaged, np.zeros(0, np.uint8), bytes_of(3).astype(np.int64)]
    answers = shard.put(DIGEST, "", FEATURES[1:5], records)
    assert [answer.split(":")[0] for answer in answers] == ["kept", *["refused"] * 3]
    features = FEATURES[5:7].copy()
    features[0, 0] = np.nan
    answers = shard.put(DIGEST, "", features, [bytes_of(5), bytes_of(6)])
    assert answers[0].startswith("refused: a feature must be 8 finite numbers")
    [answer] = shard.put(DIGEST, "", FEATURES[:1, :3], [bytes_of(7)])
    assert answer.startswith("refused: a feature must be 8 finite numbers")
    assert held(shard) == {id_of(1), id_of(6)}
    assert len(list(tmp_path.glob("*/*.entry"))) == 2
    assert shard.stats()["refused"] == 5


def test_another_sequence_with_the_same_id_is_refused(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_module, "entry_id", lambda tenant, token_hash: 7)
    answers = put(shard, [1, 2])
    assert answers == [
        "kept",
        "refused: another sequence has the id 0000000000000007 already",
    ]
    [answer] = put(shard, [1], ALICE)
    assert answer.startswith("refused: another sequence has the id")


def test_a_disk_that_refuses_is_a_reason_and_no_fault(
    shard: Shard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    [answer] = put(shard, [1])
    assert "No space left on device" in answer
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / DIGEST[:16]).iterdir()] == ["edition"]
    assert put(shard, [1]) == ["kept"]


CALLS: dict[str, Callable[[Shard], object]] = {
    "features must be float32": lambda s: s.put(DIGEST, "", FEATURES[:2], [bytes_of(1)]),
    "ages_s must be": lambda s: put(s, [1], ages_s=[math.nan]),
    "ages_s must be 1": lambda s: put(s, [1], ages_s=[]),
    "a tenant must be": lambda s: put(s, [1], "salt"),
    "features must be": lambda s: s.lookup(DIGEST, [""], FEATURES[:2], np.ones((1, 2)), 1),
    r"lengths \[1, 2\]": lambda s: s.lookup(DIGEST, [""], FEATURES[:1], np.ones((1, 3)), 1),
    "neighbours must be": lambda s: s.overlaps(DIGEST, [""], [make_sketch(1)], 1 << 40),
    "1 sketches": lambda s: s.overlaps(DIGEST, [""], [], 1),
    "cannot be published": lambda s: s.publish(b"no edition"),
}


@pytest.mark.parametrize("rule", CALLS)
def test_arguments_that_do_not_fit_are_refused(shard: Shard, rule: str) -> None:
    with pytest.raises(StoreError, match=rule):
        CALLS[rule](shard)
    assert shard.stats()["entries"] == 0


# -- pages ------------------------------------------------------------------------------------


def test_pages_of_ids_are_all_of_them_in_order(shard: Shard) -> None:
    put(shard, range(25))
    put(shard, range(5), ALICE)
    sizes, ids, after = [], list[int](), -1
    while len(page := shard.ids(DIGEST, "", after, 10)):
        sizes.append(len(page))
        ids += page.tolist()
        after = ids[-1]
    assert sizes == [10, 10, 5]
    assert ids == sorted(id_of(n) for n in range(25))
    assert len(shard.ids(DIGEST)) == 30


# -- threads ----------------------------------------------------------------------------------


def test_reads_do_not_wait_for_an_index_that_is_built(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(shard, [1])
    building, go_on = threading.Event(), threading.Event()

    def compact(self: GrowingIndex) -> None:
        building.set()
        assert go_on.wait(30)

    monkeypatch.setattr(GrowingIndex, "compact", compact)
    putting = threading.Thread(target=put, args=(shard, [2]))
    putting.start()
    try:
        assert building.wait(30)
        assert find(shard, 2) == id_of(2)
        assert shard.load(DIGEST, [id_of(2)])[0] is not None
        assert shard.remove(DIGEST, [id_of(1)]) == 1
    finally:
        go_on.set()
        putting.join(30)


def test_threads_may_share_it(tmp_path: Path) -> None:
    shard = open_shard(tmp_path, Limits(60_000, ttl_s=1e6))
    faults: list[BaseException] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        try:
            for _ in range(12):
                numbers = random.choice(30, 3, replace=False).tolist()
                tenant = ("", ALICE)[seed % 2]
                put(shard, numbers, tenant, map_bytes=3000)
                for number in numbers:
                    [record] = shard.load(DIGEST, [id_of(number, tenant)])
                    expected = bytes_of(number, map_bytes=3000)
                    assert record is None or np.array_equal(record, expected)
                    find(shard, number, tenant)
                shard.remove(DIGEST, [id_of(numbers[0], tenant)])
                shard.expire()
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert faults == []
    stats = shard.stats()
    assert stats["damaged"] == 0
    assert stats["bytes"] <= 60_000
    on_disk = {int(path.stem, 16) for path in tmp_path.glob("*/*.entry")}
    assert on_disk == held(shard)
    found = set[int]()
    for tenant in ("", ALICE):
        bounds = np.array([ANY_LENGTH])
        ids, _, _ = shard.lookup(DIGEST, [tenant], FEATURES[:1], bounds, 64)
        found |= set(ids[0].tolist()) - {-1}
    assert found == held(shard)
    shard.close()
