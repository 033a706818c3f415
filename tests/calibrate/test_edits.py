# SPDX-License-Identifier: Apache-2.0
from difflib import SequenceMatcher

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attncache_vllm.calibrate.edits import edit, vocabulary_of

TEXT = np.arange(3000, dtype=np.int32)
NEW = range(10_000, 10_100)  # tokens that the text does not have


@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 9))
def test_a_copy_begins_and_ends_as_its_text_and_keeps_its_order(
    length: int, rate: float, seed: int
) -> None:
    copy = edit(TEXT[:length], rate, NEW, (seed,))
    assert copy.dtype == np.int32
    assert (copy[0], copy[-1]) == (TEXT[0], TEXT[length - 1])
    kept = copy[copy < len(TEXT)]
    assert (np.diff(kept) > 0).all()
    assert set(kept) <= set(range(length))
    assert np.isin(copy[copy >= len(TEXT)], NEW).all()


def test_no_edits_are_the_text_itself() -> None:
    assert np.array_equal(edit(TEXT, 0, NEW, (0,)), TEXT)


@pytest.mark.parametrize("rate", [0.05, 0.3, 1.0])
def test_a_third_of_the_edits_each_is_replaced_added_and_deleted(rate: float) -> None:
    copy = edit(TEXT, rate, NEW, (0,))
    kept, new = int((copy < len(TEXT)).sum()), int((copy >= len(TEXT)).sum())
    edits = rate * len(TEXT)
    margin = 3 * edits**0.5
    # Replaced and deleted are gone, replaced and added are new.
    assert len(TEXT) - kept == pytest.approx(edits * 2 / 3, abs=margin)
    assert new == pytest.approx(edits * 2 / 3, abs=margin)


def test_edits_are_spread_over_the_text() -> None:
    copy = edit(TEXT, 0.05, NEW, (0,))
    blocks = SequenceMatcher(None, TEXT.tolist(), copy.tolist(), autojunk=False)
    assert max(block.size for block in blocks.get_matching_blocks()) < len(TEXT) / 10


def test_a_copy_is_a_function_of_its_seed() -> None:
    assert np.array_equal(edit(TEXT, 0.1, NEW, (1, 2)), edit(TEXT, 0.1, NEW, (1, 2)))
    assert not np.array_equal(edit(TEXT, 0.1, NEW, (1, 2)), edit(TEXT, 0.1, NEW, (1, 3)))


@pytest.mark.parametrize(
    ("rate", "vocabulary"), [(-0.1, NEW), (1.1, NEW), (float("nan"), NEW), (0.1, [])]
)
def test_a_rate_or_vocabulary_that_makes_no_edit_is_refused(
    rate: float, vocabulary: range | list[int]
) -> None:
    with pytest.raises(ValueError, match="a rate from 0 to 1 and tokens to draw from, got"):
        edit(TEXT, rate, vocabulary, (0,))


def test_the_vocabulary_is_what_the_texts_are_made_of_less_what_stands_for_no_text() -> None:
    texts = [np.array([0, 7, 5, 7], dtype=np.int32), np.array([5, 9], dtype=np.int32)]
    assert vocabulary_of(texts, {0, 9, 11}) == [5, 7]
