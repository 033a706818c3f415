# SPDX-License-Identifier: Apache-2.0
"""Missed texts that are recorded while others are served: which, when, and that their maps are
those of a build. Models and stores are small; the store's growth is set by the test."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attention_samples import Shape, make_config, make_model, run_model, text, whole
from batches import counted
from recorded_stores import (
    IDS,
    LAYOUT,
    RECORD,
    TEXTS,
    WHOLE,
    plan_of,
    publish,
    recorded,
    settings,
    with_templates,
)
from torch import Tensor

from attncache_vllm.engine import startup
from attncache_vllm.engine.admit import MAP_CELLS, RECORD_CELLS, Admissions
from attncache_vllm.engine.background import thread_beside_forward
from attncache_vllm.engine.modules import find_attention_modules
from attncache_vllm.engine.record import RecorderExtension
from attncache_vllm.engine.runtime import Serving, serving_of
from attncache_vllm.engine.startup import attach
from attncache_vllm.engine.step import Recording, Sequence
from attncache_vllm.errors import SettingsError
from attncache_vllm.reuse.codecs import decode_blocks
from attncache_vllm.reuse.feature import Projector
from attncache_vllm.reuse.plan import Plan, SourcePlan
from attncache_vllm.store import GrowingStore, LocalStore, Record, open_store, token_hash
from attncache_vllm.tenants import SHARED_TENANT, tenant_of

# The package silences it where it is loaded; pytest has filters of its own.
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")

OFTEN = 6e9  # texts a minute
NEW = text(9, 33)
NEW_IDS = np.arange(50_000, 50_033, dtype=np.int32)
ALIGNED = plan_of(aligned=SourcePlan(WHOLE, 0.3))
# Of maps in the default codec, whose cells have 8 bits.
CELL = 0.01


class Growing:
    """A ``GrowingStore``: what a folder holds, and what is admitted, which is not found yet."""

    def __init__(self, path: Path) -> None:
        self._store = LocalStore.open(path)
        self.admitted: list[tuple[Record, np.ndarray, str]] = []
        self.unwanted: set[tuple[bytes, str]] = set()
        self.fault: Exception | None = None
        self.may_admit = threading.Event()
        self.may_admit.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def wants(self, digest: bytes, tenant: str) -> bool:
        return (digest, tenant) not in self.unwanted

    def admit(self, record: Record, feature: np.ndarray, tenant: str) -> bool:
        assert self.may_admit.wait(60)
        if self.fault is not None:
            raise self.fault
        self.admitted.append((record, feature, tenant))
        return True


Start = Callable[..., tuple[Any, Growing]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """A model that serves from a store that grows."""
    stores = []

    def start(plan: Plan = ALIGNED, **changes: Any) -> tuple[Any, Growing]:
        path = tmp_path / "store"
        if "template" in plan.sources:
            with_templates(path, plan)
        else:
            publish(recorded(path), plan)
        store = Growing(path)
        stores.append(store)
        monkeypatch.setattr(startup, "open_store", lambda *asked: store)
        given: dict[str, Any] = {"admit_per_minute": OFTEN, **changes.pop("settings", {})}
        model = make_model()
        attach(model, make_config(settings("ray:auto", **given), **changes))
        return model, store

    yield start
    for store in stores:
        store.may_admit.set()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Outcomes:
    """What the counters of admissions and of recorded misses grow by."""

    NAMES = ("recorded", "failed")

    def __init__(self) -> None:
        self._before = self._now()

    @property
    def since(self) -> dict[str, float]:
        now = self._now()
        return {n: now[n] - was for n, was in self._before.items() if now[n] - was}

    def _now(self) -> dict[str, float]:
        counts = {n: counted("attncache_admissions_total", outcome=n) for n in self.NAMES}
        return {**counts, "misses": counted("attncache_misses_total", reason="recorded")}


def exact(rows: Tensor) -> Tensor:
    return run_model(make_model(), [whole(rows)])


def built(path: Path, rows: Tensor, ids: np.ndarray) -> Record:
    """What a build records of a text."""
    model = make_model()
    attach(model, make_config(settings(path, record=RECORD)))
    run_model(model, [whole(rows)])
    worker = RecorderExtension()
    worker.attncache_commit(ids.tolist())
    worker.attncache_close()
    with LocalStore.open(path, writable=True) as store:
        ((_, record),) = store.records()
        return Record(**{**vars(record), "maps": {i: m.copy() for i, m in record.maps.items()}})


def assert_maps_agree(record: Record, expected: Record) -> None:
    assert record.maps.keys() == expected.maps.keys()
    for layer in expected.maps:
        found, same = (
            decode_blocks(r.codec, torch.tensor(r.maps[layer]), LAYOUT, r.length)
            for r in (record, expected)
        )
        torch.testing.assert_close(found.to_dense(), same.to_dense(), atol=CELL, rtol=0)
        torch.testing.assert_close(found.lse, same.lse)


# -- what is recorded --------------------------------------------------------------------------

INSIDE = {
    "settings": {"reuse_with_prefix_caching": True},
    "cache_config__enable_prefix_caching": True,
}


@pytest.mark.parametrize("changes", [{}, INSIDE], ids=["around the module", "inside"])
def test_a_missed_text_is_answered_exactly_and_recorded_as_by_a_build(
    start: Start, tmp_path: Path, changes: dict[str, Any]
) -> None:
    model, store = start(**changes)
    assert isinstance(store, GrowingStore)
    outcomes, tenant = Outcomes(), tenant_of("secret")
    assert torch.equal(run_model(model, [whole(NEW, NEW_IDS, tenant)]), exact(NEW))
    eventually(lambda: "recorded" in outcomes.since)
    assert outcomes.since == {"recorded": 1, "misses": 1}
    ((record, feature, whose),) = store.admitted
    assert whose == tenant
    expected = built(tmp_path / "built", NEW, NEW_IDS)
    for name in ("token_hash", "length", "codec"):
        assert getattr(record, name) == getattr(expected, name)
    for name in ("token_ids", "sketch"):
        assert np.array_equal(getattr(record, name), getattr(expected, name))
    assert np.array_equal(record.pooled.astype(np.float16), expected.pooled.astype(np.float16))
    for layer, encoded in expected.maps.items():
        assert np.array_equal(record.maps[layer], encoded)
    with torch.inference_mode():
        projected = Projector.from_bytes(store.projector_bytes)(torch.tensor(expected.pooled)[None])
    np.testing.assert_allclose(feature, projected[0].numpy(), rtol=1e-5)
    assert feature.dtype == np.float32


def test_what_was_admitted_serves_the_text_that_it_was_recorded_from(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, store = start()
    run_model(model, [whole(NEW, NEW_IDS)])
    eventually(lambda: len(store.admitted) == 1)
    path = tmp_path / "store"
    store.close()
    monkeypatch.setattr(startup, "open_store", open_store)
    with LocalStore.open(path, writable=True) as opened:
        opened.put(store.admitted[0][0])
        opened.commit()
    model = make_model()
    attach(model, make_config(settings(publish(path, ALIGNED))))
    hits = counted("attncache_hits_total", source="aligned")
    answer, expected = run_model(model, [whole(NEW, NEW_IDS)]), exact(NEW)
    assert counted("attncache_hits_total", source="aligned") == hits + 1
    assert 0 < ((answer - expected).norm() / expected.norm()).item() <= CELL


@pytest.mark.parametrize("changes", [{}, INSIDE], ids=["around the module", "inside"])
def test_in_a_batch_it_is_the_sequence_whose_maps_are_recorded(
    start: Start, tmp_path: Path, changes: dict[str, Any]
) -> None:
    model, store = start(**changes)
    rows = [
        whole(TEXTS[2], IDS[2]),
        whole(text(6, 3)),
        whole(NEW, NEW_IDS),
        whole(TEXTS[0], IDS[0]),
    ]
    answers = run_model(model, rows).split([len(row.text) for row in rows])
    torch.testing.assert_close(answers[2], exact(NEW), rtol=1e-4, atol=1e-4)
    eventually(lambda: len(store.admitted) == 1)
    expected = built(tmp_path / "built", NEW, NEW_IDS)
    assert store.admitted[0][0].token_hash == expected.token_hash
    assert_maps_agree(store.admitted[0][0], expected)


def test_layers_that_no_entry_serves_are_not_recorded(start: Start) -> None:
    groups: tuple[tuple[int, ...], ...] = ((), (), (1,))
    plan = plan_of(aligned=SourcePlan(groups, 0.3), template=SourcePlan(((), (0, 1), (0, 1))))
    model, store = start(plan)
    run_model(model, [whole(NEW, NEW_IDS)])
    eventually(lambda: len(store.admitted) == 1)
    assert list(store.admitted[0][0].maps) == [2]


def test_a_text_that_templates_would_serve_is_computed_exactly_while_it_is_recorded(
    start: Start,
) -> None:
    part = SourcePlan(WHOLE, 0.3)
    model, store = start(plan_of(aligned=part, template=SourcePlan(WHOLE)))
    hits, outcomes = counted("attncache_hits_total", source="template"), Outcomes()
    assert torch.equal(run_model(model, [whole(NEW, NEW_IDS)]), exact(NEW))
    eventually(lambda: len(store.admitted) == 1)
    assert outcomes.since["misses"] == 1
    store.unwanted.add((token_hash(NEW_IDS), SHARED_TENANT))
    assert not torch.equal(run_model(model, [whole(NEW, NEW_IDS)]), exact(NEW))
    assert counted("attncache_hits_total", source="template") == hits + 1


def test_a_step_records_one_text(start: Start) -> None:
    model, _ = start()
    nothing = counted("attncache_misses_total", reason="nothing close enough")
    outcomes = Outcomes()
    run_model(model, [whole(NEW, NEW_IDS), whole(text(8, 20), NEW_IDS[:20] + 100)])
    eventually(lambda: "recorded" in outcomes.since)
    assert outcomes.since == {"recorded": 1, "misses": 1}
    assert counted("attncache_misses_total", reason="nothing close enough") == nothing + 1


def test_a_text_that_is_stored_or_not_wanted_or_unknown_is_not_recorded(start: Start) -> None:
    model, store = start()
    outcomes = Outcomes()
    store.unwanted.add((token_hash(NEW_IDS), SHARED_TENANT))
    run_model(model, [whole(NEW, NEW_IDS)])
    run_model(model, [whole(TEXTS[1], IDS[1])])  # a hit
    run_model(model, [whole(NEW)])  # without token ids
    run_model(model, [whole(NEW, NEW_IDS, None)])  # nobody's
    run_model(model, [whole(NEW[:3], NEW_IDS[:3])])  # below min_tokens
    assert outcomes.since == {}


def test_nothing_is_recorded_unless_asked_for(start: Start) -> None:
    model, _ = start(settings={"admit_per_minute": 0})
    run_model(model, [whole(NEW, NEW_IDS)])
    assert serving(model).admissions is None
    kinds = {type(layer.self_attn.attn.attncache_scores) for layer in model.model.layers[1:]}
    assert kinds == {startup.ReuseScores}


# -- when --------------------------------------------------------------------------------------


def serving(model: Any) -> Serving:
    layers = {str(i): layer.self_attn.attn for i, layer in enumerate(model.model.layers)}
    config: Any = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    found = serving_of(config)
    assert found is not None
    return found


class Direct:
    """Admissions without a forward pass: layers 1 and 2 of the small model, a clock of the test."""

    def __init__(self, path: Path, per_minute: float = 2.0) -> None:
        self.store: Any = Growing(path)
        self.now = 1000.0
        self.model = make_model()
        modules = {f.index: f for f in find_attention_modules(self.model) if f.index}
        projector = Projector.from_bytes(self.store.projector_bytes)
        self.admissions = Admissions(
            self.store, projector, modules, per_minute, clock=lambda: self.now
        )

    def begin(self, length: int = 9, seed: int = 0) -> Recording | None:
        ids = np.arange(seed, seed + length, dtype=np.int32)
        return self.admissions.begin(
            Sequence(0, 0, length, ids, SHARED_TENANT), torch.randn(4, Shape.hidden)
        )

    def keep(self, recording: Recording, layer: int) -> None:
        length, shape = recording.sequence.length, Shape()
        self.admissions.keep(
            recording,
            layer,
            torch.randn(length, shape.heads, shape.head_size),
            torch.randn(length, shape.kv_heads, shape.head_size),
        )

    def record(self, seed: int) -> None:
        recording, before = self.begin(seed=seed), len(self.store.admitted)
        assert recording is not None
        for layer in (1, 2):
            self.keep(recording, layer)
        eventually(lambda: len(self.store.admitted) > before)


@pytest.fixture
def direct(tmp_path: Path) -> Direct:
    return Direct(publish(recorded(tmp_path / "store"), ALIGNED))


def test_texts_are_recorded_at_most_so_often_and_what_was_not_used_is_not_saved_up(
    direct: Direct,
) -> None:
    assert direct.admissions.ready()
    direct.record(0)
    eventually(lambda: not direct.admissions._busy)
    assert not direct.admissions.ready()
    direct.now += 29.9
    assert not direct.admissions.ready()
    direct.now += 600.0
    assert direct.admissions.ready()
    direct.record(1)
    eventually(lambda: not direct.admissions._busy)
    assert not direct.admissions.ready()


def test_a_text_that_is_not_recorded_costs_no_turn(direct: Direct) -> None:
    direct.store.unwanted.add((token_hash(np.arange(9, dtype=np.int32)), SHARED_TENANT))
    assert direct.begin() is None
    assert direct.admissions.ready()


def test_none_is_recorded_while_the_one_before_is_worked_on(direct: Direct) -> None:
    direct.store.may_admit.clear()
    recording = direct.begin()
    assert recording is not None
    for layer in (1, 2):
        direct.keep(recording, layer)
    direct.now += 600
    assert not direct.admissions.ready()
    direct.store.may_admit.set()
    eventually(direct.admissions.ready)


def test_copies_are_given_back_as_soon_as_they_are_encoded(direct: Direct) -> None:
    recording = direct.begin()
    assert recording is not None
    query = torch.zeros(9, Shape.heads, Shape.head_size)
    direct.admissions.keep(recording, 1, query, query[:, : Shape.kv_heads])
    query += 1  # the forward goes on, and reuses the memory
    assert not recording.scores[1][0].any()
    direct.keep(recording, 2)
    direct.keep(recording, 2)  # a layer that runs twice
    eventually(lambda: len(direct.store.admitted) == 1)
    assert recording.scores == {}


def test_a_text_whose_maps_would_not_fit_memory_is_left_alone(direct: Direct) -> None:
    longest = max(
        n
        for n in range(1, 8000)
        if Shape.heads * n * n <= MAP_CELLS and 2 * Shape.heads * n * (n + 1) // 2 <= RECORD_CELLS
    )
    assert direct.begin(longest + 1) is None
    assert direct.begin(longest) is not None


# -- faults ------------------------------------------------------------------------------------


def test_what_fails_behind_a_request_is_counted_and_the_next_text_is_recorded(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    model, store = start()
    store.fault = RuntimeError("no way")
    outcomes = Outcomes()
    with caplog.at_level(logging.WARNING, logger="vllm.attncache_vllm"):
        for count in (1, 2):
            assert torch.equal(run_model(model, [whole(NEW, NEW_IDS)]), exact(NEW))
            eventually(lambda count=count: outcomes.since.get("failed") == count)
    assert [r.getMessage() for r in caplog.records] == [
        "attncache: a text could not be recorded: no way"
    ]
    store.fault = None
    run_model(model, [whole(NEW, NEW_IDS)])
    eventually(lambda: "recorded" in outcomes.since)
    assert outcomes.since == {"failed": 2, "recorded": 1, "misses": 3}


def test_a_copy_that_fails_fails_no_request(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    model, store = start()
    outcomes = Outcomes()

    def fail(*given: object) -> None:
        raise MemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr(Admissions, "keep", fail)
        assert torch.equal(run_model(model, [whole(NEW, NEW_IDS)]), exact(NEW))
    assert outcomes.since["misses"] == 1 and outcomes.since["failed"] >= 1
    run_model(model, [whole(NEW, NEW_IDS)])
    eventually(lambda: len(store.admitted) == 1)


def test_a_text_whose_step_did_not_end_makes_room_for_the_next(direct: Direct) -> None:
    outcomes, recording = Outcomes(), direct.begin()
    assert recording is not None
    direct.keep(recording, 1)
    direct.now += 600
    assert direct.admissions.ready()
    assert outcomes.since == {"failed": 1}
    direct.keep(recording, 2)  # too late
    direct.record(1)
    assert direct.store.admitted[0][0].token_ids[0] == 1


def test_a_plan_that_serves_from_templates_only_is_refused(start: Start) -> None:
    with pytest.raises(SettingsError, match=r"serves nothing from entries, got 1\.0 and the sou"):
        start(plan_of(template=SourcePlan(WHOLE)), settings={"admit_per_minute": 1.0})


def test_entries_that_would_lack_a_layer_of_the_plan_are_not_admitted(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = make_model()
    made.model.layers[1].self_attn.attn.has_sink = True
    monkeypatch.setitem(globals(), "make_model", lambda: made)
    with caplog.at_level(logging.WARNING, logger="vllm.attncache_vllm"):
        model, _ = start()
    assert serving(model).admissions is None
    assert "nothing is admitted, for layers [1] cannot be recorded" in caplog.text


# -- the thread --------------------------------------------------------------------------------


def test_the_work_is_done_with_what_time_nobody_else_wants() -> None:
    pool = thread_beside_forward("test", idle=True)
    assert pool.submit(os.sched_getscheduler, 0).result() == os.SCHED_IDLE
    assert pool.submit(torch.get_num_threads).result() == 1
    pool.shutdown()


def test_maps_are_encoded_on_such_a_thread(direct: Direct) -> None:
    thread = direct.admissions._thread
    assert thread.submit(os.sched_getscheduler, 0).result() == os.SCHED_IDLE
