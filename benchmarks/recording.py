# SPDX-License-Identifier: Apache-2.0
"""Stores for demo, benchmark and soak, made by the command a user would call."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.server import group


def build_store(
    model: Path, texts: Sequence[str], folder: Path, max_tokens: int, *options: str
) -> Path:
    """Record the maps of ``texts``; ``options`` are more of ``attncache build``. Its report is in
    ``build.json`` beside the store.

    Raises:
        RuntimeError: the build failed; the message names its log.
    """
    corpus, store = folder / "corpus.jsonl", folder / "store"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [
        *(sys.executable, "-m", "attncache_vllm", "build", str(model), "--corpus", str(corpus)),
        *("--store", str(store), "--max-tokens", str(max_tokens), "--json", *options),
    ]
    Console().print(f"[bold]attncache build[/] {model.name}, {len(texts)} texts")
    with (
        (folder / "build.json").open("w") as report,
        (folder / "build.log").open("w") as log,
        group(command, stdout=report, stderr=log) as process,
    ):
        if process.wait() != 0:
            raise RuntimeError(f"attncache build failed; see {log.name}")
    return store
