# SPDX-License-Identifier: Apache-2.0
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attncache_vllm.reuse.match import Match, choose
from attncache_vllm.store import Neighbour

candidate = st.builds(
    Neighbour,
    entry_id=st.integers(0, 20),
    # Few values, so that ties happen; NaN as a damaged index could return it.
    distance=st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0, float("inf"), float("nan")]),
    length=st.integers(1, 12),
)
candidates = st.lists(candidate, max_size=12)
lengths = st.integers(1, 12)
gates = st.sampled_from([0.0, 0.1, 0.3, 1.0])


def has_the_length(entry: Neighbour, length: int, longer: bool) -> bool:
    return entry.length >= length if longer else entry.length == length


@settings(deadline=None)
@given(candidates, lengths, gates, st.booleans())
def test_a_match_is_a_candidate_that_passes_the_gate_and_has_the_length(
    found: list[Neighbour], length: int, gate: float, longer: bool
) -> None:
    match = choose(found, length, gate, longer)
    if match is not None:
        entry = Neighbour(match.entry_id, match.distance, match.entry_length)
        assert entry in found and has_the_length(entry, length, longer)
        assert match.length == length
        assert match.distance <= gate


@settings(deadline=None)
@given(candidates, lengths, gates, st.booleans())
def test_no_eligible_candidate_is_nearer_and_none_is_missed(
    found: list[Neighbour], length: int, gate: float, longer: bool
) -> None:
    eligible = [c for c in found if has_the_length(c, length, longer) and c.distance <= gate]
    match = choose(found, length, gate, longer)
    if match is None:
        assert not eligible
    else:
        assert match.distance == min(c.distance for c in eligible)


@settings(deadline=None)
@given(candidates, lengths, gates, st.booleans(), st.randoms(use_true_random=False))
def test_the_order_of_candidates_does_not_matter(
    found: list[Neighbour], length: int, gate: float, longer: bool, random: Random
) -> None:
    shuffled = random.sample(found, len(found))
    assert choose(shuffled, length, gate, longer) == choose(found, length, gate, longer)


@settings(deadline=None)
@given(candidates, lengths, st.booleans())
def test_a_wider_gate_never_loses_or_changes_a_match(
    found: list[Neighbour], length: int, longer: bool
) -> None:
    narrow = choose(found, length, 0.1, longer)
    assert narrow is None or choose(found, length, 1.0, longer) == narrow


def test_a_distance_equal_to_the_gate_passes() -> None:
    match = Match(7, 0.25, length=9, entry_length=9)
    assert choose([Neighbour(7, 0.25, 9)], 9, 0.25, longer=False) == match


def test_of_equally_near_entries_the_shortest_wins() -> None:
    found = [Neighbour(1, 0.1, 90), Neighbour(3, 0.1, 50), Neighbour(2, 0.1, 50)]
    assert choose(found, 40, 1.0, longer=True) == Match(2, 0.1, length=40, entry_length=50)


def test_a_nearer_entry_of_another_length_may_have_to_wait() -> None:
    found = [Neighbour(1, 0.1, 41), Neighbour(2, 0.2, 39), Neighbour(3, 0.3, 40)]
    assert choose(found, 40, 1.0, longer=True) == Match(1, 0.1, length=40, entry_length=41)
    assert choose(found, 40, 1.0, longer=False) == Match(3, 0.3, length=40, entry_length=40)


def test_nothing_stored_is_no_match() -> None:
    assert choose([], 5, 1.0, longer=True) is None


@pytest.mark.parametrize("length", [0, -3])
def test_an_empty_sequence_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="length must be at least 1"):
        choose([], length, 1.0, longer=True)
