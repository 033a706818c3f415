# SPDX-License-Identifier: Apache-2.0
"""Choosing among candidates whose fidelity is given."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attncache_vllm.calibrate.budget import Budget
from attncache_vllm.calibrate.choose import (
    HALVINGS,
    HOPELESS,
    SHARES,
    Candidate,
    best_first,
    by_layer,
    candidates,
    every_layer,
    first_that_passes,
    measure_curve,
    points,
    table,
)
from attncache_vllm.calibrate.fidelity import Fidelity
from attncache_vllm.calibrate.saving import SavingModel, by_damage_per_saving
from attncache_vllm.reuse.layout import MapLayout, Mask

NUM_LAYERS = 12
SAVING = SavingModel({i: MapLayout(4, 2, Mask()) for i in range(10)}, 16, 4, NUM_LAYERS, 20)
BUDGET = Budget(0.9, 0.8)

damages_of_groups = st.fixed_dictionaries(
    {(layer, group): st.floats(0, 1) for layer in range(10) for group in range(2)}
)


def candidate(size: int, saving: float | None = None) -> Candidate:
    return Candidate(
        f"groups {size}", {0: (0,)}, size / 10, size / 10 if saving is None else saving
    )


def kept(rank: float, found: float = 1.0, task: float | None = None) -> Fidelity:
    return Fidelity(0.5, rank, found, task)


def members_of(item: Candidate) -> set[tuple[int, int]]:
    return {(layer, group) for layer, of_layer in item.groups.items() for group in of_layer}


@given(damages_of_groups, st.booleans())
def test_candidates_are_nested_and_as_large_as_the_shares_of_a_curve(
    damages: dict[tuple[int, int], float], whole_layers: bool
) -> None:
    parcels = by_damage_per_saving(damages, SAVING, whole_layers)
    found = candidates(parcels, SAVING)
    sets = [members_of(item) for item in found]
    assert all(smaller < larger for smaller, larger in pairwise(sets))
    assert sets[-1] == set(damages)
    total = 2 * NUM_LAYERS
    sizes = {min(len(damages), round(share * total)) for share in SHARES}
    if whole_layers:
        sizes = {max(2, size // 2 * 2) for size in sizes}
    assert {len(item) for item in sets} == sizes
    for item, members in zip(found, sets, strict=True):
        whole = sum(len(of_layer) == 2 for of_layer in item.groups.values())
        assert item.name == f"{whole} whole layers, {len(members)} KV groups"
        assert item.groups_share == pytest.approx(len(members) / total)
        assert item.saving == pytest.approx(SAVING.share(item.groups))
        taken = {part for parcel in parcels for part in parcel if part in members}
        first = [part for parcel in parcels for part in parcel][: len(members)]
        assert taken == set(first), "the cheapest first"


def test_a_first_parcel_is_a_candidate_however_large() -> None:
    parcels = [tuple((0, group) for group in range(2))]
    small = SavingModel({0: MapLayout(4, 2, Mask())}, 16, 4, 1, 20)
    assert [item.groups for item in candidates(parcels, small)] == [{0: (0, 1)}]


@given(st.permutations([(0, 1), (2, 0), (2, 1), (5, 0)]))
def test_groups_by_layer_ascend_whatever_the_order(items: list[tuple[int, int]]) -> None:
    groups = by_layer(items)
    assert list(groups.items()) == [(0, (1,)), (2, (0, 1)), (5, (0,))]
    assert every_layer(groups, 6) == ((1,), (), (0, 1), (), (), (0,))


def sets_of(shares: Sequence[float], total: int = 24) -> list[Candidate]:
    """Candidates of whole numbers of groups, of ``total``."""
    sizes = dict.fromkeys(round(share * total) for share in shares)
    return [Candidate(f"{n} groups", {0: tuple(range(n))}, n / total, n / total) for n in sizes]


def size_of(item: Candidate) -> int:
    return len(item.groups[0])


def test_a_curve_ends_where_it_does_not_come_back() -> None:
    ranks = [0.99, BUDGET.rank - HOPELESS / 2, 0.95, BUDGET.rank - HOPELESS - 0.01]
    first = [round(share * 24) for share in SHARES[:4]]
    given_ = dict(zip(first, ranks, strict=True))
    curve = measure_curve(sets_of, BUDGET, lambda item: kept(given_.get(size_of(item), 0.91)))
    # A dip is passed, what is hopeless is the last that is shown.
    assert [size_of(item) for item, _ in curve] == [6, 8, 12, 14, 15, 16]
    ranks = [point["rank_fidelity"] for point in points(curve)]
    assert ranks == [0.99, 0.897, 0.95, 0.91, 0.91, 0.884]


@given(st.integers(0, 40))
def test_the_gap_between_inside_and_outside_is_halved(largest: int) -> None:
    asked: list[int] = []

    def measure(item: Candidate) -> Fidelity:
        asked.append(size_of(item))
        return kept(0.95 if size_of(item) <= largest else 0.895)

    curve = measure_curve(sets_of, BUDGET, measure)
    sizes = [size_of(item) for item, _ in curve]
    assert sizes == sorted(set(sizes)) and sorted(asked) == sizes, "none twice"
    inside = max((size for size in sizes if size <= largest), default=0)
    outside = min((size for size in sizes if size > largest), default=None)
    shown = sorted({0, *(round(share * 24) for share in SHARES)})
    if outside is not None:
        before = max(size for size in shown if size <= largest)
        gap = min(size for size in shown if size > largest) - before
        assert outside - inside <= max(1, -(-gap // 2**HALVINGS))


def test_a_curve_of_a_task_ends_with_the_task() -> None:
    changes = {6: 0.01, 7: -0.02, 8: -0.08}
    budget = Budget(0.0, 0.0, task=0.02)
    curve = measure_curve(sets_of, budget, lambda item: kept(0.1, 0.1, changes[size_of(item)]))
    assert [point["task_change"] for point in points(curve)] == [0.01, -0.02, -0.08]
    assert [size_of(item) for item in best_first(curve, budget)] == [7, 6]
    assert "task_change" not in points([(candidate(1), kept(0.9))])[0]


@given(st.lists(st.integers(1, 24), unique=True), st.integers(0, 24))
def test_below_what_fails_the_gap_to_what_passes_is_halved(sizes: list[int], largest: int) -> None:
    asked: list[int] = []

    def check(item: Candidate) -> str | None:
        asked.append(size_of(item))
        return item.name if size_of(item) <= largest else None

    ordered = sets_of([size / 24 for size in sorted(sizes, reverse=True)])
    found = first_that_passes(
        ordered, lambda shares: [s for s in sets_of(shares) if size_of(s)], check
    )
    passing = [size for size in sizes if size <= largest]
    failing = [size for size in sizes if size > largest]
    assert len(set(asked)) == len(asked), "none twice"
    if found is None:
        assert not passing
        assert not failing or min(asked) <= max(1, -(-min(failing) // 4)) or largest == 0
        return
    item, what = found
    assert what == item.name and size_of(item) <= largest
    assert size_of(item) >= max(passing, default=1)
    if not failing:
        assert asked == [max(passing)]


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0.8, 1), st.floats(0.7, 1)), max_size=12),
)
def test_what_is_inside_the_budget_is_tried_by_its_saving(
    given_: list[tuple[float, float, float]],
) -> None:
    curve = [
        (candidate(number, saving), kept(rank, found))
        for number, (saving, rank, found) in enumerate(given_)
    ]
    best = best_first(curve, BUDGET)
    inside = [item for item, fidelity in curve if BUDGET.holds(fidelity)]
    assert sorted(item.name for item in best) == sorted(item.name for item in inside)
    assert all(before.saving >= after.saving for before, after in pairwise(best))


def test_damages_are_shown_by_layer_and_group() -> None:
    damages = {(2, 1): 0.5, (0, 0): 0.123456789, (2, 0): 0.25}
    assert table(damages, 4) == [[0.123457], [], [0.25, 0.5], []]
