# SPDX-License-Identifier: Apache-2.0
import random
from difflib import SequenceMatcher

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from attncache_vllm.reuse.align import Alignment, align

few_tokens = st.lists(st.integers(0, 3), min_size=1, max_size=60)
many_tokens = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=60)
texts = few_tokens | many_tokens


def ids(tokens: list[int]) -> NDArray[np.int32]:
    return np.array(tokens, dtype=np.int32)


def text(seed: int, length: int) -> list[int]:
    """Tokens as unlike in frequency as words are, so that many of them repeat."""
    draw = random.Random(seed)
    return [int(20 * draw.paretovariate(0.7)) % 49_152 for _ in range(length)]


def edited(tokens: list[int], share: float, seed: int) -> tuple[list[int], dict[int, int]]:
    """A third each of substitutions, insertions and deletions; where the tokens kept came from."""
    draw, result, origin = random.Random(seed), [], {}
    for at, token in enumerate(tokens):
        dice = draw.random()
        if dice < share / 3:
            result.append(draw.choice(tokens))
        elif dice < share:
            if dice < 2 * share / 3:
                origin[len(result)] = at
                result += [token, draw.choice(tokens)]
        else:
            origin[len(result)] = at
            result.append(token)
    return result, origin


def pairs(alignment: Alignment) -> dict[int, int]:
    return dict(zip(alignment.rows.tolist(), alignment.entry_rows.tolist(), strict=True))


@given(texts, texts, st.integers(1, 4))
def test_equal_tokens_are_aligned_in_the_order_of_both(
    tokens: list[int], others: list[int], min_run: int
) -> None:
    found = align(ids(tokens), ids(others), min_run)
    assert (found.length, found.entry_length) == (len(tokens), len(others))
    assert (np.diff(found.rows) > 0).all() and (np.diff(found.entry_rows) > 0).all()
    assert [tokens[i] for i in found.rows] == [others[i] for i in found.entry_rows]
    assert sorted([*found.rows, *found.fresh]) == list(range(len(tokens)))
    assert found.fresh_share == len(found.fresh) / len(tokens)


@given(texts)
def test_a_text_is_aligned_with_itself_token_by_token(tokens: list[int]) -> None:
    found = align(ids(tokens), ids(tokens))
    assert found.rows.tolist() == found.entry_rows.tolist() == list(range(len(tokens)))
    assert (found.prefix, found.fresh_share, len(found.fresh)) == (len(tokens), 0, 0)


@given(texts, texts, texts)
def test_a_common_beginning_and_a_common_end_are_aligned_whatever_their_length(
    first: list[int], second: list[int], common: list[int]
) -> None:
    found = align(ids(common + first), ids(common + second))
    assert found.prefix >= len(common)
    assert found.rows[: found.prefix].tolist() == list(range(found.prefix))
    assert found.entry_rows[: found.prefix].tolist() == list(range(found.prefix))
    found = align(ids([-1, *first, *common]), ids([-2, *second, *common]))
    for back in range(1, len(common) + 1):
        row, entry_row = len(first) + 1 + len(common) - back, len(second) + 1 + len(common) - back
        assert pairs(found)[row] == entry_row


@given(texts, st.integers(0, 59), st.integers(0, 3), st.sampled_from("sid"))
def test_one_edit_costs_one_row(tokens: list[int], at: int, token: int, kind: str) -> None:
    at %= len(tokens)
    changed = [*tokens[:at], *([] if kind == "d" else [token]), *tokens[at + (kind != "i") :]]
    if not changed:
        return
    found = align(ids(changed), ids(tokens))
    assert len(found.rows) >= len(tokens) - (kind != "i")
    assert len(found.fresh) <= (kind != "d")


def test_the_prefix_ends_at_the_first_difference() -> None:
    assert align(ids([1, 2, 3, 9, 5, 6]), ids([1, 2, 3, 4, 5, 6])).prefix == 3
    # Rows after an insertion or a deletion have counterparts, at other positions.
    inserted = align(ids([1, 2, 9, 3, 4]), ids([1, 2, 3, 4]))
    assert (inserted.prefix, pairs(inserted)) == (2, {0: 0, 1: 1, 3: 2, 4: 3})
    deleted = align(ids([1, 2, 5, 6]), ids([1, 2, 9, 5, 6]))
    assert (deleted.prefix, pairs(deleted)) == (2, {0: 0, 1: 1, 2: 3, 3: 4})
    assert align(ids([7, 1, 2, 3]), ids([1, 2, 3])).prefix == 0
    assert align(ids([1]), ids([2])).prefix == 0


def test_a_word_alone_is_no_reason_to_align() -> None:
    # 50 and 60 61 occur once in both; the rest is different.
    tokens = [1, 2, 50, 3, 4, 60, 61, 5]
    others = [11, 50, 12, 13, 14, 60, 61, 15]
    assert pairs(align(ids(tokens), ids(others))) == {5: 5, 6: 6}
    assert pairs(align(ids(tokens), ids(others), min_run=1)) == {2: 1, 5: 5, 6: 6}
    assert pairs(align(ids(tokens), ids(others), min_run=3)) == {}


def test_what_is_repeated_in_a_text_is_found_in_a_gap() -> None:
    # 5 6 occurs on both sides of the anchor 1 2 3, so only a second look can tell which is which.
    tokens = [8, 5, 6, 8, 1, 2, 3, 8, 5, 6, 8, 8]
    others = [7, 5, 6, 7, 1, 2, 3, 7, 5, 6, 7, 7]
    assert pairs(align(ids(tokens), ids(others))) == {i: i for i in (1, 2, 4, 5, 6, 8, 9)}


def test_the_longest_order_common_to_both_wins() -> None:
    # The block 90..93 was moved to the front: keeping it would cost the other three.
    blocks = [list(range(start, start + 4)) for start in (10, 20, 30, 90)]
    tokens = [1, *blocks[3], *blocks[0], 2, *blocks[1], 3, *blocks[2], 4]
    others = [5, *blocks[0], 6, *blocks[1], 7, *blocks[2], 8, *blocks[3], 9]
    found = align(ids(tokens), ids(others))
    assert ids(tokens)[found.rows].tolist() == [*blocks[0], *blocks[1], *blocks[2]]


@pytest.mark.parametrize(
    ("share", "recall", "precision"), [(0.02, 0.995, 0.99), (0.05, 0.98, 0.99), (0.15, 0.93, 0.97)]
)
def test_an_edited_text_finds_its_original_about_as_well_as_difflib(
    share: float, recall: float, precision: float
) -> None:
    right = found_pairs = kept = difflib_right = 0
    for seed in range(6):
        original = text(seed, 400)
        changed, origin = edited(original, share, seed)
        found = pairs(align(ids(changed), ids(original)))
        right += len(found.items() & origin.items())
        found_pairs, kept = found_pairs + len(found), kept + len(origin)
        matcher = SequenceMatcher(None, changed, original, autojunk=False)
        for block in matcher.get_matching_blocks():
            difflib_right += sum(
                origin.get(block.a + at) == block.b + at for at in range(block.size)
            )
    assert right >= recall * kept
    assert right >= precision * found_pairs
    assert right >= (recall - 0.005) * difflib_right


@pytest.mark.parametrize("period", [1, 2, 7])
def test_repetitive_texts_are_aligned_at_both_ends(period: int) -> None:
    repeated = [token % period for token in range(period * 1200)]
    changed = [*repeated[: period * 600], 99, *repeated[period * 600 :]]
    found = align(ids(changed), ids(repeated))
    assert found.fresh.tolist() == [period * 600]
    shorter = align(ids(repeated[: period * 900]), ids(repeated))
    assert shorter.prefix == period * 900


@given(few_tokens, few_tokens, st.booleans())
def test_novelty_is_the_share_of_what_served_rows_see_that_their_stored_rows_did_not(
    tokens: list[int], others: list[int], causal: bool
) -> None:
    found = align(ids(tokens), ids(others))
    total = 0.0
    for row, entry_row in pairs(found).items():
        seen = set(range(row + 1 if causal else len(tokens)))
        saw = set(range(entry_row + 1 if causal else len(others)))
        common = {r for r, e in pairs(found).items() if r in seen and e in saw}
        union = len(seen) + len(saw) - len(common)
        total += 1 - len(common) / union
    assert found.novelty(causal) == pytest.approx(total / len(tokens))


def test_a_common_prefix_is_no_news_to_a_causal_model() -> None:
    longer = align(ids([1, 2, 3, 4, 7, 8]), ids([1, 2, 3, 4, 5]))
    assert longer.novelty(causal=True) == 0
    assert longer.novelty(causal=False) == pytest.approx(4 * (3 / 7) / 6)


@given(few_tokens, few_tokens, st.data())
def test_rows_that_are_not_to_be_served_become_fresh(
    tokens: list[int], others: list[int], data: st.DataObject
) -> None:
    found = align(ids(tokens), ids(others))
    wanted = data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    kept = found.serving(np.array(wanted))
    assert pairs(kept) == {r: e for r, e in pairs(found).items() if wanted[r]}
    assert (kept.length, kept.entry_length) == (len(tokens), len(others))


@pytest.mark.parametrize(
    "tokens", [ids([]), ids([[1, 2]]), np.array([1.0, 2.0])], ids=["empty", "2-D", "float"]
)
def test_what_is_no_text_is_refused(tokens: NDArray[np.int32]) -> None:
    with pytest.raises(ValueError, match=r"^tokens must be \[L\] integers"):
        align(tokens, ids([1, 2]))
    with pytest.raises(ValueError, match=r"entry_tokens must be \[L\] integers"):
        align(ids([1, 2]), tokens)


def test_a_run_of_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="min_run must be at least 1, got 0"):
        align(ids([1]), ids([1]), min_run=0)


@pytest.mark.parametrize(
    ("rows", "entry_rows", "message"),
    [
        ([0, 1], [0], r"entry_rows must be \[M\] int64"),
        ([[0]], [[0]], r"rows must be \[M\] int64"),
        ([0, 3], [0, 1], "rows must be ascending positions below 3"),
        ([-1, 1], [0, 1], "rows must be ascending positions below 3"),
        ([1, 1], [0, 1], "rows must be ascending positions below 3"),
        ([0, 1], [1, 0], "entry_rows must be ascending positions below 4"),
        ([0, 1], [1, 4], "entry_rows must be ascending positions below 4"),
    ],
)
def test_positions_that_do_not_fit_are_refused(
    rows: list[int], entry_rows: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Alignment(3, 4, np.array(rows, dtype=np.int64), np.array(entry_rows, dtype=np.int64))
    with pytest.raises(ValueError, match="int64"):
        Alignment(3, 4, ids([0]), ids([0]))
