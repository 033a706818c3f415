# SPDX-License-Identifier: Apache-2.0
"""Stores that the tests of lookups and of starting an engine begin with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from lookup_samples import FakeStore, make_lookups
from recorded_stores import publish, recorded

from attncache_vllm.engine import metrics, record
from attncache_vllm.engine.lookups import Lookups


@pytest.fixture
def fake_store() -> FakeStore:
    return FakeStore([])


@pytest.fixture
def lookups(fake_store: FakeStore) -> Iterator[Lookups]:
    lookups = make_lookups(fake_store)
    yield lookups
    fake_store.may_answer.set()
    lookups._thread.shutdown()


@pytest.fixture
def published_store(tmp_path: Path) -> Path:
    return publish(recorded(tmp_path / "store"))


@pytest.fixture
def clean_slate(monkeypatch: pytest.MonkeyPatch) -> None:
    """No recorder that an earlier test left, and no layers that it counted."""
    monkeypatch.setattr(record, "_active", None)
    metrics.LAYERS.clear()
