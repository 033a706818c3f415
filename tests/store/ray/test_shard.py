# SPDX-License-Identifier: Apache-2.0
"""A shard answers as the embedded store, keeps its bounds, and comes back with what it kept."""

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
    PLENTY,
    Clock,
    bytes_of,
    held,
    id_of,
    open_shard,
    other_edition,
    put,
)
from store_samples import ANY_LENGTH, FEATURE_DIM, build_store, make_record, make_sketch

from attncache_vllm.errors import StoreError
from attncache_vllm.store import LocalStore
from attncache_vllm.store.ray import shard as shard_module
from attncache_vllm.store.ray.edition import Edition
from attncache_vllm.store.ray.envelope import Head
from attncache_vllm.store.ray.files import EntryFiles
from attncache_vllm.store.ray.growing import GrowingIndex
from attncache_vllm.store.ray.shard import Limits, Shard


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[Shard]:
    shard = open_shard(tmp_path)
    yield shard
    shard.close()


def find(shard: Shard, number: int, tenant: str = "", edition: str = DIGEST) -> int:
    """The id of the nearest entry to the feature of ``number``, -1 for none."""
    bounds = np.array([ANY_LENGTH])
    ids, _, _ = shard.lookup(edition, [tenant], FEATURES[[number]], bounds, 1)
    return int(ids[0, 0])


def share(shard: Shard, number: int, tenant: str = "") -> set[int]:
    ids, _, _ = shard.overlaps(DIGEST, [tenant], [make_sketch(number)], 64)
    return set(ids[0].tolist()) - {-1}


def path_of(folder: Path, number: int, tenant: str = "") -> Path:
    return folder / DIGEST[:16] / f"{id_of(number, tenant):016x}.entry"


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


# -- bounds -----------------------------------------------------------------------------------


def test_a_full_shard_evicts_what_is_worth_least_and_counts_it(tmp_path: Path) -> None:
    shard = open_shard(tmp_path, Limits(60_000))
    put(shard, [1, 2], map_bytes=5000)
    for number in range(3, 12):
        shard.load(DIGEST, [id_of(1)])
        assert put(shard, [number], map_bytes=5000) == ["kept"]
    stats = shard.stats()
    assert stats["bytes"] <= 60_000
    assert stats["entries"] + stats["evicted"] == 11
    assert id_of(1) in held(shard)
    assert id_of(2) not in held(shard)
    on_disk = {int(path.stem, 16) for path in tmp_path.glob("*/*.entry")}
    bounds = np.array([ANY_LENGTH])
    ids, _, _ = shard.lookup(DIGEST, [""], FEATURES[:1], bounds, 64)
    assert on_disk == held(shard) == set(ids[0].tolist()) - {-1}
    assert stats["bytes"] == sum(path.stat().st_size for path in tmp_path.glob("*/*.entry"))
    shard.close()


def test_a_tenant_that_stores_much_displaces_only_itself(tmp_path: Path) -> None:
    shard = open_shard(tmp_path, Limits(60_000, tenant_bytes=30_000))
    put(shard, [1, 2], BOB, map_bytes=5000)
    put(shard, list(range(20)), ALICE, map_bytes=5000)
    assert held(shard, BOB) == {id_of(1, BOB), id_of(2, BOB)}
    assert 1 <= len(held(shard, ALICE)) <= 2
    shard.close()


def test_one_that_has_no_room_is_refused(tmp_path: Path) -> None:
    shard = open_shard(tmp_path, Limits(60_000, tenant_bytes=6_000))
    [answer] = put(shard, [1], map_bytes=10_000)
    assert answer.startswith("refused: a record must have at most 6000 bytes")
    assert list(tmp_path.glob("*/*.entry")) == []
    shard.close()


def test_answers_of_a_batch_that_displaces_itself_are_true(tmp_path: Path) -> None:
    shard = open_shard(tmp_path, Limits(30_000))
    answers = put(shard, range(10), map_bytes=5000)
    kept = {id_of(n) for n, answer in enumerate(answers) if answer == "kept"}
    assert kept == held(shard)
    assert len(kept) == 2
    assert {answer for answer in answers if answer != "kept"} == {
        "refused: the shard is full of what is worth more"
    }
    shard.close()


# -- age --------------------------------------------------------------------------------------


def test_what_is_too_old_is_not_found_and_its_file_goes(tmp_path: Path) -> None:
    monotonic = Clock(100.0)
    shard = open_shard(tmp_path, replace(PLENTY, ttl_s=50.0), monotonic=monotonic)
    put(shard, [1])
    monotonic.now += 30
    put(shard, [2])
    monotonic.now += 20
    assert (find(shard, 1), share(shard, 1)) == (id_of(2), {id_of(2)})
    assert shard.load(DIGEST, [id_of(1)]) == [None]
    assert (held(shard), path_of(tmp_path, 1).exists()) == ({id_of(2)}, False)
    assert shard.stats()["expired"] == 1
    monotonic.now += 30
    assert shard.expire() == 1
    assert shard.stats()["expired"] == 2
    assert put(shard, [1]) == ["kept"]
    shard.close()


def test_a_wall_clock_that_jumps_changes_nothing_while_it_runs(tmp_path: Path) -> None:
    wall, monotonic = Clock(), Clock(100.0)
    limits = replace(PLENTY, ttl_s=50.0)
    shard = open_shard(tmp_path, limits, wall=wall, monotonic=monotonic)
    put(shard, [1])
    for jump in (1e9, -1.5e9):
        wall.now += jump
        assert (find(shard, 1), shard.expire()) == (id_of(1), 0)
    shard.close()


@pytest.mark.parametrize(("passed", "left"), [(30.0, 20.0), (-1e6, 50.0), (50.0, 0.0)])
def test_ages_survive_a_restart_and_are_never_negative(
    tmp_path: Path, passed: float, left: float
) -> None:
    wall = Clock()
    limits = replace(PLENTY, ttl_s=50.0)
    shard = open_shard(tmp_path, limits, wall=wall, monotonic=Clock(9e5))
    put(shard, [1])
    shard.close()
    wall.now += passed
    monotonic = Clock(3.0)
    shard = Shard(tmp_path, limits, wall=wall, monotonic=monotonic)
    if left:
        monotonic.now += left - 0.1
        assert held(shard) == {id_of(1)}
        monotonic.now += 0.1
    assert held(shard) == set()
    shard.close()


def test_an_entry_that_moves_to_another_shard_keeps_its_age(tmp_path: Path) -> None:
    monotonic = Clock(100.0)
    limits = replace(PLENTY, ttl_s=50.0)
    shard = open_shard(tmp_path / "one", limits, monotonic=monotonic)
    put(shard, [1], ALICE)
    monotonic.now += 30
    [entry, gone] = shard.export(DIGEST, [id_of(1, ALICE), 99])
    assert entry is not None and gone is None
    other = open_shard(tmp_path / "other", limits, monotonic=monotonic)
    answers = other.put(DIGEST, entry.tenant, entry.feature[None], [entry.record], [entry.age_s])
    assert answers == ["kept"]
    assert find(other, 1, ALICE) == id_of(1, ALICE)
    monotonic.now += 20
    assert held(other) == set()
    shard.close()
    other.close()


# -- restarts and damage ----------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, b"a key"])
def test_a_restarted_shard_comes_back_with_what_it_kept(tmp_path: Path, key: bytes | None) -> None:
    shard = open_shard(tmp_path, key=key)
    put(shard, range(20), ALICE)
    put(shard, range(10, 30))
    shard.rearm()
    before = shard.stats()
    rearmed = shard.rearmed_at()
    shard.close()
    again = Shard(tmp_path, PLENTY, key)
    assert again.current(EDITION.namespace.digest()) == DIGEST
    assert again.rearmed_at() == rearmed > 0
    assert {**again.stats(), "refused": 0} == {**before, "lookups": 0}
    assert held(again, ALICE) == {id_of(n, ALICE) for n in range(20)}
    assert [find(again, n) for n in (10, 29)] == [id_of(10), id_of(29)]
    [record] = again.load(DIGEST, [id_of(12)])
    np.testing.assert_array_equal(record, bytes_of(12))
    again.close()


def test_a_smaller_bound_evicts_at_the_restart(tmp_path: Path) -> None:
    shard = open_shard(tmp_path)
    put(shard, range(10), map_bytes=5000)
    shard.close()
    again = Shard(tmp_path, Limits(40_000))
    assert 0 < again.stats()["bytes"] <= 40_000
    assert len(list(tmp_path.glob("*/*.entry"))) == again.stats()["entries"] == len(held(again))
    again.close()


def test_the_oldest_go_first_at_the_restart(tmp_path: Path) -> None:
    shard = open_shard(tmp_path)
    put(shard, range(6), map_bytes=5000, ages_s=[5.0, 1.0, 9.0, 2.0, 7.0, 3.0])
    shard.close()
    again = Shard(tmp_path, Limits(40_000))
    assert held(again) == {id_of(n) for n in (1, 3, 5)}
    again.close()


def test_two_shards_never_have_one_folder(shard: Shard, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="one writer at a time"):
        Shard(tmp_path, PLENTY)


@pytest.mark.parametrize("damage", ["maps", "head", "cut", "gone", "swapped"])
def test_what_is_damaged_is_a_miss_and_forgotten(shard: Shard, tmp_path: Path, damage: str) -> None:
    put(shard, [1, 2])
    path = path_of(tmp_path, 1)
    data = bytearray(path.read_bytes())
    path.unlink()  # not in place: what is mapped must not change
    if damage == "maps":
        data[-65] ^= 1
    elif damage == "head":
        data[100] ^= 1
    elif damage == "cut":
        del data[-1]
    elif damage == "swapped":
        data = bytearray(path_of(tmp_path, 2).read_bytes())
    if damage != "gone":
        path.write_bytes(data)
    assert shard.load(DIGEST, [id_of(1), id_of(2)])[0] is None
    assert shard.stats()["damaged"] == 1
    assert find(shard, 1) == id_of(2)
    assert share(shard, 1) == {id_of(2)}
    assert not path.exists()
    assert put(shard, [1]) == ["kept"]
    assert find(shard, 1) == id_of(1)


def test_damage_of_maps_does_not_hide_token_ids(shard: Shard, tmp_path: Path) -> None:
    put(shard, [1])
    data = bytearray(path_of(tmp_path, 1).read_bytes())
    data[-65] ^= 1
    path_of(tmp_path, 1).unlink()
    path_of(tmp_path, 1).write_bytes(data)
    [token_ids] = shard.token_ids(DIGEST, [id_of(1)])
    np.testing.assert_array_equal(token_ids, make_record(1).token_ids)
    assert shard.load(DIGEST, [id_of(1)]) == [None]


def test_maps_are_checked_once(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    put(shard, [1])
    checked: list[object] = []
    monkeypatch.setattr(
        "attncache_vllm.store.ray.files.check_body", lambda *given: checked.append(given)
    )
    for _ in range(3):
        shard.load(DIGEST, [id_of(1)])
    assert len(checked) == 1


def test_one_that_is_evicted_while_it_is_read_is_no_damage(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(shard, [1])
    read = EntryFiles.read

    def evicting(self: EntryFiles, edition: str, entry_id: int, *, whole: bool) -> Head:
        shard.remove(edition, [entry_id])
        put(shard, [1])
        shard.remove(edition, [entry_id])
        return read(self, edition, entry_id, whole=whole)

    monkeypatch.setattr(EntryFiles, "read", evicting)
    assert shard.load(DIGEST, [id_of(1)]) == [None]
    assert shard.stats()["damaged"] == 0


def test_damaged_entries_are_counted_at_the_restart(tmp_path: Path) -> None:
    shard = open_shard(tmp_path)
    put(shard, range(5))
    shard.close()
    path_of(tmp_path, 2).write_bytes(b"damaged")
    again = Shard(tmp_path, PLENTY)
    assert held(again) == {id_of(n) for n in (0, 1, 3, 4)}
    assert again.stats()["damaged"] == 1
    again.close()


@pytest.mark.parametrize("damaged", [["edition"], ["edition", "current"]])
def test_entries_of_a_damaged_edition_wait_until_it_is_published_again(
    tmp_path: Path, damaged: list[str]
) -> None:
    shard = open_shard(tmp_path)
    put(shard, range(5))
    shard.close()
    for name in damaged:
        (tmp_path / name if name == "current" else tmp_path / DIGEST[:16] / name).write_bytes(b"?")
    again = Shard(tmp_path, PLENTY)
    assert (again.editions(), held(again)) == ({}, set())
    assert again.current(EDITION.namespace.digest()) is None
    assert again.stats()["damaged"] == len(damaged)
    assert again.publish(EDITION.to_bytes()) == DIGEST
    assert held(again) == {id_of(n) for n in range(5)}
    assert again.current(EDITION.namespace.digest()) == DIGEST
    again.close()


def test_an_edition_below_another_digest_is_damage(tmp_path: Path) -> None:
    shard = open_shard(tmp_path)
    shard.close()
    (tmp_path / DIGEST[:16]).rename(tmp_path / ("0" * 16))
    again = Shard(tmp_path, PLENTY)
    assert (again.editions(), again.stats()["damaged"]) == ({}, 1)
    again.close()


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
