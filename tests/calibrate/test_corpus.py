# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attncache_vllm.calibrate.corpus import Text, read_corpus, token_hash
from attncache_vllm.errors import SettingsError

# One line each, as a text file holds them: line ends of any kind would split a text.
texts = st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"])))


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(SettingsError) as caught:
        list(read_corpus(path))
    return str(caught.value)


@given(texts)
def test_texts_are_read_in_order_without_empty_ones(
    tmp_path_factory: pytest.TempPathFactory, given: list[str]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    expected = [Text(text.strip()) for text in given if text.strip()]
    plain = write(folder / "texts.txt", "".join(text + "\n" for text in given))
    assert list(read_corpus(plain)) == expected
    rows = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in given)
    assert list(read_corpus(write(folder / "texts.jsonl", rows))) == expected


def test_pairs_for_cross_encoders_stand_under_their_own_key(tmp_path: Path) -> None:
    rows = [
        {"text": " a query ", "text_pair": " a passage\n"},
        {"text": "alone", "text_pair": None},
        {"text": "with nothing", "text_pair": ""},
        {"text": " ", "text_pair": "a passage of no query"},
    ]
    path = write(tmp_path / "c.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert list(read_corpus(path)) == [
        Text("a query", "a passage"),
        Text("alone"),
        Text("with nothing", ""),
    ]


def test_a_plain_text_is_never_a_pair(tmp_path: Path) -> None:
    path = write(tmp_path / "c.txt", '{"text": "a", "text_pair": "b"}\n')
    assert list(read_corpus(path)) == [Text('{"text": "a", "text_pair": "b"}')]


def test_a_json_text_may_have_many_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", '{"text": "one\\ntwo"}\n\n  \n{"text": "three"}')
    assert list(read_corpus(path)) == [Text("one\ntwo"), Text("three")]


@pytest.mark.parametrize("name", ["texts.csv", "texts", "texts.txt.gz"])
def test_a_file_of_another_kind_is_refused_with_the_remedy(tmp_path: Path, name: str) -> None:
    message = refusal(write(tmp_path / name, "text\n"))
    assert "must be a .jsonl or .txt file" in message
    assert repr(str(tmp_path / name)) in message
    assert 'one JSON object with a "text" per line' in message


@pytest.mark.parametrize(
    "line",
    [
        '{"txt": "a"}',
        '{"text": 3}',
        '{"text": null}',
        '{"text_pair": "a"}',
        '{"text": "a", "text_pair": 3}',
        '{"text": "a", "text_pair": ["b"]}',
        '["text"]',
        '"text"',
        "plain",
        "{",
    ],
)
def test_a_malformed_line_is_refused_by_its_number(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "c.jsonl", f'{{"text": "a"}}\n\n{line}\n{{"text": "b"}}\n')
    texts = read_corpus(path)
    assert next(texts) == Text("a")
    with pytest.raises(SettingsError, match=r"c\.jsonl:3 must be a"):
        next(texts)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert "must be readable: No such file" in refusal(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    assert "must be readable: Is a directory" in refusal(tmp_path / "folder.txt")


def test_a_file_of_another_encoding_is_refused(tmp_path: Path) -> None:
    assert "must be UTF-8" in refusal(write(tmp_path / "c.txt", "Grüße\n".encode("latin-1")))


@given(st.lists(st.integers(0, 2**31 - 1)))
def test_a_sequence_is_known_by_the_hash_of_its_little_endian_token_ids(ids: list[int]) -> None:
    packed = struct.pack(f"<{len(ids)}i", *ids)
    assert token_hash(ids) == hashlib.sha256(packed).digest()
