# SPDX-License-Identifier: Apache-2.0
import math
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_samples import (
    ANY_LENGTH,
    ARTIFACTS,
    FEATURE_DIM,
    NAMESPACE,
    SHARED,
    assert_same,
    build_store,
    make_features,
    make_record,
    make_sketch,
    near,
)

from attncache_vllm.errors import NamespaceMismatch, StoreDamaged, StoreError, StoreTimeout
from attncache_vllm.store import MAX_LENGTH, LocalStore, Namespace, open_store
from attncache_vllm.store import manifest as manifest_module
from attncache_vllm.store import published as published_module
from attncache_vllm.store.index import FeatureIndex
from attncache_vllm.store.rearm import rearm, rearmed_at
from attncache_vllm.store.records import read_layout
from attncache_vllm.tenants import SHARED_TENANT, tenant_of

NEVER = math.inf


def load_one(store: LocalStore, entry_id: int) -> Any:
    return store.load([entry_id], deadline=NEVER)[0]


def files_like(path: Path, kind: str) -> list[Path]:
    return sorted(path.glob(f"{kind}-*"))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


# -- keeping records ---------------------------------------------------------------------------


def test_committed_records_are_there_after_reopening(store_path: Path) -> None:
    with LocalStore.open(store_path) as store:
        for number, record in enumerate(store.load(range(12), deadline=NEVER)):
            assert record is not None
            assert_same(record, make_record(number))
        assert [entry_id for entry_id, _ in store.records()] == list(range(12))
        assert store.manifest.build == {"texts": "sample"}
        assert (store.plan, store.projector_bytes) == ({"layers": [1, 3]}, b"projector")


def test_segments_roll_and_the_last_one_is_continued(store_path: Path) -> None:
    before = files_like(store_path, "maps")
    assert len(before) > 1
    with LocalStore.open(store_path, writable=True) as store:
        entry_id = store.put(make_record(99))
        store.commit()
        assert_same(load_one(store, entry_id), make_record(99))
    assert files_like(store_path, "maps") == before
    with LocalStore.open(store_path) as store:
        assert_same(load_one(store, 12), make_record(99))


def test_a_sequence_is_kept_once(tmp_path: Path) -> None:
    with LocalStore.create(tmp_path / "s", NAMESPACE, {}) as store:
        assert [store.put(make_record(n)) for n in (0, 1, 0)] == [0, 1, 0]
        assert store.has(make_record(1).token_hash)
        assert not store.has(make_record(2).token_hash)
        assert store.stats().entries == 2


def test_a_writer_reads_what_it_has_not_committed(tmp_path: Path) -> None:
    with LocalStore.create(tmp_path / "s", NAMESPACE, {}) as store:
        for number in range(3):
            assert_same(load_one(store, store.put(make_record(number))), make_record(number))


def test_what_was_not_committed_is_invisible_and_dropped(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with LocalStore.create(path, NAMESPACE, {}) as store:
        store.put(make_record(0))
        store.commit()
        committed = files_like(path, "maps")[0].stat().st_size
        store.put(make_record(1))
        assert LocalStore.open(path).stats().entries == 1
    assert files_like(path, "maps")[0].stat().st_size > committed
    with LocalStore.open(path, writable=True) as store:
        assert files_like(path, "maps")[0].stat().st_size == committed
        assert not store.has(make_record(1).token_hash)
        assert store.put(make_record(2)) == 1
        store.commit()
    with LocalStore.open(path) as store:
        assert_same(load_one(store, 1), make_record(2))


def test_a_record_that_cannot_be_stored_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    with LocalStore.create(tmp_path / "s", NAMESPACE, {}) as store:
        with pytest.raises(StoreError, match="length"):
            store.put(replace(make_record(0), length=0))
        assert store.put(make_record(1)) == 0


def test_loaded_records_outlive_their_store(store_path: Path) -> None:
    store = LocalStore.open(store_path)
    record = load_one(store, 3)
    store.close()
    store.close()
    assert_same(record, make_record(3))


@pytest.mark.parametrize(
    "use",
    [
        lambda s: s.load([0], deadline=NEVER),
        lambda s: near(s, make_features(1)),
        lambda s: s.put(make_record(0)),
        lambda s: s.commit(),
        lambda s: s.verify(),
        lambda s: s.plan,
        lambda s: s.projector_bytes,
        lambda s: s.artifact("templates"),
        lambda s: s.token_ids([0], deadline=NEVER),
        lambda s: s.overlaps([make_sketch(0)], tenants=SHARED, neighbours=1, deadline=NEVER),
        lambda s: s.publish_plan({}, {}, {}),
    ],
)
def test_a_closed_store_says_so(store_path: Path, use: Any) -> None:
    store = LocalStore.open(store_path)
    store.close()
    with pytest.raises(StoreError, match="closed"):
        use(store)


def test_a_reader_refuses_to_write(store_path: Path) -> None:
    with LocalStore.open(store_path) as store, pytest.raises(StoreError, match="writable=True"):
        store.put(make_record(99))


def test_an_unknown_entry_id_is_named(store_path: Path) -> None:
    with LocalStore.open(store_path) as store:
        for entry_id in (-1, 12):
            with pytest.raises(StoreError, match=f"from 0 to 11, got {entry_id}"):
                load_one(store, entry_id)
            with pytest.raises(StoreError, match=f"from 0 to 11, got {entry_id}"):
                store.token_ids([entry_id], deadline=NEVER)


# -- looking up --------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1 << 20),
    entries=st.integers(1, 300),
    queries=st.integers(0, 20),
    neighbours=st.integers(0, 6),
    longest_entry=st.sampled_from([1, 5, 60]),
)
def test_lookup_equals_brute_force(
    seed: int, entries: int, queries: int, neighbours: int, longest_entry: int
) -> None:
    random = np.random.default_rng(seed)
    features = random.normal(size=(entries, 5)).astype(np.float32)
    asked = random.normal(size=(queries, 5)).astype(np.float32)
    lengths = random.integers(1, longest_entry + 1, entries)
    # Exact lengths, open and closed ranges, empty ones, and ranges nothing is in.
    shortest = random.integers(1, longest_entry + 10, queries)
    kinds = [shortest, shortest + 5, shortest - 1, np.full(queries, MAX_LENGTH)]
    longest = np.choose(random.integers(0, len(kinds), queries), kinds)
    bounds = list(zip(shortest.tolist(), longest.tolist(), strict=True))
    index = FeatureIndex(features, lengths, "Flat")
    answers = index.search(asked, bounds, neighbours, NEVER)
    for query, (low, high), answer in zip(asked, bounds, answers, strict=True):
        distances = np.linalg.norm(features - query, axis=1)
        usable = [int(i) for i in np.argsort(distances) if low <= lengths[i] <= high]
        nearest = usable[:neighbours]
        assert [n.entry_id for n in answer] == nearest
        assert [n.length for n in answer] == lengths[nearest].tolist()
        np.testing.assert_allclose([n.distance for n in answer], distances[nearest], rtol=1e-6)


@pytest.mark.parametrize("far", [1, 2, 100, 400])
def test_far_entries_are_found_behind_many_that_are_too_short(far: int) -> None:
    features = np.arange(500, dtype=np.float32).reshape(500, 1)
    lengths = [10] * (500 - far) + [1000] * far
    index = FeatureIndex(features, lengths, "Flat")
    query = np.zeros((1, 1), np.float32)
    for bounds in ((11, MAX_LENGTH), (11, 1000), (1000, 1000)):
        (found,) = index.search(query, [bounds], 3, NEVER)
        assert [n.entry_id for n in found] == list(range(500 - far, 500))[:3]
    assert index.search(query, [(1001, MAX_LENGTH)], 3, NEVER) == [[]]
    assert index.search(query, [(11, 999)], 3, NEVER) == [[]]


def test_an_approximate_index_answers_in_order_and_with_the_right_length() -> None:
    features = make_features(400)
    lengths = np.arange(400) % 100 + 1
    index = FeatureIndex(features, lengths, "IVF4,SQ8")
    (answer,) = index.search(features[77:78], [(50, 90)], 5, NEVER)
    assert answer[0].entry_id == 77 and answer[0].distance == 0.0
    assert [n.distance for n in answer] == sorted(n.distance for n in answer)
    assert all(50 <= n.length <= 90 for n in answer)


def test_the_few_entries_of_one_length_are_all_found_whatever_the_index() -> None:
    features = make_features(400)
    lengths = np.arange(400) % 100 + 1
    index = FeatureIndex(features, lengths, "IVF16,SQ8")
    for query in range(400):
        (answer,) = index.search(features[query : query + 1], [(lengths[query],) * 2], 9, NEVER)
        same = np.flatnonzero(lengths == lengths[query])
        distances = np.linalg.norm(features[same] - features[query], axis=1)
        assert [n.entry_id for n in answer] == same[np.argsort(distances)].tolist()


@pytest.mark.parametrize("bounds", [(7, 7), (1, 9), (0, 9)])
def test_a_forgotten_entry_is_found_by_no_length(bounds: tuple[int, int]) -> None:
    features = make_features(90)
    index = FeatureIndex(features, np.arange(90) % 30 + 1, "Flat")
    query = features[36:37]  # its length is 7
    (before,) = index.search(query, [bounds], 90, NEVER)
    index.forget(36)
    index.forget(90)  # not indexed
    assert before[0].entry_id == 36
    assert index.search(query, [bounds], 90, NEVER) == [before[1:]]


def test_a_stored_feature_is_at_distance_zero_even_far_from_the_origin() -> None:
    features = make_features(64) + 1000
    index = FeatureIndex(features, [1] * 64, "Flat")
    answers = index.search(features, [ANY_LENGTH] * 64, 1, NEVER)
    assert [a[0].entry_id for a in answers] == list(range(64))
    assert all(a[0].distance == 0.0 for a in answers)


def test_a_search_leaves_the_number_of_threads_as_it_was() -> None:
    features = make_features(20)
    index = FeatureIndex(features, [1] * 20, "Flat")
    before = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(2)
        index.search(features, [ANY_LENGTH] * 20, 3, NEVER)
        assert faiss.omp_get_max_threads() == 2
    finally:
        faiss.omp_set_num_threads(before)


@pytest.mark.parametrize("factory", ["Flat", "IVF1,Flat"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("bounds", [ANY_LENGTH, (2, 2)])
def test_a_query_that_is_not_finite_has_no_neighbours(
    factory: str, value: float, bounds: tuple[int, int]
) -> None:
    features = make_features(50)
    index = FeatureIndex(features, [1] * 48 + [2] * 2, factory)
    queries = make_features(3)
    queries[1, 0] = value
    found = index.search(queries, [bounds] * 3, 2, NEVER)
    assert [len(neighbours) for neighbours in found] == [2, 0, 2]


def test_a_query_of_the_wrong_shape_is_named(store_path: Path) -> None:
    with LocalStore.open(store_path) as store:
        for shape in ((1, FEATURE_DIM + 1), (2, FEATURE_DIM), (FEATURE_DIM,)):
            with pytest.raises(StoreError, match="features must be"):
                store.lookup(
                    np.zeros(shape, np.float32),
                    [ANY_LENGTH],
                    tenants=SHARED,
                    neighbours=1,
                    deadline=NEVER,
                )


def test_late_calls_are_refused_and_counted(store_path: Path) -> None:
    with LocalStore.open(store_path) as store:
        past = time.monotonic() - 1
        with pytest.raises(StoreTimeout):
            near(store, make_features(1), deadline=past)
        with pytest.raises(StoreTimeout):
            store.load([0], deadline=past)
        with pytest.raises(StoreTimeout):
            store.token_ids([0], deadline=past)
        with pytest.raises(StoreTimeout):
            store.overlaps([make_sketch(0)], tenants=SHARED, neighbours=1, deadline=past)
        near(store, make_features(1), deadline=time.monotonic() + 60)
        stats = store.stats()
        assert (stats.lookups, stats.late, stats.damaged) == (2, 4, 0)


def test_late_loads_get_there_in_the_end(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each late call checks one of the record's five sections; none is checked twice."""
    checked = []
    from attncache_vllm.store import entries

    original = entries.check_section
    monkeypatch.setattr(
        entries, "check_section", lambda *args: (checked.append(args[1]), original(*args))
    )
    with LocalStore.open(store_path) as store:
        for _ in range(5):
            with pytest.raises(StoreTimeout):
                store.load([0], deadline=time.monotonic() - 1)
        assert_same(load_one(store, 0), make_record(0))
    assert len(checked) == len(set(checked)) == 5


# -- token ids and overlaps --------------------------------------------------------------------


def test_token_ids_are_read_without_the_rest_of_their_record(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attncache_vllm.store import entries

    checked, original = [], entries.check_section
    monkeypatch.setattr(
        entries, "check_section", lambda *args: (checked.append(args[1]), original(*args))
    )
    with LocalStore.open(store_path) as store:
        for _ in range(2):
            for number, found in zip((7, 0), store.token_ids([7, 0], deadline=NEVER), strict=True):
                assert found is not None and found.dtype == np.int32
                np.testing.assert_array_equal(found, make_record(number).token_ids)
        assert len(checked) == 2
        # A load goes on behind the section that is known to be sound.
        assert_same(load_one(store, 0), make_record(0))
        assert len(checked) == len(set(checked)) == 1 + 5


def test_token_ids_outlive_their_store(store_path: Path) -> None:
    with LocalStore.open(store_path) as store:
        [found] = store.token_ids([0], deadline=NEVER)
        (store_path / "maps-000000").write_bytes(b"")  # a view would kill the process now
    np.testing.assert_array_equal(found, make_record(0).token_ids)


def test_a_sequence_with_damaged_token_ids_is_found_by_nothing_again(store_path: Path) -> None:
    with LocalStore.open(store_path) as store:
        entry = store.manifest.entries[4]
        record = (store_path / f"maps-{entry.segment:06d}").read_bytes()[entry.offset :]
        start = read_layout(memoryview(record)[: entry.size]).token_ids.start
    flip(store_path / f"maps-{entry.segment:06d}", entry.offset + start)
    with LocalStore.open(store_path) as store:
        [[found]] = store.overlaps([make_sketch(4)], tenants=SHARED, neighbours=1, deadline=NEVER)
        assert found.entry_id == 4
        damaged, sound = store.token_ids([4, 5], deadline=NEVER)
        assert damaged is None and sound is not None
        assert load_one(store, 4) is None
        [found] = store.overlaps([make_sketch(4)], tenants=SHARED, neighbours=12, deadline=NEVER)
        assert {overlap.entry_id for overlap in found} == set(range(12)) - {4}
        query = make_features(12)[4:5]
        [found] = near(store, query, neighbours=12)
        assert {n.entry_id for n in found} == set(range(12)) - {4}
        assert store.stats().damaged == 1


def test_overlaps_come_from_the_sketches_of_published_entries(store_path: Path) -> None:
    with LocalStore.open(store_path, writable=True) as store:
        store.put(make_record(12))
        store.commit()
    with LocalStore.open(store_path) as store:
        asked = [make_sketch(number) for number in (12, 3, 6)]
        answers = store.overlaps(asked, tenants=SHARED * 3, neighbours=99, deadline=NEVER)
        for query, answer in zip(asked, answers, strict=True):
            # One value is in every sketch.
            assert {overlap.entry_id for overlap in answer} == set(range(12))
            for overlap in answer:
                stored = make_record(overlap.entry_id)
                common = np.intersect1d(stored.sketch, query)
                assert (overlap.common, overlap.length) == (len(common), stored.length)
        assert [answer[0].entry_id for answer in answers] == [0, 3, 6]


# -- tenants -----------------------------------------------------------------------------------


def test_only_the_shared_tenant_finds_what_is_in_a_folder(store_path: Path) -> None:
    with LocalStore.open(store_path) as store:
        queries, sketches = make_features(12), [make_sketch(number) for number in range(12)]
        nearest = near(store, queries, neighbours=3)
        alike = store.overlaps(sketches, tenants=SHARED * 12, neighbours=3, deadline=NEVER)
        assert all(nearest) and all(alike)
        # Whoever asks beside it, the shared tenant is answered as if it asked alone.
        tenants = [SHARED_TENANT, tenant_of("secret")] * 6
        found = store.lookup(
            queries, [ANY_LENGTH] * 12, tenants=tenants, neighbours=3, deadline=NEVER
        )
        assert found[::2] == nearest[::2]
        assert found[1::2] == [[]] * 6
        shared = store.overlaps(sketches, tenants=tenants, neighbours=3, deadline=NEVER)
        assert shared[::2] == alike[::2]
        assert shared[1::2] == [[]] * 6


def test_each_query_must_have_a_tenant(store_path: Path) -> None:
    with LocalStore.open(store_path) as store:
        for use in (
            lambda: store.lookup(
                make_features(2), [ANY_LENGTH] * 2, tenants=SHARED, neighbours=1, deadline=NEVER
            ),
            lambda: store.overlaps([], tenants=SHARED, neighbours=1, deadline=NEVER),
        ):
            with pytest.raises(StoreError, match="must have a tenant, got 1"):
                use()


# -- what a server asks ------------------------------------------------------------------------


def test_a_server_is_started_on_the_store_of_a_folder(store_path: Path) -> None:
    for address in (str(store_path), store_path):
        store = open_store(address, NAMESPACE)
        assert isinstance(store, LocalStore)
        assert (store.namespace, store.build) == (NAMESPACE, {"texts": "sample"})
        assert store.rearmed_at() == 0
        rearm(store_path)
        assert store.rearmed_at() == rearmed_at(store_path) > 0
        (store_path / "rearmed").unlink()
        store.close()
    with pytest.raises(NamespaceMismatch):
        open_store(store_path, replace(NAMESPACE, weights="1f" * 32))


def test_a_folder_may_have_the_name_of_an_address(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_path.rename(tmp_path / "ray:auto")
    monkeypatch.chdir(tmp_path)
    store = open_store(Path("ray:auto"))
    assert isinstance(store, LocalStore) and store.stats().entries == 12
    store.close()


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


# -- damage ------------------------------------------------------------------------------------


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
