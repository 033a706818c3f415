# SPDX-License-Identifier: Apache-2.0
"""What was reused, by the server's own counters."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from attncache_vllm.evaluate.server import Server
from attncache_vllm.reuse.plan import Plan, SourcePlan


@dataclass(frozen=True)
class Counts:
    """Counters of a server; those of a stretch of time are a difference of two."""

    outcomes: Counter[str] = field(default_factory=Counter)
    hits: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    bypasses: Counter[str] = field(default_factory=Counter)
    misses: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, server: Server) -> Counts:
        return cls(
            outcomes=Counter(server.counters("attncache_sequences", "outcome")),
            hits=Counter(server.counters("attncache_hits", "source")),
            rows=Counter(server.counters("attncache_map_rows", "kind")),
            bypasses=Counter(server.counters("attncache_bypasses", "reason")),
            misses=Counter(server.counters("attncache_misses", "reason")),
        )

    def since(self, before: Counts) -> Counts:
        # The difference of Counters drops what did not grow.
        return Counts(*(getattr(self, name) - getattr(before, name) for name in vars(self)))

    def plain(self) -> dict[str, dict[str, int]]:
        """Integers by counter and label, for a report."""
        return {
            name: {label: int(count) for label, count in sorted(counter.items())}
            for name, counter in vars(self).items()
        }


def shares(plan: Plan, kv_heads: int, counts: Counts) -> dict[str, Any]:
    """How much was reused, as shares of all sequences; None where the server does not count it.

    - ``hit_rate``: sequences that reused anything;
    - ``groups_reused_share``: layers x KV groups whose maps were reused, by the plan of the source
      of each hit;
    - ``layers_reused_share``: layers of which every KV group was;
    - ``rows_reused_share``: rows of maps (layer x KV group x token) that were reused. A hit by
      alignment computes the rows of new tokens, so that this is below the share of groups.

    Raises:
        KeyError: a hit by a source that is not in the plan.
    """
    sequences = counts.outcomes.total()
    result: dict[str, Any] = {
        "hit_rate": counts.outcomes["hit"] / sequences if sequences else None,
        "groups_reused_share": None,
        "layers_reused_share": None,
        "rows_reused_share": None,
    }
    if sequences and counts.hits.total() == counts.outcomes["hit"]:
        groups = layers = 0.0
        parts: dict[str, SourcePlan] = dict(plan.sources.items())
        for source, hits in counts.hits.items():
            served = [len(part) for part in parts[source].groups]
            groups += hits * sum(served) / (plan.num_layers * kv_heads)
            layers += hits * sum(count == kv_heads for count in served) / plan.num_layers
        result["groups_reused_share"] = groups / sequences
        result["layers_reused_share"] = layers / sequences
    if counts.rows.total():
        result["rows_reused_share"] = counts.rows["reused"] / counts.rows.total()
    return result
