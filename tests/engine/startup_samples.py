# SPDX-License-Identifier: Apache-2.0
"""What the tests of starting an engine count and compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from attention_samples import (
    make_model,
    run_model,
    whole,
)
from batches import counted
from torch import Tensor

from attncache_vllm.errors import (
    AttnCacheError,
)

# Of the map, which is kept in bfloat16, in each of two layers.
TOLERANCE = 4 * 2**-9


def outcomes() -> dict[str, float]:
    names = ("hit", "miss", "bypass")
    return {name: counted("attncache_sequences_total", outcome=name) for name in names}


def since(before: dict[str, float]) -> dict[str, float]:
    return {
        name: count - before[name] for name, count in outcomes().items() if count - before[name]
    }


def tokens_computed(model: Any) -> list[int]:
    """Tokens that each layer has projected to queries, keys and values since it was asked last."""
    projections = [layer.self_attn.qkv_proj for layer in model.model.layers]
    computed = [projection.tokens_computed for projection in projections]
    for projection in projections:
        projection.tokens_computed = 0
    return computed


def exact(rows: Tensor) -> Tensor:
    return run_model(make_model(), [whole(rows)])


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def refusal(kind: type[AttnCacheError], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)
