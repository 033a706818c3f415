# SPDX-License-Identifier: Apache-2.0
"""The user's files of pairs, labels, prompts and edited texts: one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attncache_vllm.calibrate.corpus import read_corpus
from attncache_vllm.errors import SettingsError

Kinds = type | tuple[type, ...]


@dataclass(frozen=True)
class Pair:
    """Two texts and how alike they should be found; only the order of scores counts."""

    text: str
    text_pair: str
    score: float


@dataclass(frozen=True)
class Labelled:
    """A text and its class. ``split`` is ``fit``, ``test``, or None: to be drawn."""

    text: str
    label: str | int
    split: str | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt, the strings that may follow it, and the number of the right one."""

    text: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Edited:
    """A text, and the earlier version of it that a store holds."""

    text: str
    original: str


def read_texts(path: Path) -> list[str]:
    """The different texts of a corpus (`.jsonl` or `.txt`), in their order."""
    return list(dict.fromkeys(item.text for item in read_corpus(path)))


def read_pairs(path: Path) -> list[Pair]:
    keys: dict[str, Kinds] = {"text": str, "text_pair": str, "score": (int, float)}
    return [
        Pair(row["text"], row["text_pair"], float(row["score"])) for _, row in _rows(path, keys)
    ]


def read_labels(path: Path) -> list[Labelled]:
    """The rows of different texts; of equal texts the first counts."""
    keys: dict[str, Kinds] = {"text": str, "label": (str, int)}
    rows: dict[str, Labelled] = {}
    for number, row in _rows(path, keys):
        split = row.get("split")
        if split not in {None, "fit", "test"}:
            raise SettingsError(f'{path}:{number}: "split" must be fit or test, got {split!r}')
        rows.setdefault(row["text"], Labelled(row["text"], row["label"], split))
    if len({row.split is None for row in rows.values()}) > 1:
        raise SettingsError(f'{path}: all rows must have a "split", or none')
    return list(rows.values())


def read_prompts(path: Path) -> list[Prompt]:
    """The rows of different texts; of equal texts the first counts."""
    keys: dict[str, Kinds] = {"text": str, "choices": list, "answer": int}
    prompts: dict[str, Prompt] = {}
    for number, row in _rows(path, keys):
        choices, answer = row["choices"], row["answer"]
        if not all(isinstance(choice, str) for choice in choices) or not (
            0 <= answer < len(choices)
        ):
            raise SettingsError(
                f'{path}:{number}: "choices" must be strings and "answer" the number of one of '
                f"them, counted from 0, got {choices!r} and {answer!r}"
            )
        prompts.setdefault(row["text"], Prompt(row["text"], tuple(choices), answer))
    return list(prompts.values())


def read_edits(path: Path) -> list[Edited]:
    """The rows of different texts; of equal texts the first counts."""
    keys: dict[str, Kinds] = {"text": str, "original": str}
    rows: dict[str, Edited] = {}
    for _, row in _rows(path, keys):
        rows.setdefault(row["text"], Edited(row["text"], row["original"]))
    return list(rows.values())


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write one JSON object per line; the inverse of the readers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _rows(path: Path, keys: dict[str, Kinds]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every line that is not empty, with the ``keys`` of their types."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"a task's file must be readable UTF-8, got {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SettingsError(f"{path}:{number} must be a JSON object: {error}") from None
        if not isinstance(row, dict) or not all(
            isinstance(row.get(key), kinds) and not isinstance(row.get(key), bool)
            for key, kinds in keys.items()
        ):
            raise SettingsError(
                f"{path}:{number} must be an object with "
                f"{', '.join(map(_described, keys.items()))}, got {line[:80]!r}"
            )
        yield number, row


def _described(key: tuple[str, Kinds]) -> str:
    name, kinds = key
    several = kinds if isinstance(kinds, tuple) else (kinds,)
    return f'"{name}" ({" or ".join(kind.__name__ for kind in several)})'
