# SPDX-License-Identifier: Apache-2.0
"""Entries on their way: bounded, each once, at a bounded rate, and every loss is counted."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from store_samples import make_record

from attncache_vllm.store.ray.admission import Admission, Admitted

MAP_BYTES = 1000


def entry(number: int) -> Admitted:
    record = make_record(number, map_bytes=MAP_BYTES // 2)
    assert sum(m.nbytes for m in record.maps.values()) == MAP_BYTES
    return Admitted(number, "", np.zeros(3, dtype=np.float32), record)


class Sender:
    """Takes entries once it is let."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.slept: list[float] = []
        self.let = threading.Event()
        self.fails = False

    def __call__(self, given: Admitted) -> None:
        assert self.let.wait(10)
        if self.fails:
            raise OSError("no way")
        self.sent.append(given.entry_id)


@pytest.fixture
def sender() -> Sender:
    return Sender()


@pytest.fixture
def admission(sender: Sender) -> Iterator[Admission]:
    admission = Admission(sender, 3 * MAP_BYTES, 500.0, sender.slept.append)
    yield admission
    sender.let.set()
    admission.close()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_entries_are_sent_in_turn_at_the_rate(sender: Sender, admission: Admission) -> None:
    sender.let.set()
    assert all(admission.offer(entry(number)) for number in range(3))
    eventually(lambda: len(sender.slept) == 3)
    assert sender.sent == [0, 1, 2]
    assert sender.slept == [MAP_BYTES / 500.0] * 3


def test_an_entry_is_sent_once(sender: Sender, admission: Admission) -> None:
    sender.let.set()
    assert not admission.knows(1)
    assert admission.offer(entry(1))
    assert admission.knows(1)
    assert not admission.offer(entry(1))
    eventually(lambda: sender.sent == [1])
    assert not admission.offer(entry(1)), "it is remembered after it was sent"
    assert admission.dropped == 0


def test_what_finds_no_room_is_dropped_and_counted(sender: Sender, admission: Admission) -> None:
    taken = [admission.offer(entry(number)) for number in range(10)]
    # One may have left the queue for the sender, who holds it.
    assert sum(taken) in (3, 4)
    assert admission.dropped == 10 - sum(taken)
    sender.let.set()
    eventually(lambda: len(sender.sent) == sum(taken))
    refused = taken.index(False)
    assert admission.offer(entry(refused)), "it may come again"


def test_what_cannot_be_sent_is_counted_and_may_come_again(
    sender: Sender, admission: Admission
) -> None:
    sender.fails = True
    sender.let.set()
    assert admission.offer(entry(1))
    eventually(lambda: admission.dropped == 1)
    assert not admission.knows(1)
    sender.fails = False
    assert admission.offer(entry(1))
    eventually(lambda: sender.sent == [1])


def test_dropping_is_logged_when_it_begins_and_when_it_ends(
    sender: Sender, admission: Admission, caplog: pytest.LogCaptureFixture
) -> None:
    taken = [admission.offer(entry(number)) for number in range(10)]
    assert admission.dropped > 1
    assert [r.getMessage() for r in caplog.records] == [
        "new entries are dropped for now: they come faster than they are sent"
    ]
    sender.let.set()
    eventually(lambda: len(sender.slept) == sum(taken))
    assert [r.getMessage() for r in caplog.records][1:] == ["new entries are no longer dropped"]


def test_nothing_is_taken_after_the_end(sender: Sender, admission: Admission) -> None:
    admission.close()
    assert not admission.offer(entry(1))
    assert admission.dropped == 1


def test_the_maps_are_what_counts(admission: Admission) -> None:
    big = dataclasses.replace(entry(1), record=make_record(1, map_bytes=2 * MAP_BYTES))
    assert not admission.offer(big)
