# SPDX-License-Identifier: Apache-2.0
"""An embedded store on disk: publishing and opening."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_store_samples import (
    NEVER,
    files_like,
    load_one,
)
from store_samples import (
    ARTIFACTS,
    NAMESPACE,
    SHARED,
    assert_same,
    build_store,
    make_features,
    make_record,
    make_sketch,
    near,
)

from attncache_vllm.errors import NamespaceMismatch, StoreDamaged, StoreError
from attncache_vllm.store import LocalStore, Namespace
from attncache_vllm.store import manifest as manifest_module
from attncache_vllm.store import published as published_module

# -- publishing --------------------------------------------------------------------------------


def test_before_a_publication_there_is_nothing_to_look_up(tmp_path: Path) -> None:
    with LocalStore.create(tmp_path / "s", NAMESPACE, {}) as store:
        store.put(make_record(0))
        assert store.artifact("templates") is None
        for use in (
            lambda: store.overlaps([make_sketch(0)], tenants=SHARED, neighbours=1, deadline=NEVER),
            lambda: store.publish_plan({}, {}, {}),
            lambda: store.plan,
            lambda: store.projector_bytes,
            lambda: near(store, make_features(1)),
        ):
            with pytest.raises(StoreError, match="built to its end"):
                use()


@pytest.mark.parametrize(
    ("features", "factory", "rule"),
    [
        (make_features(2), "Flat", "one row for each of 3"),
        (np.zeros(3, np.float32), "Flat", "one row for each of 3"),
        (np.full((3, 2), np.inf, np.float32), "Flat", "finite"),
        (make_features(3), "Nonsense", "got 'Nonsense'"),
        (make_features(3), "IVF64,Flat", "got 'IVF64,Flat'"),
    ],
)
def test_what_cannot_be_published_is_refused(
    tmp_path: Path, features: np.ndarray, factory: str, rule: str
) -> None:
    with LocalStore.create(tmp_path / "s", NAMESPACE, {}) as store:
        for number in range(3):
            store.put(make_record(number))
        with pytest.raises(StoreError, match=rule):
            store.publish({}, b"", {}, features, factory)
        assert store.manifest.published is None


def test_a_plan_that_is_not_plain_data_is_refused(tmp_path: Path) -> None:
    with LocalStore.create(tmp_path / "s", NAMESPACE, {}) as store:
        store.put(make_record(0))
        for plan in ({"x": object()}, {1: "integer key"}):
            with pytest.raises(StoreError, match="plan must be plain data"):
                store.publish(plan, b"", {}, make_features(1))


def test_publishing_again_replaces_the_files_under_a_reader(store_path: Path) -> None:
    reader = LocalStore.open(store_path)
    with LocalStore.open(store_path, writable=True) as writer:
        writer.publish(
            {"layers": []}, b"another", {}, -make_features(12), artifacts={"templates": b"new"}
        )
    for kind in ("projector", "features", "sketches", "artifact-templates"):
        assert len(files_like(store_path, kind)) == 1
    assert files_like(store_path, "artifact-corrections") == []
    query = make_features(12)[5:6]
    assert near(reader, query)[0][0].entry_id == 5
    assert_same(load_one(reader, 5), make_record(5))
    assert reader.projector_bytes == b"projector"
    [overlaps] = reader.overlaps([make_sketch(5)], tenants=SHARED, neighbours=1, deadline=NEVER)
    assert overlaps[0].entry_id == 5
    # Artifacts are read when they are asked for; what was replaced is refused, not mistaken.
    with pytest.raises(StoreDamaged, match="if it was replaced meanwhile open the store again"):
        reader.artifact("templates")
    with LocalStore.open(store_path) as store:
        assert store.projector_bytes == b"another"
        assert (store.artifact("templates"), store.artifact("corrections")) == (b"new", None)


def test_a_plan_is_published_with_its_artifacts_and_keeps_the_rest(store_path: Path) -> None:
    kept = {path.name for path in store_path.iterdir() if "artifact" not in path.name}
    with LocalStore.open(store_path, writable=True) as store:
        before = store.manifest.published
        new = {"templates": b"new", "corrections": ARTIFACTS["corrections"]}
        store.publish_plan({"layers": [3]}, {"calibration": [0.5]}, new)
        assert (store.plan, store.artifact("templates")) == ({"layers": [3]}, b"new")
        # Nothing more than what was there and is needed still.
        assert {path.name for path in store_path.iterdir() if "artifact" not in path.name} == kept
    with LocalStore.open(store_path) as store:
        published = store.manifest.published
        assert (published.plan, published.report) == ({"layers": [3]}, {"calibration": [0.5]})
        assert {name: store.artifact(name) for name in published.artifacts} == new
        assert len(files_like(store_path, "artifact")) == 2
        assert before is not None
        unchanged = replace(
            published, plan=before.plan, report=before.report, artifacts=before.artifacts
        )
        assert unchanged == before
        assert store.verify().ok
        found = near(store, make_features(12))
        assert [neighbours[0].entry_id for neighbours in found] == list(range(12))


@pytest.mark.parametrize(
    "name", ["", "Templates", "../templates", "templates-1", "a b", "a" * 33, "maps\n", 1]
)
def test_an_artifact_without_a_good_name_is_refused(store_path: Path, name: Any) -> None:
    before = {path.name for path in store_path.iterdir()}
    with LocalStore.open(store_path, writable=True) as store:
        for publish in (
            lambda: store.publish_plan({}, {}, {name: b""}),
            lambda: store.publish({}, b"", {}, make_features(12), artifacts={name: b""}),
        ):
            with pytest.raises(StoreError, match="1 to 32 letters from a to z"):
                publish()
        assert store.artifact(name) is None
        assert store.plan == {"layers": [1, 3]}
    LocalStore.open(store_path, writable=True).close()  # clears away what was written
    assert {path.name for path in store_path.iterdir()} == before


def test_an_empty_artifact_is_not_a_missing_one(store_path: Path) -> None:
    with LocalStore.open(store_path, writable=True) as store:
        store.publish_plan({}, {}, {"templates": b""})
    with LocalStore.open(store_path) as store:
        assert (store.artifact("templates"), store.artifact("corrections")) == (b"", None)


def test_opening_during_a_publication_gets_the_new_state(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest is read, then replaced with its files before these are read."""
    original = published_module.load_published

    def publish_first(*args: Any) -> Any:
        monkeypatch.setattr(published_module, "load_published", original)
        with LocalStore.open(store_path, writable=True) as writer:
            writer.publish({}, b"another", {}, -make_features(12))
        return original(*args)

    monkeypatch.setattr(published_module, "load_published", publish_first)
    with LocalStore.open(store_path) as store:
        assert store.projector_bytes == b"another"


def test_entries_put_after_the_publication_are_kept_but_not_found(store_path: Path) -> None:
    with LocalStore.open(store_path, writable=True) as store:
        store.put(make_record(12))
        store.commit()
    with LocalStore.open(store_path) as store:
        found = near(store, make_features(1), neighbours=99)[0]
        assert {n.entry_id for n in found} == set(range(12))
        assert_same(load_one(store, 12), make_record(12))
        report = store.verify()
        assert report.ok and report.unpublished == 1


# -- opening -----------------------------------------------------------------------------------


def test_another_namespace_is_refused_with_every_difference(store_path: Path) -> None:
    other = replace(NAMESPACE, dtype="float16", num_heads=8, model="renamed")
    with pytest.raises(NamespaceMismatch) as caught:
        LocalStore.open(store_path, namespace=other)
    assert "dtype: store has 'bfloat16', server has 'float16'" in str(caught.value)
    assert "num_heads: store has 9, server has 8" in str(caught.value)
    assert "renamed" not in str(caught.value)


def test_the_name_of_the_model_does_not_matter(store_path: Path) -> None:
    renamed = replace(NAMESPACE, model="/elsewhere/model")
    LocalStore.open(store_path, namespace=renamed).close()
    assert renamed.digest() == NAMESPACE.digest()
    assert replace(NAMESPACE, rope="scaled").digest() != NAMESPACE.digest()


@pytest.mark.parametrize(
    "change",
    [{"dtype": 3}, {"num_heads": "9"}, {"num_heads": True}, {"num_heads": 0}, {"extra": 1}],
)
def test_a_namespace_is_read_strictly(change: dict[str, Any]) -> None:
    assert Namespace.from_dict(NAMESPACE.to_dict()) == NAMESPACE
    with pytest.raises(ValueError, match="must"):
        Namespace.from_dict({**NAMESPACE.to_dict(), **change})


def test_a_folder_that_is_no_store_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("text")
    for writable in (False, True):
        for path in (tmp_path, tmp_path / "missing", tmp_path / "precious"):
            with pytest.raises(StoreError, match="attncache build"):
                LocalStore.open(path, writable=writable)
    with pytest.raises(StoreError, match="'precious' in it"):
        LocalStore.create(tmp_path, NAMESPACE, {})
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_store_is_not_created_over_another(store_path: Path) -> None:
    with pytest.raises(StoreError, match="open it instead"):
        LocalStore.create(store_path, NAMESPACE, {})


def test_foreign_files_survive_cleaning(store_path: Path) -> None:
    stale = [
        "maps-000099",
        "features-0123456789abcdef",
        "sketches-0123456789abcdef",
        "artifact-templates-0123456789abcdef",
        "artifact-templates-0123456789abcdef.tmp",
        "manifest.tmp",
    ]
    foreign = ["README", "maps-backup", "notes-0123456789abcdef", "artifact-mine"]
    for name in stale + foreign:
        (store_path / name).write_text("text")
    LocalStore.open(store_path, writable=True).close()
    names = {path.name for path in store_path.iterdir()}
    assert names.isdisjoint(stale)
    assert names.issuperset(foreign)


@pytest.mark.parametrize("version", [2, 4])
def test_an_older_or_newer_format_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    with monkeypatch.context() as later:
        later.setattr(manifest_module, "FORMAT_VERSION", version)
        build_store(tmp_path / "s", 1)
    with pytest.raises(StoreError, match=f"must be 3, got {version}; .* build it again") as caught:
        LocalStore.open(tmp_path / "s")
    assert not isinstance(caught.value, StoreDamaged)


def test_two_writers_are_refused_and_readers_are_not(store_path: Path) -> None:
    script = (
        "import sys; from attncache_vllm.store import LocalStore\n"
        "LocalStore.open(sys.argv[1], writable=True)"
    )
    with LocalStore.open(store_path, writable=True):
        with pytest.raises(StoreError, match="one writer"):
            LocalStore.open(store_path, writable=True)
        other = subprocess.run(
            [sys.executable, "-c", script, str(store_path)], capture_output=True, text=True
        )
        assert other.returncode == 1 and "one writer" in other.stderr
        LocalStore.open(store_path).close()
    LocalStore.open(store_path, writable=True).close()


def test_many_threads_may_read(store_path: Path) -> None:
    features = make_features(12)

    def use(number: int) -> None:
        entry_id = number % 12
        query = features[entry_id : entry_id + 1]
        found = near(store, query)
        assert found[0][0].entry_id == entry_id
        assert_same(load_one(store, entry_id), make_record(entry_id))

    with LocalStore.open(store_path) as store, ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(400)))
        assert store.stats().lookups == 400
