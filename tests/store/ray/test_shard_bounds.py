# SPDX-License-Identifier: Apache-2.0
"""A shard's bounds: bytes, age, restarts and damage."""

from collections.abc import Iterator
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
    find,
    held,
    id_of,
    open_shard,
    path_of,
    put,
)
from store_samples import ANY_LENGTH, make_record, make_sketch

from attncache_vllm.errors import StoreError
from attncache_vllm.store.ray.envelope import Head
from attncache_vllm.store.ray.files import EntryFiles
from attncache_vllm.store.ray.shard import Limits, Shard


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[Shard]:
    shard = open_shard(tmp_path)
    yield shard
    shard.close()


def share(shard: Shard, number: int, tenant: str = "") -> set[int]:
    ids, _, _ = shard.overlaps(DIGEST, [tenant], [make_sketch(number)], 64)
    return set(ids[0].tolist()) - {-1}


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
