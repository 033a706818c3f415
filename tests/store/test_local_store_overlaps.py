# SPDX-License-Identifier: Apache-2.0
"""An embedded store: what is found by its tokens, for whom, and what a server asks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from local_store_samples import (
    NEVER,
    flip,
    load_one,
)
from store_samples import (
    ANY_LENGTH,
    NAMESPACE,
    SHARED,
    assert_same,
    make_features,
    make_record,
    make_sketch,
    near,
)

from attncache_vllm.errors import NamespaceMismatch, StoreError
from attncache_vllm.store import LocalStore, open_store
from attncache_vllm.store.rearm import rearm, rearmed_at
from attncache_vllm.store.records import read_layout
from attncache_vllm.tenants import SHARED_TENANT, tenant_of

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
