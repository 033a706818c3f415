# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from map_samples import sees

from attncache_vllm.calibrate.saving import SavingModel, by_damage_per_saving
from attncache_vllm.reuse.layout import MapLayout, Mask

HIDDEN, HEAD_SIZE, LENGTH = 12, 4, 10
LAYOUTS = {
    1: MapLayout(6, 3, Mask()),
    2: MapLayout(6, 3, Mask(window=4)),
    4: MapLayout(6, 3, Mask(causal=False)),
}
MODEL = SavingModel(LAYOUTS, HIDDEN, HEAD_SIZE, num_layers=5, length=LENGTH)
groups_of_layers = st.dictionaries(
    st.sampled_from(sorted(LAYOUTS)), st.sets(st.integers(0, 2)).map(lambda g: tuple(sorted(g)))
)


def products(layout: MapLayout, groups: tuple[int, ...] = ()) -> int:
    """Multiplications of a layer counted one by one, where ``groups`` are served."""
    count = 0
    visible = sum(sees(layout.mask, i, j) for i in range(LENGTH) for j in range(LENGTH))
    for head in range(layout.num_heads):
        served = head // layout.group in groups
        count += 0 if served else LENGTH * HIDDEN * HEAD_SIZE  # its queries
        count += 0 if served else visible * HEAD_SIZE  # its scores
        count += visible * HEAD_SIZE  # times V
        count += LENGTH * HEAD_SIZE * HIDDEN  # output projection
    for kv_head in range(layout.num_kv_heads):
        count += 0 if kv_head in groups else LENGTH * HIDDEN * HEAD_SIZE  # keys
        count += LENGTH * HIDDEN * HEAD_SIZE  # values
    return count


@given(groups_of_layers)
def test_the_share_is_that_of_multiplications_counted_one_by_one(
    groups: dict[int, tuple[int, ...]],
) -> None:
    exact = sum(products(layout) for layout in LAYOUTS.values())
    reused = sum(products(layout, groups.get(layer, ())) for layer, layout in LAYOUTS.items())
    # The two layers that cannot be served are taken for average ones.
    assert MODEL.share(groups) == pytest.approx((exact - reused) / exact * 3 / 5, abs=1e-12)


def test_a_layer_that_is_served_inside_saves_its_scores_only() -> None:
    inside = replace(MODEL, around=False)
    scores = LAYOUTS[1].mask.cells(LENGTH) * HEAD_SIZE * 2
    assert [inside.saved(1, groups) for groups in (1, 2, 3)] == [scores, 2 * scores, 3 * scores]
    projections = (2 + 1) * LENGTH * HIDDEN * HEAD_SIZE  # queries and keys of a group
    assert [MODEL.saved(1, groups) for groups in (1, 2, 3)] == [
        groups * (scores + projections) for groups in (1, 2, 3)
    ]


damages_of_groups = st.fixed_dictionaries(
    {(layer, group): st.floats(-1, 1) for layer in LAYOUTS for group in range(3)}
)


@given(damages_of_groups, st.booleans())
def test_parcels_hold_every_group_once_and_the_best_bargain_comes_first(
    damages: dict[tuple[int, int], float], whole_layers: bool
) -> None:
    parcels = by_damage_per_saving(damages, MODEL, whole_layers)
    assert sorted(chain.from_iterable(parcels)) == sorted(damages)
    if whole_layers:
        assert sorted(parcels) == [tuple((layer, g) for g in range(3)) for layer in LAYOUTS]
    else:
        assert {len(parcel) for parcel in parcels} == {1}
    rates = [
        sum(max(0.0, damages[item]) for item in parcel) / MODEL.saved(parcel[0][0], len(parcel))
        for parcel in parcels
    ]
    assert all(before <= after for before, after in pairwise(rates))


def test_of_equal_damage_the_larger_saving_comes_first() -> None:
    damages = {(layer, group): 0.1 for layer in LAYOUTS for group in range(3)}
    parcels = by_damage_per_saving(damages, MODEL, whole_layers=True)
    # Nothing hidden, half of it hidden, all but a window hidden.
    assert [parcel[0][0] for parcel in parcels] == [4, 1, 2]


def test_what_seems_to_help_is_worth_no_more_than_what_does_nothing() -> None:
    damages = {(1, 0): -0.5, (1, 1): 0.0, (1, 2): 0.1, (2, 0): -0.1}
    order = [parcel[0] for parcel in by_damage_per_saving(damages, MODEL, whole_layers=False)]
    assert order == [(1, 0), (1, 1), (2, 0), (1, 2)]
