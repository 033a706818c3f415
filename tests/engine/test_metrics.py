# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest
from batches import counted

from attncache_vllm.engine import metrics
from attncache_vllm.engine.metrics import Outcomes
from attncache_vllm.store import StoreHealth


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be moved on by hand; outcomes begin with the last line at this one."""
    now = [100.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_the_log_line_tells_outcomes_and_reasons_by_frequency(clock: list[float]) -> None:
    outcomes = Outcomes(30, _last_log=clock[0])
    for source in ("template", "template", "template", "aligned"):
        outcomes.hit(source)
    outcomes.canary("aligned")
    outcomes.miss("nothing close enough", 2)
    outcomes.bypass("sliding window", 1)
    clock[0] += 30
    assert outcomes.log_line() == (
        "4 hit, 3 miss, 1 bypass (hit: template 3, miss: nothing close enough 2, hit: aligned 1, "
        "miss: canary 1, bypass: sliding window 1)"
    )


def test_the_log_line_comes_once_per_interval(clock: list[float]) -> None:
    outcomes = Outcomes(30, _last_log=clock[0])
    outcomes.hit("neighbour")
    lines = []
    for _ in range(9):
        clock[0] += 10
        lines.append(outcomes.log_line() is not None)
    assert lines == [False, False, True] * 3


def test_nothing_is_logged_before_something_happened(clock: list[float]) -> None:
    outcomes = Outcomes(30, _last_log=clock[0])
    clock[0] += 1000
    assert outcomes.log_line() is None
    outcomes.miss("late", 0)
    assert outcomes.log_line() is None
    outcomes.hit("neighbour")
    assert outcomes.log_line() == "1 hit, 0 miss, 0 bypass (hit: neighbour 1)"


def test_what_a_store_tallies_is_counted_once() -> None:
    name, late = "attncache_shard_faults_total", {"kind": "late"}
    before = counted(name, **late)
    health = metrics.Health()
    health.publish(StoreHealth({"late": 2, "full": 0}, 1))
    assert counted("attncache_shards_out") == 1
    health.publish(StoreHealth({"late": 2}, 1))
    health.publish(StoreHealth({"late": 5}, 0))
    assert counted(name, **late) - before == 5
    assert counted("attncache_shards_out") == 0


def test_outcomes_sources_and_reasons_reach_prometheus() -> None:
    names = [
        ("attncache_sequences_total", {"outcome": "bypass"}),
        ("attncache_bypasses_total", {"reason": "of this test"}),
        ("attncache_sequences_total", {"outcome": "miss"}),
        ("attncache_misses_total", {"reason": "of this test"}),
        ("attncache_misses_total", {"reason": "canary"}),
        ("attncache_canaries_total", {"source": "template"}),
        ("attncache_sequences_total", {"outcome": "hit"}),
        ("attncache_hits_total", {"source": "neighbour"}),
        ("attncache_hits_total", {"source": "template"}),
    ]
    before = [counted(name, **labels) for name, labels in names]
    outcomes = Outcomes(30)
    outcomes.bypass("of this test", 4)
    outcomes.miss("of this test", 2)
    # A canary is answered exactly: a miss, and no hit of its source.
    outcomes.canary("template")
    outcomes.hit("neighbour")
    after = [counted(name, **labels) for name, labels in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [4, 4, 3, 2, 1, 1, 1, 1, 0]
