# SPDX-License-Identifier: Apache-2.0
"""An embedded store whose records and files are damaged, or gone."""

import shutil
from pathlib import Path

import pytest
from local_store_samples import (
    NEVER,
    files_like,
    flip,
    load_one,
)
from store_samples import (
    ARTIFACTS,
    assert_same,
    make_features,
    make_record,
    near,
)

from attncache_vllm.errors import StoreDamaged, StoreError
from attncache_vllm.store import LocalStore
from attncache_vllm.store.records import read_layout


def test_a_damaged_record_is_skipped_counted_once_and_not_found_again(
    store_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with LocalStore.open(store_path) as store:
        entry = store.manifest.entries[4]
    flip(store_path / f"maps-{entry.segment:06d}", entry.offset + entry.size - 1)
    query = make_features(12)[4:5]
    with LocalStore.open(store_path) as store:
        assert near(store, query)[0][0].entry_id == 4
        assert store.load([4, 5, 4], deadline=NEVER)[::2] == [None, None]
        found = near(store, query, neighbours=12)[0]
        assert {n.entry_id for n in found} == set(range(12)) - {4}
        assert [entry_id for entry_id, _ in store.records()] == [n for n in range(12) if n != 4]
        assert store.stats().damaged == 1
    assert sum("entry 4 is skipped" in message for message in caplog.messages) == 1


def test_damaged_entries_can_be_dropped_and_put_again(store_path: Path) -> None:
    with LocalStore.open(store_path) as store:
        entry = store.manifest.entries[4]
    flip(store_path / f"maps-{entry.segment:06d}", entry.offset)
    with LocalStore.open(store_path, writable=True) as store:
        assert [entry_id for entry_id, _ in store.verify().damaged] == [4]
        with pytest.raises(StoreError, match=r"drop_damaged\(\)"):
            store.publish({}, b"", {}, make_features(12))
        assert store.drop_damaged() == 1
        assert store.drop_damaged() == 0
        assert not store.has(make_record(4).token_hash)
        assert store.put(make_record(4)) == 11
        store.publish({}, b"", {}, make_features(12))
    with LocalStore.open(store_path) as store:
        numbers = [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 4]
        for (_, record), number in zip(store.records(), numbers, strict=True):
            assert_same(record, make_record(number))
        assert store.verify().ok


def test_a_damaged_sketch_is_not_published(store_path: Path) -> None:
    with LocalStore.open(store_path) as store:
        entry = store.manifest.entries[4]
        record = (store_path / f"maps-{entry.segment:06d}").read_bytes()[entry.offset :]
        start = read_layout(memoryview(record)[: entry.size]).sketch.start
    flip(store_path / f"maps-{entry.segment:06d}", entry.offset + start)
    with (
        LocalStore.open(store_path, writable=True) as store,
        pytest.raises(StoreError, match=r"got damaged ones \[4\]; call drop_damaged\(\)"),
    ):
        store.publish({}, b"", {}, make_features(12))


@pytest.mark.parametrize("kind", ["features", "projector", "sketches"])
@pytest.mark.parametrize("harm", ["flip", "remove"])
def test_other_damaged_files_stop_readers_until_published_again(
    store_path: Path, kind: str, harm: str
) -> None:
    (file,) = files_like(store_path, kind)
    flip(file, 0) if harm == "flip" else file.unlink()
    with pytest.raises(StoreDamaged, match="run 'attncache build' again"):
        LocalStore.open(store_path)
    with LocalStore.open(store_path, writable=True) as store:
        assert store.stats().damaged == 1
        if kind == "projector":
            with pytest.raises(StoreError):
                _ = store.projector_bytes
        else:  # it need not be trained again
            assert store.projector_bytes == b"projector"
        store.publish({}, b"projector", {}, make_features(12))
        assert store.stats().damaged == 0
    with LocalStore.open(store_path) as store:
        assert store.verify().ok


@pytest.mark.parametrize("harm", ["flip", "remove", "shorten"])
def test_a_damaged_artifact_is_noticed_when_it_is_asked_for(store_path: Path, harm: str) -> None:
    (file,) = files_like(store_path, "artifact-templates")
    match harm:
        case "flip":
            flip(file, 7)
        case "remove":
            file.unlink()
        case "shorten":
            file.write_bytes(file.read_bytes()[:-1])
    with LocalStore.open(store_path) as store:
        with pytest.raises(StoreDamaged, match="run 'attncache calibrate' again"):
            store.artifact("templates")
        assert store.artifact("corrections") == ARTIFACTS["corrections"]
        [problem] = store.verify().problems
        assert problem.startswith(f"{file.name}: ")
    with LocalStore.open(store_path, writable=True) as store:
        store.publish_plan(store.plan, {}, ARTIFACTS)
        assert store.artifact("templates") == ARTIFACTS["templates"]
        assert store.verify().ok


def test_dropping_damaged_entries_takes_effect_with_the_next_publication(store_path: Path) -> None:
    with LocalStore.open(store_path) as store:
        entry = store.manifest.entries[4]
    flip(store_path / f"maps-{entry.segment:06d}", entry.offset)
    with LocalStore.open(store_path, writable=True) as store:
        assert store.drop_damaged() == 1
        assert len(store.manifest.entries) == 11 and store.manifest.published is None
    # The writer ended before it published: everything is as it was.
    with LocalStore.open(store_path) as store:
        assert len(store.manifest.entries) == 12
        assert store.plan == {"layers": [1, 3]}
        assert store.artifact("templates") == ARTIFACTS["templates"]
    with LocalStore.open(store_path, writable=True) as store:
        store.drop_damaged()
        store.commit()
    with LocalStore.open(store_path) as store:
        assert len(store.manifest.entries) == 11 and store.verify().ok
        with pytest.raises(StoreError, match="built to its end"):
            _ = store.plan


def test_verify_finds_damage_behind_an_earlier_check(store_path: Path) -> None:
    with LocalStore.open(store_path) as store:
        assert store.verify().ok
        assert_same(load_one(store, 0), make_record(0))
        with (store_path / "maps-000000").open("r+b") as file:
            file.seek(store.manifest.entries[0].size - 1)
            file.write(b"\xff")
        assert [entry_id for entry_id, _ in store.verify().damaged] == [0]


def test_a_folder_deleted_while_open_is_no_crash(store_path: Path) -> None:
    writer = LocalStore.open(store_path, writable=True)
    with LocalStore.open(store_path) as store:
        assert_same(load_one(store, 0), make_record(0))
        shutil.rmtree(store_path)
        assert_same(load_one(store, 0), make_record(0))
        assert load_one(store, 11) is None
        assert store.stats().damaged == 1
        assert near(store, make_features(1))[0]
        assert not store.verify().ok
    writer.put(make_record(99))
    with pytest.raises(StoreError, match="commit"):
        writer.commit()
    writer.close()
