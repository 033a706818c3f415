# SPDX-License-Identifier: Apache-2.0
"""What it saves to serve a sequence from maps: measured when an engine starts, asked in every step.

A layer takes a map only at lengths at which that was faster there; in a batch that has to be parted
for it, only if all that is served there saves more than the parting costs. A sequence is looked up
only if what its layers would save is more than a lookup takes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from attncache_vllm.reuse.plan import Source

# How a map serves: as its source says, or as the text's own, for which nothing is aligned.
Manner = Source | Literal["own"]


@dataclass(frozen=True)
class Cost:
    """Of one sequence of ``length`` tokens in one layer, in seconds: computed, and served; and what
    a batch of it and another, as long and computed, costs more for being parted."""

    length: int
    exact: float
    reused: float
    parting: float = 0.0

    @property
    def saved(self) -> float:
        """0 where serving is not faster: the layer is computed then."""
        return max(0.0, self.exact - self.reused)


class Costs:
    """Costs by layer and manner. Between two lengths that were measured, those of the shorter one
    count: what pays there pays behind it as well."""

    def __init__(
        self, measured: Mapping[tuple[int, Manner], Sequence[Cost]], lookup: float = 0.0
    ) -> None:
        """``measured`` is ascending by length, ``lookup`` the seconds of a lookup in vain. With
        nothing measured, everything pays."""
        self.measured = measured
        self.lookup = lookup
        self.lengths = sorted({cost.length for costs in measured.values() for cost in costs})
        self._costs = {
            (layer, manner, cost.length): cost
            for (layer, manner), costs in measured.items()
            for cost in costs
        }
        self._saved: dict[tuple[Manner, int], float] = {}
        for (_, manner), costs in measured.items():
            for cost in costs:
                key = manner, cost.length
                self._saved[key] = self._saved.get(key, 0.0) + cost.saved

    @property
    def manners(self) -> list[Manner]:
        """Those that were measured."""
        return list(dict.fromkeys(manner for _, manner in self.measured))

    def pays(self, layer: int, manner: Manner, length: int) -> bool:
        """Whether the layer is faster with a map for a sequence of ``length`` tokens."""
        if not self.lengths:
            return True
        cost = self._costs.get((layer, manner, self._known(length)))
        return cost is not None and cost.saved > 0

    def pays_in_batch(self, layer: int, served: Sequence[tuple[Manner, int]], tokens: int) -> bool:
        """Whether sequences that pay by themselves, ``served`` by manner and length, do so in a
        batch of ``tokens`` tokens, of which the layer computes the rest."""
        alone = sum(length for _, length in served) >= tokens
        if alone or not served or not self.lengths:
            return True
        saved = sum(
            self._costs[layer, manner, self._known(length)].saved for manner, length in served
        )
        return saved > max(self._parting(layer, manner, tokens) for manner, _ in served)

    def _parting(self, layer: int, manner: Manner, tokens: int) -> float:
        """In proportion to the nearest batch that was measured."""
        costs = self.measured[layer, manner]
        nearest = costs[max(0, bisect_right([cost.length for cost in costs], tokens // 2) - 1)]
        return nearest.parting * tokens / (2 * nearest.length)

    def worth(self, manner: Manner, length: int) -> bool:
        """Whether all layers together save more than it takes to find the map."""
        if not self.lengths:
            return True
        least = 0.0 if manner == "template" else self.lookup
        return self.saved(manner, length) > least

    def saved(self, manner: Manner, length: int) -> float:
        """Seconds that the layers that pay save together."""
        return self._saved.get((manner, self._known(length)), 0.0)

    def least_length(self, manner: Manner) -> int | None:
        """The shortest measured length from which on the manner is worth it; None if there is
        none."""
        worth = [self.worth(manner, length) for length in self.lengths]
        if not worth or not worth[-1]:
            return None
        first = len(worth) - worth[::-1].index(False) if False in worth else 0
        return self.lengths[first]

    def _known(self, length: int) -> int:
        return self.lengths[max(0, bisect_right(self.lengths, length) - 1)]


def lengths_up_to(longest: int) -> list[int]:
    """What is measured: powers of two, from where attention is next to nothing to where what pays
    has shown."""
    return [length for length in (16, 32, 64, 128, 256, 512, 1024) if length <= longest] or [
        longest
    ]


def log_line(costs: Costs, seconds: float) -> str:
    """From which length on each manner pays."""
    starts = []
    for manner in costs.manners:
        least = costs.least_length(manner)
        starts.append(f"{manner} never" if least is None else f"{manner} from {least} tokens")
    return (
        f"reuse pays: {', '.join(starts)} (a lookup takes {costs.lookup * 1e3:.1f} ms; measured in "
        f"{seconds:.1f} s)"
    )
