# SPDX-License-Identifier: Apache-2.0
"""Tenants in an engine whose scheduler and worker are different processes, and requests without a
salt that are to be computed. The scheduler is in the process of ``LLM``: a server's is spawned, see
``test_server.py``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from integration_tests.conftest import PATIENT, Stock, Texts
from integration_tests.engine import IN_PROCESS, Counted, Engine


@pytest.fixture(scope="module")
def host(
    store: Path,
    embedder: dict[str, Any],
    stock: Stock,  # first, because it ends before this engine starts
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Engine]:
    with Engine(
        tmp_path_factory.mktemp("tenants") / "engine.log", IN_PROCESS, **options(store, embedder)
    ) as host:
        yield host


def options(store: Path, embedder: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "distributed_executor_backend": "mp",
        "attention_backend": "attncache",
        "additional_config": {"attncache": {"store": str(store), **PATIENT, **changes}},
        **embedder,
    }


def reasons(counts: dict[str, int]) -> dict[str, int]:
    """Sequences by outcome or reason that there were any of."""
    prefixes = ("attncache_hits_total{", "attncache_misses_total{", "attncache_bypasses_total{")
    return {
        name.split("{")[1].rstrip("}"): count
        for name, count in counts.items()
        if name.startswith(prefixes) and count
    }


def test_in_one_batch_each_request_finds_what_its_tenant_has(
    host: Engine, stock: Stock, texts: Texts
) -> None:
    counted, prompts = Counted(host), [text for text in texts.recorded[:8] for _ in range(2)]
    answers = host.embed(prompts, [None, "secret"] * 8)
    assert reasons(counted.since()) == {"neighbour": 8, "nothing close enough": 8}
    exact = stock.of(texts.recorded[:8])
    assert not np.array_equal(answers[::2], exact)
    assert np.allclose(answers[1::2], exact, atol=1e-2)
    # Alone, as stock computes it.
    assert np.array_equal(host.embed(prompts[:1], ["secret"]), exact[:1])


def test_without_a_salt_a_request_can_be_computed_always(
    host: Engine, store: Path, embedder: dict[str, Any], stock: Stock, texts: Texts
) -> None:
    host.replace(**options(store, embedder, unsalted="off"))
    counted = Counted(host)
    assert np.array_equal(host.embed_alone(texts.recorded[:4]), stock.of(texts.recorded[:4]))
    host.embed(texts.recorded[:4], ["secret"] * 4)
    assert reasons(counted.since()) == {"no cache_salt": 4, "nothing close enough": 4}
