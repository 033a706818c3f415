# SPDX-License-Identifier: Apache-2.0
"""How alike two sets of embeddings are."""

import numpy as np
from numpy.typing import NDArray


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine ``[B]`` of each row of ``a`` with the same row of ``b``, computed in float64."""
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(wide_a, axis=1) * np.linalg.norm(wide_b, axis=1)
    cosine: NDArray[np.float64] = (wide_a * wide_b).sum(axis=1) / norms
    return cosine
