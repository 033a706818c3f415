# SPDX-License-Identifier: Apache-2.0
"""Joining a cluster: what is tried again, and what a user is told."""

from __future__ import annotations

from typing import Any

import pytest

from attncache_vllm.errors import StoreError
from attncache_vllm.store.ray import actor

ABORTED = "Initialization failure from server:\nTraceback\nStarting Ray client server failed"


def joining(monkeypatch: pytest.MonkeyPatch, faults: list[Exception]) -> list[str]:
    """Let attempts to join end with ``faults`` until there are no more; addresses asked for."""
    asked: list[str] = []

    def init(address: str, **options: Any) -> None:
        asked.append(address)
        if faults:
            raise faults.pop(0)

    monkeypatch.setattr(actor.ray, "init", init)
    return asked


def test_a_process_that_ray_client_could_not_start_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = joining(monkeypatch, [ConnectionAbortedError(ABORTED), ConnectionAbortedError(ABORTED)])
    actor.join("ray://head:10001")
    assert asked == ["ray://head:10001"] * 3


def test_what_never_begins_is_an_error_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = joining(monkeypatch, [ConnectionAbortedError(ABORTED)] * 9)
    with pytest.raises(StoreError, match=r"Initialization failure .* Starting Ray client server"):
        actor.join("ray://head:10001")
    assert len(asked) == 3


def test_a_cluster_that_is_not_there_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = joining(monkeypatch, [ConnectionError("nobody listens")] * 9)
    with pytest.raises(StoreError, match="must be reachable, got ConnectionError: nobody listens"):
        actor.join("127.0.0.1:6379")
    assert len(asked) == 1
