# SPDX-License-Identifier: Apache-2.0
"""Few-shot prompts of MMLU, from a folder that the user has.

The folder holds ``dev/SUBJECT_dev.csv`` and ``test/SUBJECT_test.csv``, each with a header
``question,choice0,choice1,choice2,choice3,answer`` and the answer's number.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, NamedTuple

LETTERS = "ABCD"
SHOTS = 5


class Question(NamedTuple):
    """A question, its four choices and the number of the right one."""

    text: str
    choices: tuple[str, ...]
    answer: int


def subjects(folder: Path) -> list[str]:
    """Names of all subjects, sorted."""
    return sorted(path.name.removesuffix("_test.csv") for path in folder.glob("test/*_test.csv"))


def prompts(folder: Path, subject: str) -> list[dict[str, Any]]:
    """A row of a file of prompts for each test question, all with the same five shots."""
    shots = "".join(
        f"{_asked(question)} {LETTERS[question.answer]}\n\n"
        for question in _questions(folder / "dev" / f"{subject}_dev.csv")[:SHOTS]
    )
    about = subject.replace("_", " ")
    begin = f"The following are multiple choice questions (with answers) about {about}.\n\n{shots}"
    return [
        {
            "text": begin + _asked(question),
            "choices": [f" {letter}" for letter in LETTERS],
            "answer": question.answer,
        }
        for question in _questions(folder / "test" / f"{subject}_test.csv")
    ]


def _asked(question: Question) -> str:
    choices = "".join(
        f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, question.choices, strict=True)
    )
    return f"{question.text}\n{choices}Answer:"


def _questions(path: Path) -> list[Question]:
    with path.open(encoding="utf-8", newline="") as lines:
        return [
            Question(
                row["question"], tuple(row[f"choice{n}"] for n in range(4)), int(row["answer"])
            )
            for row in csv.DictReader(lines)
        ]
