# SPDX-License-Identifier: Apache-2.0
"""An embedded store: what is kept, and what is found by its feature."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_store_samples import (
    NEVER,
    files_like,
    load_one,
)
from store_samples import (
    ANY_LENGTH,
    FEATURE_DIM,
    NAMESPACE,
    SHARED,
    assert_same,
    make_features,
    make_record,
    make_sketch,
    near,
)

from attncache_vllm.errors import StoreError, StoreTimeout
from attncache_vllm.store import MAX_LENGTH, LocalStore
from attncache_vllm.store.index import FeatureIndex

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
