# SPDX-License-Identifier: Apache-2.0
"""A breaker opens after failures in a row, and only a probe that succeeds closes it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attncache_vllm.store.ray.breaker import Breaker


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def opened(clock: Clock, **options: float) -> Breaker:
    breaker = Breaker(failures=1, clock=clock, **options)
    assert breaker.failed()
    return breaker


def test_it_opens_with_the_last_of_so_many_failures_in_a_row(clock: Clock) -> None:
    breaker = Breaker(failures=3, clock=clock)
    assert [breaker.failed(), breaker.failed()] == [False, False]
    breaker.succeeded()
    assert [breaker.failed(), breaker.failed()] == [False, False]
    assert breaker.closed
    assert breaker.failed()
    assert not breaker.closed
    assert not breaker.failed(), "it opens once"


def test_a_probe_is_due_once_after_the_cooldown(clock: Clock) -> None:
    breaker = opened(clock, cooldown=2.0)
    clock.now += 1.9
    assert not breaker.probe_due()
    clock.now += 0.2
    assert breaker.probe_due()
    assert breaker.state == "half-open"
    assert not breaker.probe_due()
    assert not breaker.closed


def test_a_probe_that_succeeds_closes_it(clock: Clock) -> None:
    breaker = opened(clock)
    clock.now += 1
    assert breaker.probe_due()
    assert breaker.succeeded()
    assert breaker.closed
    assert not breaker.succeeded(), "it closes once"


def test_a_late_answer_does_not_close_it(clock: Clock) -> None:
    breaker = opened(clock)
    assert not breaker.succeeded()
    assert breaker.state == "open"


def test_each_probe_that_fails_doubles_the_cooldown_up_to_a_bound(clock: Clock) -> None:
    breaker = opened(clock, cooldown=1.0, longest=5.0)
    for cooldown in (1.0, 2.0, 4.0, 5.0, 5.0):
        clock.now += cooldown - 0.01
        assert not breaker.probe_due()
        clock.now += 0.01
        assert breaker.probe_due()
        breaker.failed()
    clock.now += 5
    assert breaker.probe_due()
    breaker.succeeded()
    assert breaker.failed()
    clock.now += 1.0
    assert breaker.probe_due(), "a recovery forgets the cooldown"


@given(st.lists(st.sampled_from(["fail", "succeed", "wait", "probe"]), max_size=60))
def test_it_is_never_closed_again_without_a_probe(events: list[str]) -> None:
    clock = Clock()
    breaker = Breaker(failures=2, clock=clock)
    for event in events:
        before = breaker.state
        if event == "fail":
            breaker.failed()
        elif event == "succeed":
            breaker.succeeded()
        elif event == "wait":
            clock.now += 1
        else:
            assert breaker.probe_due() == (breaker.state == "half-open" and before == "open")
        if before == "open":
            assert breaker.state != "closed"


@pytest.mark.parametrize("options", [{"failures": 0}, {"cooldown": 0.0}, {"cooldown": 31.0}])
def test_bounds_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a breaker needs"):
        Breaker(**options)
