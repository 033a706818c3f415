# SPDX-License-Identifier: Apache-2.0
"""The short form of `make soak`: every fault once, under the traffic of two tenants."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from integration_tests.processes import run

SECONDS = 900.0


@pytest.mark.timeout(SECONDS + 20)
def test_no_fault_of_a_shard_fails_or_changes_an_answer(tmp_path: Path) -> None:
    out = tmp_path / "soak"
    # On a busy machine a lookup takes longer than a server would want to wait for it.
    options = ("--quiet", "10", "--faults", "1", "--deadline-ms", "2000", "--out", str(out))
    ended = run([sys.executable, "-m", "benchmarks.soak", *options], tmp_path, SECONDS)
    assert ended.code == 0, ended.log + ended.stdout
    report = json.loads((out / "report.json").read_text())
    assert report["requests"] > 50
    assert (report["failed"], report["wrong"], report["cross_tenant_hits"]) == (0, 0, 0)
    assert (report["shards_killed"], report["stalls"]) == (1, 1)
    # The servers find the shards again, which come back with what they had.
    assert report["lost_entries_after_restart"] == 0
    assert report["hit_rate_before"] > 0.5
    assert report["hit_rate_after"] > 0.5
