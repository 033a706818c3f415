# SPDX-License-Identifier: Apache-2.0
"""Texts to build and calibrate a store from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

from attncache_vllm.errors import SettingsError
from attncache_vllm.store import token_hash

__all__ = ["Text", "how_many", "read_corpus", "token_hash"]


@dataclass(frozen=True)
class Text:
    """A text, or the pair of texts that a cross-encoder scores as one sequence."""

    text: str
    pair: str | None = None


def read_corpus(path: Path) -> Iterator[Text]:
    """Yield the texts of a corpus, in order, empty ones left out.

    ``.jsonl`` holds one object per line with a string under ``text`` and, for cross-encoders,
    another under ``text_pair``; ``.txt`` holds one text per line.

    Raises:
        SettingsError: another ending, an unreadable file or a malformed line (with its number).
    """
    if path.suffix not in {".jsonl", ".txt"}:
        raise SettingsError(
            f"a corpus must be a .jsonl or .txt file, got {str(path)!r}; write one JSON object "
            'with a "text" per line, or one plain text per line'
        )
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                text = Text(line.strip()) if path.suffix == ".txt" else _row(line, path, number)
                if text.text:
                    yield text
    except OSError as error:
        raise SettingsError(
            f"the corpus must be readable: {error.strerror}, got {str(path)!r}"
        ) from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"the corpus {str(path)!r} must be UTF-8: {error}") from None


def _row(line: str, path: Path, number: int) -> Text:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise SettingsError(f"{path}:{number} must be a JSON object: {error}") from None
    text, pair = (row.get("text"), row.get("text_pair")) if isinstance(row, dict) else (None, None)
    if not isinstance(text, str) or not isinstance(pair, str | None):
        raise SettingsError(
            f'{path}:{number} must be an object with a string under "text" (and, for pairs, one '
            f'under "text_pair"), got {line[:80]!r}'
        )
    return Text(text.strip(), None if pair is None else pair.strip())


def how_many(texts: Sequence[Sized], max_tokens: int) -> int:
    """How many of the first texts have at most ``max_tokens`` together; the first in any case."""
    total = 0
    for number, tokens in enumerate(texts):
        total += len(tokens)
        if total > max_tokens:
            return max(1, number)
    return len(texts)
