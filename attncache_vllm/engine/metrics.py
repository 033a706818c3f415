# SPDX-License-Identifier: Apache-2.0
"""Counters of one worker, for Prometheus and for the periodic log line.

The worker is not the process that answers ``/metrics``: Prometheus' multi-process mode carries the
counters there when ``PROMETHEUS_MULTIPROC_DIR`` is set for the server. Without it the log line
still reports them.
"""

from __future__ import annotations

import logging
import time
from collections import Counter as Tally
from dataclasses import dataclass, field

from prometheus_client import Counter, Gauge, Histogram

from attncache_vllm.store.protocol import StoreHealth

SEQUENCES = Counter(
    "attncache_sequences",
    "Sequences prefilled, by outcome: hit, miss or bypass.",
    ["outcome"],
)
BYPASSES = Counter("attncache_bypasses", "Sequences not eligible for reuse, by reason.", ["reason"])
MISSES = Counter("attncache_misses", "Sequences looked up in vain, by reason.", ["reason"])
STORE_FAULTS = Counter("attncache_store_faults", "Faults of the map store, by kind.", ["kind"])
SHARD_FAULTS = Counter(
    "attncache_shard_faults",
    "What went wrong between the server and the shards of its store, by kind. A lookup may be "
    "answered all the same, by the other shards.",
    ["kind"],
)
SHARDS_OUT = Gauge(
    "attncache_shards_out",
    "Shards that are not asked until they answer again.",
    multiprocess_mode="mostrecent",
)
HITS = Counter("attncache_hits", "Sequences served from maps, by source.", ["source"])
CANARIES = Counter(
    "attncache_canaries", "Hits that were computed exactly and compared, by source.", ["source"]
)
MAP_ROWS = Counter(
    "attncache_map_rows",
    "Rows of attention maps that sequences needed, one for each layer, KV group and token: reused "
    "or computed.",
    ["kind"],
)
CANARY_ERROR = Gauge(
    "attncache_canary_error",
    "Mean relative error of the latest canaries, by layer and source.",
    ["layer", "source"],
    multiprocess_mode="mostrecent",
)
TRIPPED = Gauge(
    "attncache_tripped_layers",
    "Layers, counted once per source, that are computed exactly because of their canaries.",
    multiprocess_mode="mostrecent",
)
LAYERS = Gauge(
    "attncache_layers",
    "Attention layers of the model, by treatment: reused, exact, or bypassed for a reason.",
    ["treatment"],
    multiprocess_mode="mostrecent",
)
LOADS = Counter(
    "attncache_loads",
    "Entries whose maps were wanted, by where they were: resident in memory, or only stored.",
    ["place"],
)
ADMISSIONS = Counter(
    "attncache_admissions",
    "Missed texts that were to be admitted, by outcome: recorded or failed.",
    ["outcome"],
)
RESIDENT_BYTES = Gauge(
    "attncache_resident_bytes",
    "Bytes of the maps that are resident in memory.",
    multiprocess_mode="livesum",
)
LOOKUP_SECONDS = Histogram(
    "attncache_lookup_seconds",
    "Wall time from the start of a batched lookup to its maps being ready, in seconds.",
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
)
WAIT_SECONDS = Histogram(
    "attncache_lookup_wait_seconds",
    "Time the forward pass stood waiting for a lookup at the first reused layer, in seconds.",
    buckets=(0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
)


class Health:
    """Carries the tally of a store, which knows no metrics, to Prometheus."""

    def __init__(self) -> None:
        self._published: Tally[str] = Tally()

    def publish(self, health: StoreHealth) -> None:
        """Count what was added since the last call."""
        for kind, count in (Tally(health.faults) - self._published).items():
            SHARD_FAULTS.labels(kind).inc(count)
            self._published[kind] += count
        SHARDS_OUT.set(health.out)


@dataclass
class Outcomes:
    """Tally of sequences since start; a second home of the Prometheus counters, for the log."""

    log_interval_s: float
    sequences: Tally[str] = field(default_factory=Tally)
    reasons: Tally[str] = field(default_factory=Tally)
    _last_log: float = field(default_factory=time.monotonic)

    def hit(self, source: str) -> None:
        self._count("hit", 1)
        self.reasons[f"hit: {source}"] += 1
        HITS.labels(source).inc()

    def canary(self, source: str) -> None:
        """A hit that is computed exactly: it counts as a miss, and apart."""
        self._count("miss", 1)
        self.reasons["miss: canary"] += 1
        MISSES.labels("canary").inc()
        CANARIES.labels(source).inc()

    def miss(self, reason: str, count: int) -> None:
        if count:
            self._count("miss", count)
            self.reasons[f"miss: {reason}"] += count
            MISSES.labels(reason).inc(count)

    def bypass(self, reason: str, count: int) -> None:
        if count:
            self._count("bypass", count)
            self.reasons[f"bypass: {reason}"] += count
            BYPASSES.labels(reason).inc(count)

    def _count(self, outcome: str, count: int) -> None:
        self.sequences[outcome] += count
        SEQUENCES.labels(outcome).inc(count)

    def log(self, logger: logging.Logger) -> None:
        """Log the counters, at most once per interval."""
        if (line := self.log_line()) is not None:
            logger.info("attncache: %s", line)

    def log_line(self) -> str | None:
        """The counters as text, at most once per interval and only when something happened."""
        now = time.monotonic()
        if now - self._last_log < self.log_interval_s or not self.sequences:
            return None
        self._last_log = now
        parts = [f"{self.sequences[outcome]} {outcome}" for outcome in ("hit", "miss", "bypass")]
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common())
        return ", ".join(parts) + (f" ({reasons})" if reasons else "")
