# SPDX-License-Identifier: Apache-2.0
"""What searches find, as arrays: a batch of queries is padded, merged and sent as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Found = tuple[NDArray[np.int64], NDArray[Any], NDArray[np.int64]]
"""What B queries found, at most K each, the best first: ids int64; values, which are distances
float32 or numbers of sketch values in common int64; lengths int64. Each is ``[B, K]``, and the id
is -1 beyond the last answer of a query."""

Values = type[np.float32] | type[np.int64]
"""What the values are: distances, least first, or numbers in common, most first."""


def nothing(queries: int, most: int, kind: Values) -> Found:
    """Answers of queries that found nothing."""
    shape = queries, most
    return np.full(shape, -1, np.int64), np.zeros(shape, kind), np.zeros(shape, np.int64)


def found_of(answers: Sequence[Sequence[tuple[int, float, int]]], most: int, kind: Values) -> Found:
    """Id, value and length of each answer of each query, at most ``most``, as arrays."""
    found = nothing(len(answers), most, kind)
    for row, answer in enumerate(answers):
        for part, column in zip(found, zip(*answer, strict=True), strict=False):
            part[row, : len(column)] = column
    return found


def answers_of(found: Found) -> list[list[tuple[Any, ...]]]:
    """The inverse of ``found_of``."""
    rows = zip(*(part.tolist() for part in found), strict=True)
    return [[answer for answer in zip(*row, strict=True) if answer[0] >= 0] for row in rows]


def merge(parts: Sequence[Found], queries: int, most: int, kind: Values) -> Found:
    """The best of what several places found, each entry once; by id where values are equal.

    Args:
        parts: of each place, the answers of the same queries.
        queries: how many were asked.
        most: how many entries a query wants at most.
        kind: of the values.
    """
    padded = [*parts, nothing(queries, most, kind)]
    ids, values, lengths = (np.concatenate(part, axis=1) for part in zip(*padded, strict=True))
    by_id = np.argsort(ids, axis=1, kind="stable")
    ids, values = np.take_along_axis(ids, by_id, 1), np.take_along_axis(values, by_id, 1)
    rank = (values if kind is np.float32 else -values).astype(np.float64)
    rank[ids < 0] = np.inf
    rank[:, 1:][ids[:, 1:] == ids[:, :-1]] = np.inf
    best = np.argsort(rank, axis=1, kind="stable")[:, :most]
    absent = np.isinf(np.take_along_axis(rank, best, 1))
    merged = nothing(queries, most, kind)
    lengths = np.take_along_axis(lengths, by_id, 1)
    for part, column in zip(merged, (ids, values, lengths), strict=True):
        np.copyto(part, np.take_along_axis(column, best, 1), where=~absent)
    return merged
