# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest
from batches import counted

from attncache_vllm.engine import metrics
from attncache_vllm.engine.metrics import Outcomes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be moved on by hand; outcomes begin with the last line at this one."""
    now = [100.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_the_log_line_tells_outcomes_and_reasons_by_frequency(clock: list[float]) -> None:
    outcomes = Outcomes(30, _last_log=clock[0])
    outcomes.hit(3)
    outcomes.miss("late", 1)
    outcomes.miss("nothing close enough", 2)
    outcomes.bypass("sliding window", 1)
    clock[0] += 30
    assert outcomes.log_line() == (
        "3 hit, 3 miss, 1 bypass "
        "(miss: nothing close enough 2, miss: late 1, bypass: sliding window 1)"
    )


def test_the_log_line_comes_once_per_interval(clock: list[float]) -> None:
    outcomes = Outcomes(30, _last_log=clock[0])
    outcomes.hit(1)
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
    outcomes.hit(1)
    assert outcomes.log_line() == "1 hit, 0 miss, 0 bypass"


def test_outcomes_and_reasons_reach_prometheus() -> None:
    names = [
        ("attncache_sequences_total", {"outcome": "bypass"}),
        ("attncache_bypasses_total", {"reason": "of this test"}),
        ("attncache_sequences_total", {"outcome": "miss"}),
        ("attncache_misses_total", {"reason": "of this test"}),
    ]
    before = [counted(name, **labels) for name, labels in names]
    outcomes = Outcomes(30)
    outcomes.bypass("of this test", 4)
    outcomes.miss("of this test", 2)
    after = [counted(name, **labels) for name, labels in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [4, 4, 2, 2]
