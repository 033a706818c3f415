# SPDX-License-Identifier: Apache-2.0
"""What the soak says of its rounds."""

from __future__ import annotations

from benchmarks.soak import Round, summarise


def test_hits_under_foreign_salts_and_lost_answers_are_told() -> None:
    rounds = [
        Round("before", "own", [10.0, 10.0], hits=2),
        Round("before", "foreign", [20.0, 20.0]),
        Round("faults", "own", [10.0, 500.0], failed=1, hits=1),
        Round("faults", "foreign", [10.0], wrong=1, hits=1),
        Round("recovery", "unseen", [10.0]),
        Round("after", "own", [10.0] * 4, hits=3),
    ]
    report = summarise(rounds, killed=2, stalls=1, lost=3, evicted=4)
    assert report == {
        "requests": 13,
        "failed": 1,
        "wrong": 1,
        "p50_ms": 10.0,
        "p99_ms": report["p99_ms"],
        "p99_ms_no_faults": 20.0,
        "shards_killed": 2,
        "stalls": 1,
        "cross_tenant_hits": 1,
        "hit_rate_before": 1.0,
        "hit_rate_during": 0.5,
        "hit_rate_after": 0.75,
        "lost_entries_after_restart": 3,
        "evicted_entries": 4,
    }
    assert 450 < report["p99_ms"] <= 500
