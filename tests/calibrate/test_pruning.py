# SPDX-License-Identifier: Apache-2.0
"""How much of a layer's maps may be left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from attncache_vllm.calibrate.pruning import GROWTH, LADDER, choose_shares, every_share

STEP = 0.9 * GROWTH


def grows_from(limit: float, share: float) -> Sequence[float]:
    """Errors of two texts whose mean is 1, a little more up to ``limit``, and too much above."""
    mean = 1.0 if not share else 1 + (STEP if share <= limit else 2 * GROWTH)
    return [mean - 0.5, mean + 0.5]


def test_each_layer_loses_as_much_as_its_own_error_allows() -> None:
    limits = {0: 0.0, 1: LADDER[0], 2: LADDER[2], 5: 1.0}
    shares = choose_shares(
        lambda share: {layer: grows_from(limit, share) for layer, limit in limits.items()}
    )
    assert shares == {0: 0.0, 1: LADDER[0], 2: LADDER[2], 5: LADDER[-1]}


def test_what_looks_fine_again_above_a_share_that_was_too_much_is_luck() -> None:
    def errors_at(share: float) -> Mapping[int, Sequence[float]]:
        return {0: [1 + 2 * GROWTH * (share == LADDER[1])], 1: [1.0]}

    assert choose_shares(errors_at)[0] == LADDER[0]


def test_nothing_more_is_measured_once_no_layer_is_left() -> None:
    asked = []

    def errors_at(share: float) -> Mapping[int, Sequence[float]]:
        asked.append(share)
        return {0: [1.0 + share]}

    assert choose_shares(errors_at) == {0: LADDER[0]}
    assert asked == [0.0, *LADDER[:2]]


@pytest.mark.parametrize("served", [(), (1,), (0, 1, 2)])
def test_a_plan_has_a_share_for_each_layer_that_serves(served: tuple[int, ...]) -> None:
    shares = every_share({0: 0.1, 1: 0.2}, {layer: (0,) for layer in served}, 3)
    assert shares == tuple({0: 0.1, 1: 0.2}.get(i, 0.0) if i in served else 0.0 for i in range(3))
