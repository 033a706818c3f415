# SPDX-License-Identifier: Apache-2.0
"""Sketches of token sequences: how much two texts share, from a few numbers each.

A sketch is the smallest of the hashes of all runs of `SHINGLE` consecutive tokens (a bottom-k
sketch: Broder, "On the resemblance and containment of documents", 1997). Two sketches have about as
large a share of their values in common as the texts have runs in common, so that an edited text is
found by counting equal values, whatever its features.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SHINGLE = 3
SKETCH_SIZE = 64

# A polynomial in an odd number modulo 2^64, then the finaliser of SplitMix64 (Steele, Lea and
# Flood, "Fast splittable pseudorandom number generators", 2014), which makes every bit of the
# hash depend on every token.
_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def shingle_hashes(tokens: NDArray[np.int32], width: int) -> NDArray[np.uint64]:
    """Hashes of all runs of `width` consecutive tokens, in order: `[max(L - width + 1, 0)]`.

    The same on every machine and in every process; different runs may share a hash, though hardly
    two in a store do.
    """
    ids = tokens.astype(np.uint64)
    count = max(len(ids) - width + 1, 0)
    hashes = np.zeros(count, np.uint64)
    for at in range(width):
        hashes = hashes * _BASE + ids[at : at + count] + np.uint64(1)
    for shift, factor in _MIX:
        hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)
    return hashes ^ (hashes >> np.uint64(31))


def sketch(tokens: NDArray[np.int32]) -> NDArray[np.uint64]:
    """The sketch of a sequence; a text of less than `SHINGLE` tokens has the hash of all of it.

    Args:
        tokens: `[L]` integer token ids.

    Returns:
        At most `SKETCH_SIZE` values, ascending and distinct, at least one.

    Raises:
        ValueError: `tokens` is empty, not 1-D, or not of integers.
    """
    if tokens.ndim != 1 or not len(tokens) or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"tokens must be [L] integers with L at least 1, got {tokens.shape!r} "
            f"{tokens.dtype!r}; pass the token ids of one sequence"
        )
    return np.unique(shingle_hashes(tokens, min(SHINGLE, len(tokens))))[:SKETCH_SIZE]
