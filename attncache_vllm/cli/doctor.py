# SPDX-License-Identifier: Apache-2.0
"""``attncache doctor``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from attncache_vllm.cli.common import (
    SERVE_OPTIONS,
    JsonOption,
    app,
    check_model_comes_first,
    out,
    ranges,
    user_errors,
)

if TYPE_CHECKING:
    from attncache_vllm.doctor import Check


@app.command(context_settings=SERVE_OPTIONS)
def doctor(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help="Model folder or hub name, as for vLLM.", show_default=False),
    ] = None,
    store: Annotated[Path | None, typer.Option(help="Store to check.")] = None,
    costs: Annotated[
        bool,
        typer.Option(
            "--costs", help="Start the engine and measure from which length on reuse pays."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check versions, plugin, machine and store, say for each layer of the model what a hit skips,
    and why requests would not be reused.

    Other options are taken as those of `vllm serve`. Exit code 1 when something stands in the way.

    Example: `attncache doctor ./SmolLM2 --store ./maps --pooler-config.seq_pooling_type MEAN`
    """
    from attncache_vllm.doctor import examine

    with user_errors():
        check_model_comes_first(model)
        checks = examine(store, model, context.args, costs)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    else:
        mark = {
            "ok": Text("ok", "green"),
            "info": Text("--", "cyan"),
            "problem": Text("!!", "red"),
        }
        table = Table(show_header=False, box=None)
        for state, what, finding in _merged(checks):
            table.add_row(mark[state], what, finding)
        out.print(table)
    if any(check.state == "problem" for check in checks):
        raise typer.Exit(1)


def _merged(checks: Sequence[Check]) -> Iterator[tuple[str, str, str]]:
    """State, subject and finding of each check; those of layers with one finding in one row."""
    by_finding: dict[tuple[str, str], list[int]] = {}
    for check in checks:
        kind, _, number = check.what.partition(" ")
        if kind == "layer" and number.isdecimal():
            by_finding.setdefault((check.state, check.finding), []).append(int(number))
        else:
            yield check.state, check.what, check.finding
    for (state, finding), layers in by_finding.items():
        yield state, f"layer{'s' if len(layers) > 1 else ''} {ranges(layers)}", finding
