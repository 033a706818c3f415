# SPDX-License-Identifier: Apache-2.0
"""What the commands share: the app, consoles, errors, and options."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from attncache_vllm.errors import AttnCacheError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Reuse of attention maps for prefill-only serving with vLLM.",
    pretty_exceptions_enable=False,
)
# Paths and messages may hold what rich would take for its markup; colours are given as Text.
out = Console(markup=False, emoji=False)
err = Console(stderr=True)

# Options that are not ours are those of `vllm serve`.
SERVE_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}

StoreArgument = Annotated[Path, typer.Argument(help="Folder of the store.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@contextmanager
def user_errors() -> Iterator[None]:
    """A user's mistake is one line and exit code 2, not a traceback."""
    try:
        yield
    except AttnCacheError as error:
        err.print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)
        raise typer.Exit(2) from None


@app.callback()
def keep_stdout_for_results() -> None:
    # vLLM logs to stdout, in every process that it spawns, unless it is told otherwise.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")


def check_model_comes_first(model: str | None) -> None:
    if model is not None and model.startswith("-"):
        raise AttnCacheError(
            f"the model must come before the options of `vllm serve`, got {model!r} first"
        )


def ranges(layers: Sequence[int]) -> str:
    """``[4, 8, 9, 10]`` to ``"4, 8-10"``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
