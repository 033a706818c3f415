# SPDX-License-Identifier: Apache-2.0
"""Edited copies of token sequences: what calibration and evaluation use for near-duplicates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


def vocabulary_of(texts: Sequence[Tokens], special: set[int]) -> list[int]:
    """The tokens of natural texts, each int32 ``[L]``, less special ones: what edits draw from."""
    return [token for token in np.unique(np.concatenate(texts)).tolist() if token not in special]


def edit(tokens: Tokens, rate: float, vocabulary: Sequence[int], seed: Sequence[int]) -> Tokens:
    """A copy with edits at about ``rate`` of the tokens: a third each are replaced, preceded by a
    new one, and deleted. The first and the last token stay, because they may be special ones.

    Args:
        tokens: int32 ``[L]``.
        rate: share of the tokens that are edited, 0 to 1.
        vocabulary: where new tokens are drawn from; those of natural text, special ones left out.
        seed: numbers from 0; the same ones make the same copy.

    Raises:
        ValueError: the rate is outside 0 to 1, or there is nothing to draw from.
    """
    if not 0 <= rate <= 1 or not len(vocabulary):
        raise ValueError(
            "an edit needs a rate from 0 to 1 and tokens to draw from, got "
            f"{rate!r} and {len(vocabulary)} tokens"
        )
    draw = np.random.default_rng(list(seed))
    edited = [int(tokens[0])]
    for token in tokens[1:-1].tolist():
        kind, new = draw.random(), int(draw.choice(vocabulary))
        if kind < rate / 3:
            edited.append(new)
        elif kind < rate * 2 / 3:
            edited += [new, token]
        elif kind >= rate:
            edited.append(token)
    return np.array([*edited, *tokens[1:][-1:].tolist()], dtype=np.int32)
