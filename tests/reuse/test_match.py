# SPDX-License-Identifier: Apache-2.0
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attncache_vllm.reuse.match import Candidate, Match, choose

candidate = st.builds(
    Candidate,
    entry_id=st.integers(0, 20),
    # Few values, so that ties happen; NaN as a damaged index could return it.
    distance=st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0, float("inf"), float("nan")]),
    length=st.integers(1, 12),
)
candidates = st.lists(candidate, max_size=12)
lengths = st.integers(1, 12)
gates = st.sampled_from([0.0, 0.1, 0.3, 1.0])


@settings(deadline=None)
@given(candidates, lengths, gates)
def test_a_match_is_a_candidate_that_passes_the_gate_and_is_long_enough(
    found: list[Candidate], length: int, gate: float
) -> None:
    match = choose(found, length, gate)
    if match is not None:
        assert Candidate(match.entry_id, match.distance, match.entry_length) in found
        assert match.length == length <= match.entry_length
        assert match.distance <= gate


@settings(deadline=None)
@given(candidates, lengths, gates)
def test_no_eligible_candidate_is_nearer_and_none_is_missed(
    found: list[Candidate], length: int, gate: float
) -> None:
    eligible = [c for c in found if c.length >= length and c.distance <= gate]
    match = choose(found, length, gate)
    if match is None:
        assert not eligible
    else:
        assert match.distance == min(c.distance for c in eligible)


@settings(deadline=None)
@given(candidates, lengths, gates, st.randoms(use_true_random=False))
def test_the_order_of_candidates_does_not_matter(
    found: list[Candidate], length: int, gate: float, random: Random
) -> None:
    shuffled = random.sample(found, len(found))
    assert choose(shuffled, length, gate) == choose(found, length, gate)


@settings(deadline=None)
@given(candidates, lengths)
def test_a_wider_gate_never_loses_or_changes_a_match(found: list[Candidate], length: int) -> None:
    narrow = choose(found, length, 0.1)
    assert narrow is None or choose(found, length, 1.0) == narrow


def test_a_distance_equal_to_the_gate_passes() -> None:
    assert choose([Candidate(7, 0.25, 9)], 9, 0.25) == Match(7, 0.25, length=9, entry_length=9)


def test_of_equally_near_entries_the_shortest_wins() -> None:
    found = [Candidate(1, 0.1, 90), Candidate(3, 0.1, 50), Candidate(2, 0.1, 50)]
    assert choose(found, 40, 1.0) == Match(2, 0.1, length=40, entry_length=50)


def test_nothing_stored_is_no_match() -> None:
    assert choose([], 5, 1.0) is None


@pytest.mark.parametrize("length", [0, -3])
def test_an_empty_sequence_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="length must be at least 1"):
        choose([], length, 1.0)
