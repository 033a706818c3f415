# SPDX-License-Identifier: Apache-2.0
"""Which stored entry, if any, lends its maps to a sequence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from attncache_vllm.reuse.align import Alignment


class Candidate(Protocol):
    """An entry near a sequence, as a store's lookup returns it."""

    @property
    def entry_id(self) -> int:
        """The store's id of the entry."""

    @property
    def distance(self) -> float:
        """L2 distance of the features."""

    @property
    def length(self) -> int:
        """Tokens of the entry."""


@dataclass(frozen=True)
class Match:
    """The entry whose feature is nearest to that of a sequence.

    Attributes:
        entry_id: the store's id of the entry.
        length: tokens of the entry.
        distance: L2 distance of the features.
    """

    entry_id: int
    length: int
    distance: float


def nearest(
    candidates: Iterable[Candidate], length: int, max_distance: float, longer: bool
) -> Match | None:
    """The nearest candidate that is close enough and has the right length, None if there is none.

    Close enough is AttnCache's threshold gate (arXiv 2510.25979). Of equally near candidates the
    shortest wins, as it is the cheapest to load, then the lowest id, so that the order of
    `candidates` never matters. A NaN distance is never close enough.

    Args:
        candidates: what the store found, in any order.
        length: tokens of the sequence.
        max_distance: the widest distance that is close enough.
        longer: whether entries longer than the sequence may serve it, as causal maps do, which
            hold the maps of their prefixes.

    Raises:
        ValueError: `length` is below 1.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length!r}; skip empty sequences")
    best = min(
        (
            c
            for c in candidates
            if (c.length == length or (longer and c.length > length)) and c.distance <= max_distance
        ),
        key=lambda c: (c.distance, c.length, c.entry_id),
        default=None,
    )
    return None if best is None else Match(best.entry_id, best.length, best.distance)


@dataclass(frozen=True, eq=False)
class AlignedMatch:
    """An entry that shares tokens with a sequence.

    Attributes:
        entry_id: the store's id of the entry.
        aligned: serves layers that tolerate approximate rows; None if it is too novel for them.
        prefix: serves the other layers; None if there is nothing that is exact by construction.
        reused: share of the rows that need not be computed, over all KV groups of the model.
    """

    entry_id: int
    aligned: Alignment | None
    prefix: Alignment | None
    reused: float


@dataclass(frozen=True)
class AlignedGate:
    """When an alignment serves.

    Attributes:
        causal: whether the model's maps are causal.
        max_novelty: largest novelty that layers with approximate rows tolerate.
        aligned_share: share of the model's KV groups that tolerate approximate rows.
        prefix_share: share of the KV groups that are served from a common prefix only.
    """

    causal: bool
    max_novelty: float
    aligned_share: float
    prefix_share: float

    def match(self, entry_id: int, alignment: Alignment) -> AlignedMatch:
        """What of an alignment serves.

        Rows that a pooler may read alone are always computed, the last one and of bidirectional
        models the first, unless the entry's map is the sequence's own.
        """
        aligned = prefix = None
        computed = np.zeros(alignment.length, bool)
        if not alignment.is_own_map(self.causal):
            computed[-1] = True
            computed[0] = not self.causal
        kept = alignment.serving(~computed)
        if self.aligned_share and kept.novelty(self.causal) <= self.max_novelty:
            aligned = kept
        if self.prefix_share and self.causal and kept.prefix:
            prefix = kept.serving(np.arange(kept.length) < kept.prefix)
        served = self.aligned_share * len(aligned.rows if aligned else ())
        served += self.prefix_share * len(prefix.rows if prefix else ())
        return AlignedMatch(entry_id, aligned, prefix, served / alignment.length)


# Below it a match is not worth the loading of its maps.
MIN_REUSED = 0.2


def best_aligned(
    matches: Iterable[AlignedMatch], at_least: float = MIN_REUSED
) -> AlignedMatch | None:
    """The match that leaves the fewest rows to compute; of equals, the lowest id. None if none
    serves `at_least` that share of the rows: what else could serve the sequence, say."""
    best = min(matches, key=lambda match: (-match.reused, match.entry_id), default=None)
    return best if best is not None and best.reused >= at_least else None
