# SPDX-License-Identifier: Apache-2.0
"""Texts of the demo, the benchmarks and the integration tests; every function is deterministic."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from attncache_vllm.calibrate.edits import edit
from benchmarks.assets import ensure


class Pair(NamedTuple):
    """Two sentences and how alike people found them: 0 (unrelated) to 5 (the same)."""

    first: str
    second: str
    score: float


def news(limit: int, min_chars: int = 0, seed: int = 0) -> list[str]:
    """Draw ``limit`` different news articles of at least ``min_chars`` characters.

    A smaller ``limit`` with the same ``min_chars`` and ``seed`` gives the beginning of the list.

    Raises:
        ValueError: the corpus has fewer such articles.
    """
    with ensure("news").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    # The source repeats a few articles; a repetition would be a hit that no method has earned.
    texts = [text for text in dict.fromkeys(texts) if len(text) >= min_chars]
    if limit > len(texts):
        raise ValueError(
            f"limit must be at most {len(texts)}, the number of articles of at least "
            f"{min_chars} characters, got {limit!r}; lower limit or min_chars"
        )
    random.Random(seed).shuffle(texts)
    return texts[:limit]


def near_duplicates(texts: Sequence[str], share: float, seed: int = 0) -> list[str]:
    """Copy each text with ``share`` of its words (at least one) replaced by words of ``texts``.

    The number of words stays the same, the number of tokens may not.

    Raises:
        ValueError: ``share`` is outside (0, 1], or the texts have fewer than two different words.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is a part of the words, above 0 and at most 1, got {share!r}")
    vocabulary = sorted({word for text in texts for word in text.split()})
    if texts and len(vocabulary) < 2:
        raise ValueError(f"texts must hold at least two different words, got {vocabulary!r}")
    draw = random.Random(seed)
    copies = []
    for text in texts:
        words = text.split()
        replaced = min(len(words), max(1, round(share * len(words))))
        for position in draw.sample(range(len(words)), replaced):
            while (word := draw.choice(vocabulary)) == words[position]:
                pass
            words[position] = word
        copies.append(" ".join(words))
    return copies


def edited_copies(texts: Sequence[str], tokenizer: Any, share: float, seed: int = 0) -> list[str]:
    """Each text with about ``share`` of its tokens edited, and decoded again.

    A third each are replaced, preceded by a new one, and deleted. New tokens are those of other
    places in ``texts``, frequent ones more often.
    """
    rows = tokenizer(list(texts), add_special_tokens=False).input_ids
    # An array: a list would be made one again for each token that is drawn.
    vocabulary: Any = np.concatenate([np.array(row, dtype=np.int32) for row in rows])
    copies = [
        edit(np.array(row, dtype=np.int32), share, vocabulary, (seed, number))
        for number, row in enumerate(rows)
    ]
    return [tokenizer.decode(copy.tolist()) for copy in copies]


def stsb_pairs(split: str = "test") -> list[Pair]:
    """Sentence pairs of the STS benchmark, ``split`` being ``train``, ``dev`` or ``test``."""
    with (ensure("stsb") / f"sts-{split}.csv").open(encoding="utf-8") as lines:
        rows = [line.rstrip("\n").split("\t") for line in lines]
    # genre, file, year, number, score, sentence, sentence; some rows go on with their sources
    return [Pair(first=row[5], second=row[6], score=float(row[4])) for row in rows]
