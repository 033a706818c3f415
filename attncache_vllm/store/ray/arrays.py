# SPDX-License-Identifier: Apache-2.0
"""Arrays in messages: little-endian bytes, whose size must be what the rest of the message says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from attncache_vllm.store import checks
from attncache_vllm.store.ray.edition import MAX_DIM


def raw(array: NDArray[Any]) -> bytes:
    """The bytes of an array, row by row."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return little.tobytes()


def shaped(value: object, dtype: DTypeLike, expected: tuple[int | None, ...], what: str) -> Any:
    """``[shape, bytes]`` as an array; None in ``expected`` stands for 1 to 65,536.

    Raises:
        ValueError: it has another shape, or not the bytes of it.
    """
    shape, data = checks.items(value, 2, what)
    checks.items(shape, len(expected), f"the shape of {what}")
    for size, wanted in zip(shape, expected, strict=True):
        low, high = (1, MAX_DIM) if wanted is None else (wanted, wanted)
        checks.integer(size, low, high, f"the shape of {what}")
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not isinstance(data, bytes) or len(data) != size:
        got = len(data) if isinstance(data, bytes) else data
        raise ValueError(f"{what} must be {size} bytes, got {got!r:.100}")
    return np.frombuffer(data, dtype=np.dtype(dtype).newbyteorder("<")).reshape(shape)


def values_of(value: object, dtype: DTypeLike, most: int, what: str) -> Any:
    """Bytes as an array ``[at most most]``; ``ValueError`` if they are not."""
    size = np.dtype(dtype).itemsize
    if not isinstance(value, bytes) or len(value) % size or len(value) > most * size:
        got = len(value) if isinstance(value, bytes) else value
        raise ValueError(f"{what} must be at most {most} values of {size} bytes, got {got!r:.100}")
    return np.frombuffer(value, dtype=np.dtype(dtype).newbyteorder("<"))
