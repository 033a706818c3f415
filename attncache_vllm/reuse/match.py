# SPDX-License-Identifier: Apache-2.0
"""Which stored entry, if any, lends its maps to a sequence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """What a store's lookup returns: an entry, its feature distance (L2), its length in tokens."""

    entry_id: int
    distance: float
    length: int


@dataclass(frozen=True)
class Match:
    """An entry whose leading `length` x `length` map block serves a sequence.

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


def choose(candidates: Iterable[Candidate], length: int, max_distance: float) -> Match | None:
    """The nearest candidate that is close enough and long enough, None if there is none.

    Close enough is AttnCache's threshold gate (arXiv 2510.25979); long enough, because a causal
    map holds the maps of its prefixes only. Of equally near candidates the shortest wins, as it
    is the cheapest to load, then the lowest id, so that the order of `candidates` never matters.
    A NaN distance is never close enough.

    Raises:
        ValueError: `length` is below 1.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length!r}; skip empty sequences")
    nearest = min(
        (c for c in candidates if c.length >= length and c.distance <= max_distance),
        key=lambda c: (c.distance, c.length, c.entry_id),
        default=None,
    )
    if nearest is None:
        return None
    return Match(nearest.entry_id, nearest.distance, length, nearest.length)
