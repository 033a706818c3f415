# SPDX-License-Identifier: Apache-2.0
"""Which row of a stored map serves which row of a sequence, from the tokens of both.

The common beginning and the common end are aligned whatever their length. Between them, runs of a
few tokens that occur once on either side are anchors (patience diff): the largest set of them in
the same order on both sides is kept, and everything that agrees beside an anchor joins it. The gaps
that remain are searched once more, because what occurs twice in a text may occur once in a gap.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from attncache_vllm.reuse.sketch import shingle_hashes

# On edited news articles pairs find as much of an original as difflib does, at its precision, up to
# an edit every twenty tokens. Single tokens find more behind denser edits and more that is wrong;
# threes lose a tenth of an original in which every seventh token was edited.
MIN_RUN = 2
# A fixed number keeps the time near linear, whatever the texts; a third pass finds next to nothing.
_PASSES = 2

_Run = tuple[int, int, int]  # first position in the sequence and in the entry, and tokens


@dataclass(frozen=True, eq=False)
class Alignment:
    """Positions of a sequence and their counterparts in an entry.

    Attributes:
        length: tokens of the sequence.
        entry_length: tokens of the entry.
        rows: `[M]` int64, the positions of the sequence that have a counterpart, ascending.
        entry_rows: `[M]` int64, their counterparts in the entry, ascending.

    Raises:
        ValueError: the positions are not as above.
    """

    length: int
    entry_length: int
    rows: NDArray[np.int64]
    entry_rows: NDArray[np.int64]

    def __post_init__(self) -> None:
        for name, rows, length in (
            ("rows", self.rows, self.length),
            ("entry_rows", self.entry_rows, self.entry_length),
        ):
            if rows.dtype != np.int64 or rows.shape != self.rows.shape or rows.ndim != 1:
                raise ValueError(
                    f"{name} must be [M] int64, as many as rows, got {rows.shape!r} "
                    f"{rows.dtype!r}; use align"
                )
            inside = not len(rows) or (rows[0] >= 0 and rows[-1] < length)
            if not inside or (np.diff(rows) <= 0).any():
                raise ValueError(
                    f"{name} must be ascending positions below {length}, got {rows!r}; use align"
                )

    @cached_property
    def fresh(self) -> NDArray[np.int64]:
        """`[length - M]` int64: the positions of the sequence without a counterpart, ascending."""
        return np.delete(np.arange(self.length), self.rows)

    @property
    def fresh_share(self) -> float:
        """The share of the sequence's positions that have no counterpart."""
        return len(self.fresh) / self.length

    @cached_property
    def prefix(self) -> int:
        """Tokens of the common prefix: rows `i < prefix` have the counterpart `i`."""
        same = (self.rows == self.entry_rows) & (self.rows == np.arange(len(self.rows)))
        return len(same) if same.all() else int(same.argmin())

    def is_own_map(self, causal: bool) -> bool:
        """Whether the entry's map, laid over the sequence from the left, is its own: they are the
        same text or, in a causal model, the sequence is how the entry begins."""
        return self.prefix == self.length and (causal or self.entry_length == self.length)

    def novelty(self, causal: bool) -> float:
        """How much of what the served rows see is not what their stored rows saw, 0 to 1.

        For each row the share of the columns of either that the other lacks: fresh ones, and those
        of the entry that have no counterpart; summed over the served rows, divided by ``length``.
        0 for a common prefix of a causal model, whose rows are exact by construction.
        """
        if not len(self.rows):
            return 0.0
        fresh, gone = np.ones(self.length, bool), np.ones(self.entry_length, bool)
        fresh[self.rows], gone[self.entry_rows] = False, False
        if causal:
            new, lost = np.cumsum(fresh)[self.rows], np.cumsum(gone)[self.entry_rows]
            seen = self.rows + 1
        else:
            new, lost = np.array(fresh.sum()), np.array(gone.sum())
            seen = np.full(len(self.rows), self.length)
        return float(((new + lost) / (seen + lost)).sum() / self.length)

    def serving(self, rows: NDArray[np.bool_]) -> Alignment:
        """The same alignment, of which only ``rows`` (bool ``[length]``) keep their counterpart."""
        kept = rows[self.rows]
        return Alignment(self.length, self.entry_length, self.rows[kept], self.entry_rows[kept])


def align(
    tokens: NDArray[np.int32], entry_tokens: NDArray[np.int32], min_run: int = MIN_RUN
) -> Alignment:
    """Align a sequence with an entry; equal tokens only, in the order of both.

    Args:
        tokens: `[L]` integer token ids of the sequence.
        entry_tokens: `[N]` integer token ids of the entry.
        min_run: tokens of an anchor, and so of the shortest run between the common prefix and the
            common suffix. Those two are kept at any length: they are where both texts begin and
            end, not where a search found them.

    Raises:
        ValueError: one of them is empty or not 1-D, or `min_run` is below 1.
    """
    if min_run < 1:
        raise ValueError(f"min_run must be at least 1, got {min_run!r}; leave it at {MIN_RUN}")
    for name, ids in (("tokens", tokens), ("entry_tokens", entry_tokens)):
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
            raise ValueError(
                f"{name} must be [L] integers with L at least 1, got {ids.shape!r} {ids.dtype!r}; "
                "pass the token ids of one sequence"
            )
    length, entry_length = len(tokens), len(entry_tokens)
    shorter = min(length, entry_length)
    prefix = _common(tokens[:shorter], entry_tokens[:shorter])
    rest = shorter - prefix
    suffix = _common(tokens[::-1][:rest], entry_tokens[::-1][:rest])
    middle = _middle(
        tokens[prefix : length - suffix], entry_tokens[prefix : entry_length - suffix], min_run
    )
    runs = [
        (0, 0, prefix),
        *((prefix + at, prefix + entry_at, size) for at, entry_at, size in middle),
        (length - suffix, entry_length - suffix, suffix),
    ]
    rows, entry_rows = (
        np.concatenate([np.arange(run[side], run[side] + run[2], dtype=np.int64) for run in runs])
        for side in (0, 1)
    )
    return Alignment(length, entry_length, rows, entry_rows)


def _common(tokens: NDArray[np.int32], others: NDArray[np.int32]) -> int:
    """How many tokens agree from the beginning on, of as many on both sides."""
    same = tokens == others
    return len(same) if same.all() else int(same.argmin())


def _middle(tokens: NDArray[np.int32], others: NDArray[np.int32], width: int) -> list[_Run]:
    """Runs of at least `width` tokens that agree, in the order of both texts."""
    ids, other_ids = tokens.tolist(), others.tolist()
    runs: list[_Run] = []
    gaps = [(0, len(ids), 0, len(other_ids))]
    hashes, other_hashes = (shingle_hashes(side, width).tolist() for side in (tokens, others))
    for _ in range(_PASSES):
        searched, gaps = gaps, []
        for at, end, other_at, other_end in searched:
            spans = range(at, end - width + 1), range(other_at, other_end - width + 1)
            for i, j in _anchors(hashes, other_hashes, *spans):
                if i < at or j < other_at:
                    continue  # in the run before it
                first, other_first = i, j
                while (
                    first > at
                    and other_first > other_at
                    and ids[first - 1] == other_ids[other_first - 1]
                ):
                    first, other_first = first - 1, other_first - 1
                gaps.append((at, first, other_at, other_first))
                at, other_at = i, j
                while at < end and other_at < other_end and ids[at] == other_ids[other_at]:
                    at, other_at = at + 1, other_at + 1
                runs.append((first, other_first, at - first))
            gaps.append((at, end, other_at, other_end))
    return sorted(runs)


def _anchors(
    hashes: list[int], others: list[int], span: range, other_span: range
) -> list[tuple[int, int]]:
    """The longest chain of pairs of positions, ascending on both sides, whose hashes are equal and
    occur once in either span."""
    where, other_where = _once(hashes, span), _once(others, other_span)
    pairs = [(i, other_where[h]) for h, i in where.items() if h in other_where]
    return _longest_chain(pairs)


def _once(hashes: list[int], span: range) -> dict[int, int]:
    """Position of every hash that occurs once in a span, in order."""
    where: dict[int, int] = {}
    repeated = set()
    for at in span:
        if hashes[at] in where:
            repeated.add(hashes[at])
        where[hashes[at]] = at
    return {h: at for h, at in where.items() if h not in repeated}


def _longest_chain(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest increasing subsequence of the second members, by patience sorting."""
    tops: list[int] = []  # second member on top of each pile
    places: list[int] = []  # which pair that is
    before: list[int] = []  # for each pair, the one on top of the pile to its left
    for index, (_, j) in enumerate(pairs):
        pile = bisect_left(tops, j)
        before.append(places[pile - 1] if pile else -1)
        tops[pile : pile + 1], places[pile : pile + 1] = [j], [index]
    chain = []
    index = places[-1] if places else -1
    while index >= 0:
        chain.append(pairs[index])
        index = before[index]
    return chain[::-1]
