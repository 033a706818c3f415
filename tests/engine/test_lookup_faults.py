# SPDX-License-Identifier: Apache-2.0
"""Whose entries a lookup finds, what it keeps in memory, and what becomes of faults."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from batches import counted
from hypothesis import given, settings
from hypothesis import strategies as st
from lookup_samples import (
    CAUSAL,
    ENCODER_RECORDS,
    EVERY,
    EVERY_CAUSAL,
    LAYERS,
    LENGTHS,
    PROJECTOR,
    RECORDS,
    FakeStore,
    Layouts,
    assert_maps_of,
    begin,
    edit,
    faults,
    known,
    look_up,
    make_lookups,
    make_records,
    near,
    other_model,
    overlap,
    pooled,
    shared,
    tokens_of,
    unknown,
)

from attncache_vllm.engine import step
from attncache_vllm.engine.lookups import Lookups
from attncache_vllm.errors import StoreError, StoreTimeout
from attncache_vllm.store import (
    Neighbour,
    Overlap,
    Record,
    StoreHealth,
)
from attncache_vllm.tenants import SHARED_TENANT, tenant_of


def of_tenants(
    sequences: list[step.Sequence], tenants: Sequence[str | None]
) -> list[step.Sequence]:
    return [replace(s, tenant=tenant) for s, tenant in zip(sequences, tenants, strict=True)]


# -- tenants -----------------------------------------------------------------------------------

FIRST, SECOND = tenant_of("first"), tenant_of("second")


def test_each_sequence_is_looked_up_among_the_entries_of_its_tenant(fake_store: FakeStore) -> None:
    layouts: Layouts = {2: CAUSAL, 3: CAUSAL}
    plan = shared({"aligned": EVERY_CAUSAL, "neighbour": EVERY_CAUSAL})
    lookups = make_lookups(fake_store, plan, layouts)
    fake_store.records.update(make_records(layouts))
    fake_store.overlapping, fake_store.answers = [[], overlap(4)], [near(3), near(1)]
    asked = of_tenants([*known(edit(3, 1), edit(4, 20)), *unknown([20])], [FIRST, SECOND, ""])
    hits = look_up(lookups, asked)
    lookups._thread.shutdown()
    [by_tokens], [by_feature] = fake_store.asked_overlaps, fake_store.asked
    assert by_tokens["tenants"] == [FIRST, SECOND]
    # The second has what it needs.
    assert by_feature["tenants"] == [FIRST, ""]
    assert [hit.source if hit else None for hit in hits] == ["neighbour", "aligned", "neighbour"]


def test_a_sequence_of_whom_nobody_knows_finds_nothing(fake_store: FakeStore) -> None:
    lookups = make_lookups(fake_store, shared({"aligned": EVERY, "neighbour": EVERY}))
    fake_store.answers = [near(1)]
    asked = of_tenants([*known(edit(3, 1)), *unknown([20, 20])], [None, None, FIRST])
    hits = look_up(lookups, asked)
    assert fake_store.asked_overlaps == []
    [by_feature] = fake_store.asked
    assert by_feature["tenants"] == [FIRST]
    with torch.no_grad():
        own = PROJECTOR(pooled(3)).numpy()[2:]
    np.testing.assert_allclose(by_feature["features"], own, rtol=1e-3)
    assert hits[:2] == [None, None]
    assert_maps_of(hits[2], 1)
    # And asks for nothing.
    assert look_up(lookups, of_tenants(unknown([20]), [None])) == [None]
    lookups._thread.shutdown()
    assert len(fake_store.asked) == 1


class OwnedStore(FakeStore):
    """Has every entry for the tenant that ``owners`` says, and answers with the nearest first."""

    owners: dict[int, str]

    def lookup(self, *args: Any, tenants: Sequence[str], **kwargs: Any) -> list[list[Neighbour]]:
        return [near(*self._of(tenant)) for tenant in tenants]

    def overlaps(self, *args: Any, tenants: Sequence[str], **kwargs: Any) -> list[list[Overlap]]:
        return [overlap(*self._of(tenant)) for tenant in tenants]

    def _of(self, tenant: str) -> list[int]:
        return [entry_id for entry_id, owner in self.owners.items() if owner == tenant]


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_no_sequence_is_ever_served_from_an_entry_of_another_tenant(data: st.DataObject) -> None:
    tenants = st.sampled_from([SHARED_TENANT, FIRST, SECOND])
    store = OwnedStore([])
    store.owners = {entry_id: data.draw(tenants) for entry_id in LENGTHS}
    layouts: Layouts = {2: CAUSAL, 3: CAUSAL}
    store.records.update(make_records(layouts))
    plan = shared({"aligned": EVERY_CAUSAL, "neighbour": EVERY_CAUSAL}, gate=1.0)
    lookups = make_lookups(store, plan, layouts)
    # Several batches, so that the second finds resident what the first has loaded.
    for _ in range(2):
        texts = data.draw(st.lists(st.sampled_from(sorted(LENGTHS)), min_size=1, max_size=6))
        asked = known(*(tokens_of(entry_id) for entry_id in texts))
        asked = of_tenants(asked, [data.draw(st.none() | tenants) for _ in texts])
        for sequence, hit in zip(asked, look_up(lookups, asked), strict=True):
            for served in hit.served.values() if hit else ():
                lse = served.maps.lse
                assert lse is not None
                [entry_id] = set(lse.flatten().tolist())
                assert store.owners[int(entry_id)] == sequence.tenant
    lookups._thread.shutdown()


# -- memory ------------------------------------------------------------------------------------


def test_maps_in_memory_are_not_loaded_again(fake_store: FakeStore, lookups: Lookups) -> None:
    fake_store.answers = [near(1), near(3)]
    first = look_up(lookups, [20, 20])
    fake_store.answers = [near(3), near(4)]
    second = look_up(lookups, [20, 20])
    assert fake_store.loaded == [[1, 3], [4]]
    assert first[1] is not None and second[0] is not None
    assert all(second[0].served[i].maps is first[1].served[i].maps for i in LAYERS)
    held = lookups.resident.stats()
    assert held.entries == 3
    assert held.bytes == sum(
        served.maps.nbytes for hit in (*first, second[1]) if hit for served in hit.served.values()
    )


def test_memory_for_maps_is_bounded_by_the_settings(fake_store: FakeStore) -> None:
    lookups = make_lookups(fake_store, resident=2 * 2**20)
    assert lookups.resident.max_bytes == 2 * 2**20
    lookups._thread.shutdown()


# -- faults ------------------------------------------------------------------------------------


def without_layer(record: Record, layer: int) -> Record:
    return replace(record, maps={k: m for k, m in record.maps.items() if k != layer})


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        replace(RECORDS[3], codec="other"),
        other_model(RECORDS[3]),
        without_layer(RECORDS[3], 3),
        ENCODER_RECORDS[3],
    ],
    ids=["gone", "other codec", "other size", "other layers", "other mask"],
)
def test_a_record_that_cannot_be_used_is_a_miss_of_its_sequences_only(
    fake_store: FakeStore, lookups: Lookups, damaged: Record | None
) -> None:
    before = faults("damaged record")
    fake_store.answers = [near(3), near(1), near(3)]
    fake_store.records[3] = damaged
    hits = look_up(lookups, [20, 20, 20])
    assert hits[0] is hits[2] is None
    assert_maps_of(hits[1], 1)
    assert faults("damaged record") == before + 1
    # It is asked for again: what is damaged now may be mended by the next answer.
    fake_store.records[3] = RECORDS[3]
    assert_maps_of(look_up(lookups, [20, 20, 20])[0], 3)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (StoreError("no such folder"), "unavailable"),
        (StoreTimeout("busy"), "late"),
        (RuntimeError("a bug"), "internal"),
    ],
)
@pytest.mark.parametrize("call", ["lookup", "load", "overlaps", "token_ids"])
def test_a_fault_reaches_the_step_is_counted_and_ends_with_its_cause(
    fake_store: FakeStore, call: str, error: Exception, kind: str
) -> None:
    before = faults(kind)
    lookups = make_lookups(fake_store, shared({"aligned": EVERY, "neighbour": EVERY}))
    fake_store.answers, fake_store.overlapping = [near(1)], [[]]
    fake_store.fail[call] = error
    asked = known(tokens_of(0))
    future = begin(lookups, asked)
    assert future.exception(timeout=60) is error
    assert faults(kind) == before + 1
    fake_store.fail.clear()
    assert_maps_of(look_up(lookups, asked)[0], 1)
    lookups._thread.shutdown()


def test_what_is_wrong_with_shards_is_published_after_every_lookup(
    fake_store: FakeStore, lookups: Lookups
) -> None:
    def late() -> float:
        return counted("attncache_shard_faults_total", kind="late")

    before, fake_store.answers = late(), [near(1)]
    fake_store.troubles = StoreHealth({"late": 2}, 1)
    look_up(lookups, [20])
    assert (late() - before, counted("attncache_shards_out")) == (2, 1)
    fake_store.fail["lookup"] = StoreError("none is left")
    fake_store.troubles = StoreHealth({"late": 3}, 2)
    assert begin(lookups, [20]).exception(timeout=60)
    assert (late() - before, counted("attncache_shards_out")) == (3, 2)


def test_answers_that_do_not_fit_the_batch_are_a_fault(
    fake_store: FakeStore, lookups: Lookups
) -> None:
    before = faults("internal")
    fake_store.answers = [near(1)]
    assert isinstance(begin(lookups, [20, 20]).exception(timeout=60), ValueError)
    assert faults("internal") == before + 1


def test_a_slow_store_gets_no_second_lookup_until_it_has_answered(
    fake_store: FakeStore, lookups: Lookups
) -> None:
    fake_store.answers = [near(1)]
    fake_store.may_answer.clear()
    slow = begin(lookups, [20])
    assert lookups.start(unknown([20]), pooled(1), deadline=float("inf")) is None
    assert lookups.start(unknown([20]), pooled(1), deadline=float("inf")) is None
    fake_store.may_answer.set()
    assert_maps_of(slow.result(timeout=60)[0], 1)
    assert_maps_of(look_up(lookups, [20])[0], 1)
    assert len(fake_store.asked) == 2


class CountingStore(FakeStore):
    """Writes down how many threads torch would use for what a lookup computes."""

    def lookup(self, *args: Any, **kwargs: Any) -> list[list[Neighbour]]:
        self.threads = torch.get_num_threads()
        return super().lookup(*args, **kwargs)


@pytest.fixture
def many_threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_a_lookup_computes_with_a_thread_of_its_own_and_leaves_the_others_theirs(
    many_threads: int,
) -> None:
    store = CountingStore([[]])
    lookups = make_lookups(store)
    look_up(lookups, [20])
    assert store.threads == 1
    assert torch.get_num_threads() == many_threads
    with ThreadPoolExecutor(1) as another:
        assert another.submit(torch.get_num_threads).result() == many_threads
    lookups._thread.shutdown()
