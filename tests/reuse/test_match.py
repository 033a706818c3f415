# SPDX-License-Identifier: Apache-2.0
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attncache_vllm.reuse.align import Alignment, align
from attncache_vllm.reuse.match import (
    MIN_REUSED,
    AlignedGate,
    AlignedMatch,
    Match,
    best_aligned,
    nearest,
)
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
    match = nearest(found, length, gate, longer)
    if match is not None:
        entry = Neighbour(match.entry_id, match.distance, match.length)
        assert entry in found and has_the_length(entry, length, longer)
        assert match.distance <= gate


@settings(deadline=None)
@given(candidates, lengths, gates, st.booleans())
def test_no_eligible_candidate_is_nearer_and_none_is_missed(
    found: list[Neighbour], length: int, gate: float, longer: bool
) -> None:
    eligible = [c for c in found if has_the_length(c, length, longer) and c.distance <= gate]
    match = nearest(found, length, gate, longer)
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
    assert nearest(shuffled, length, gate, longer) == nearest(found, length, gate, longer)


@settings(deadline=None)
@given(candidates, lengths, st.booleans())
def test_a_wider_gate_never_loses_or_changes_a_match(
    found: list[Neighbour], length: int, longer: bool
) -> None:
    narrow = nearest(found, length, 0.1, longer)
    assert narrow is None or nearest(found, length, 1.0, longer) == narrow


def test_a_distance_equal_to_the_gate_passes() -> None:
    match = Match(7, length=9, distance=0.25)
    assert nearest([Neighbour(7, 0.25, 9)], 9, 0.25, longer=False) == match


def test_of_equally_near_entries_the_shortest_wins() -> None:
    found = [Neighbour(1, 0.1, 90), Neighbour(3, 0.1, 50), Neighbour(2, 0.1, 50)]
    assert nearest(found, 40, 1.0, longer=True) == Match(2, 50, 0.1)


def test_a_nearer_entry_of_another_length_may_have_to_wait() -> None:
    found = [Neighbour(1, 0.1, 41), Neighbour(2, 0.2, 39), Neighbour(3, 0.3, 40)]
    assert nearest(found, 40, 1.0, longer=True) == Match(1, 41, 0.1)
    assert nearest(found, 40, 1.0, longer=False) == Match(3, 40, 0.3)


def test_nothing_stored_is_no_match() -> None:
    assert nearest([], 5, 1.0, longer=True) is None


@pytest.mark.parametrize("length", [0, -3])
def test_an_empty_sequence_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="length must be at least 1"):
        nearest([], length, 1.0, longer=True)


# -- entries that share tokens -----------------------------------------------------------------


def aligned(tokens: list[int], entry: list[int]) -> Alignment:
    return align(np.array(tokens, np.int32), np.array(entry, np.int32))


def rows_of(alignment: Alignment | None) -> list[int] | None:
    return None if alignment is None else alignment.rows.tolist()


ENTRY = list(range(100, 120))
EDITED = [*ENTRY[:10], 1, *ENTRY[11:]]


def test_rows_that_a_pooler_may_read_alone_are_computed_unless_the_map_is_the_texts_own() -> None:
    everything = AlignedGate(True, 1.0, 1.0, 0.0).match(7, aligned(ENTRY, ENTRY))
    assert (everything.entry_id, rows_of(everything.aligned)) == (7, list(range(20)))
    assert everything.reused == 1

    causal = AlignedGate(True, 1.0, 1.0, 0.0).match(7, aligned(EDITED, ENTRY))
    assert rows_of(causal.aligned) == [*range(10), *range(11, 19)]
    both = AlignedGate(False, 1.0, 1.0, 0.0).match(7, aligned(EDITED, ENTRY))
    assert rows_of(both.aligned) == [*range(1, 10), *range(11, 19)]
    # Where an entry goes on, its first rows are the shorter text's in a causal model only.
    shorter = AlignedGate(True, 1.0, 0.5, 0.5).match(7, aligned(ENTRY[:15], ENTRY))
    assert rows_of(shorter.aligned) == rows_of(shorter.prefix) == list(range(15))
    assert shorter.reused == 1
    bidirectional = AlignedGate(False, 1.0, 1.0, 0.0).match(7, aligned(ENTRY[:15], ENTRY))
    assert rows_of(bidirectional.aligned) == list(range(1, 14))
    longer = AlignedGate(True, 1.0, 0.5, 0.5).match(7, aligned([*ENTRY, 1], ENTRY))
    assert rows_of(longer.aligned) == rows_of(longer.prefix) == list(range(20))


def test_a_prefix_serves_as_far_as_it_is_exact_and_causal_models_only() -> None:
    alignment = aligned(EDITED, ENTRY)
    match = AlignedGate(True, 1.0, 0.5, 0.25).match(7, alignment)
    assert rows_of(match.prefix) == list(range(10))
    assert match.reused == pytest.approx((0.5 * 18 + 0.25 * 10) / 20)
    assert AlignedGate(False, 1.0, 0.5, 0.25).match(7, alignment).prefix is None
    assert AlignedGate(False, 1.0, 0.5, 0.25).match(7, aligned(ENTRY, ENTRY)).prefix is None
    other_start = aligned([1, *ENTRY[1:]], ENTRY)
    assert AlignedGate(True, 1.0, 0.5, 0.25).match(7, other_start).prefix is None
    # Nothing is served of groups that the plan does not have.
    assert AlignedGate(True, 1.0, 0.5, 0.0).match(7, alignment).prefix is None
    assert AlignedGate(True, 1.0, 0.0, 0.25).match(7, alignment).aligned is None


def test_what_is_too_novel_is_not_aligned_but_its_prefix_serves() -> None:
    alignment = aligned(EDITED, ENTRY)
    novelty = AlignedGate(True, 1.0, 1.0, 0.0).match(7, alignment).aligned.novelty(True)  # type: ignore[union-attr]
    assert 0 < novelty < 0.1
    within = AlignedGate(True, novelty, 0.5, 0.5).match(7, alignment)
    beyond = AlignedGate(True, novelty * 0.99, 0.5, 0.5).match(7, alignment)
    assert rows_of(within.aligned) == [*range(10), *range(11, 19)]
    assert (beyond.aligned, rows_of(beyond.prefix)) == (None, list(range(10)))
    assert beyond.reused == pytest.approx(0.5 * 10 / 20)


def match_of(entry_id: int, reused: float) -> AlignedMatch:
    return AlignedMatch(entry_id, None, None, reused)


def test_the_best_match_computes_the_fewest_rows_and_of_equals_has_the_lowest_id() -> None:
    found = [match_of(1, 0.5), match_of(4, 0.75), match_of(3, 0.75), match_of(2, 0.7)]
    best = best_aligned(found)
    assert best is not None and best.entry_id == 3
    assert best_aligned(reversed(found)) is best
    assert best_aligned([]) is None


def test_a_match_that_spares_too_little_is_none() -> None:
    least = match_of(1, MIN_REUSED)
    assert best_aligned([least]) is least
    assert best_aligned([match_of(1, MIN_REUSED * 0.99)]) is None
    assert best_aligned([least], at_least=MIN_REUSED * 1.01) is None
    assert best_aligned([least, match_of(2, 0.5)], at_least=0.5) is not None
