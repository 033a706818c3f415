# SPDX-License-Identifier: Apache-2.0
"""Which stored entry, if any, lends its maps to a sequence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


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
    """An entry whose maps serve a sequence: by their leading block, if the entry is longer.

    Attributes:
        entry_id: the store's id of the entry.
        distance: L2 distance of the features.
        length: tokens of the sequence to serve.
        entry_length: tokens of the entry, at least `length`.
    """

    entry_id: int
    distance: float
    length: int
    entry_length: int


def choose(
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
        longer: whether entries longer than the sequence may serve it. A causal map holds the maps
            of its prefixes, a bidirectional one only crops of itself.

    Raises:
        ValueError: `length` is below 1.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length!r}; skip empty sequences")
    nearest = min(
        (
            c
            for c in candidates
            if (c.length == length or (longer and c.length > length)) and c.distance <= max_distance
        ),
        key=lambda c: (c.distance, c.length, c.entry_id),
        default=None,
    )
    if nearest is None:
        return None
    return Match(nearest.entry_id, nearest.distance, length, nearest.length)
