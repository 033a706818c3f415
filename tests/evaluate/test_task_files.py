# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attncache_vllm.errors import SettingsError
from attncache_vllm.evaluate.files import (
    Edited,
    Labelled,
    Pair,
    Prompt,
    read_edits,
    read_labels,
    read_pairs,
    read_prompts,
    read_texts,
    write_rows,
)

Reader = Callable[[Path], list[Any]]


def test_texts_are_read_once_each_in_their_order(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"text": t} for t in ("b", "a", "b")])
    assert read_texts(path) == ["b", "a"]


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    separator = "a\u2028b"  # ends a line for str.splitlines, not for JSON lines
    path = tmp_path / "p.jsonl"
    path.write_text(
        f'{{"text": "{separator}", "text_pair": "c", "score": 2}}\n\n'
        '{"text": "x", "text_pair": "y", "score": 0.5, "more": 1}\n',
        encoding="utf-8",
    )
    assert read_pairs(path) == [Pair(separator, "c", 2.0), Pair("x", "y", 0.5)]


def test_of_equal_texts_the_first_counts(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "a", "label": 2}, {"text": "b", "label": "x"}]
    assert read_labels(write_rows(tmp_path / "l", rows)) == [Labelled("a", 1), Labelled("b", "x")]
    edits = [{"text": "a", "original": "b"}, {"text": "a", "original": "c"}]
    assert read_edits(write_rows(tmp_path / "e", edits)) == [Edited("a", "b")]


def test_prompts_keep_their_choices_in_order(tmp_path: Path) -> None:
    row = {"text": "?", "choices": [" A", " B"], "answer": 1}
    assert read_prompts(write_rows(tmp_path / "p", [row])) == [Prompt("?", (" A", " B"), 1)]


@pytest.mark.parametrize(
    ("reader", "row", "said"),
    [
        (read_pairs, {"text": "a", "text_pair": "b"}, '"score" (int or float)'),
        (read_pairs, {"text": "a", "text_pair": "b", "score": True}, '"score"'),
        (read_labels, {"text": "a", "label": 1.5}, '"label" (str or int)'),
        (read_labels, {"text": "a", "label": 1, "split": "dev"}, "'dev'"),
        (read_prompts, {"text": "a", "choices": ["x"], "answer": 1}, "counted from 0"),
        (read_prompts, {"text": "a", "choices": [1], "answer": 0}, "must be strings"),
        (read_edits, {"text": "a"}, '"original" (str)'),
        (read_edits, ["a"], "must be an object"),
    ],
)
def test_a_row_that_does_not_fit_is_named_with_its_line(
    tmp_path: Path, reader: Reader, row: Any, said: str
) -> None:
    good = {"text": "g", "text_pair": "h", "score": 1, "label": 0, "split": "fit"}
    good |= {"choices": ["x"], "answer": 0, "original": "o"}
    path = write_rows(tmp_path / "rows.jsonl", [good, row])
    with pytest.raises(SettingsError, match=r"rows\.jsonl:2") as error:
        reader(path)
    assert said in str(error.value)


def test_a_split_stands_in_all_rows_or_in_none(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1, "split": "fit"}, {"text": "b", "label": 2}]
    with pytest.raises(SettingsError, match="or none"):
        read_labels(write_rows(tmp_path / "l", rows))


def test_an_unreadable_file_and_a_broken_line_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="readable"):
        read_pairs(tmp_path / "absent.jsonl")
    (tmp_path / "broken").write_text('{"text": ')
    with pytest.raises(SettingsError, match="broken:1 must be a JSON object"):
        read_edits(tmp_path / "broken")
