# SPDX-License-Identifier: Apache-2.0
"""``attncache evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from attncache_vllm.cli.common import (
    SERVE_OPTIONS,
    JsonOption,
    app,
    check_model_comes_first,
    out,
    user_errors,
)


@app.command(context_settings=SERVE_OPTIONS)
def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model folder or hub name, as for vLLM.")],
    store: Annotated[Path, typer.Option(help="Store to serve from.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for report and logs.")],
    texts: Annotated[
        Path | None, typer.Option(help="Any texts: .jsonl with `text`, or .txt.")
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="Scored pairs: .jsonl with `text`, `text_pair`, `score`.")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="Classes: .jsonl with `text`, `label` and perhaps `split`, fit or test."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Questions: .jsonl with `text`, `choices`, `answer`.")
    ] = None,
    edits: Annotated[
        Path | None,
        typer.Option(help="Edited copies of stored texts: .jsonl with `text`, `original`."),
    ] = None,
    published_rule: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="GATE",
            help="Also serve all recorded layers from the nearest entry within this distance.",
        ),
    ] = None,
    settings: Annotated[
        str | None, typer.Option(help="The plugin's other settings: JSON, or a JSON file.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of resampling and of drawn splits.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure what reuse costs: the same texts through a stock server and a reusing one.

    Give one task or more. Writes `report.json` and `report.html`. Other options are taken as those
    of `vllm serve`, for all servers. Nothing is timed, and late lookups are waited for.

    Example: `attncache evaluate ./SmolLM2 --store ./maps --out ./report --texts unseen.jsonl`
    """
    with user_errors():
        from attncache_vllm.evaluate.command import read_settings, run, table_of
        from attncache_vllm.evaluate.run import EvaluateOptions

        check_model_comes_first(model)
        report = run(
            EvaluateOptions(
                model=model,
                store=store,
                out=folder,
                texts=texts,
                pairs=pairs,
                labels=labels,
                prompts=prompts,
                edits=edits,
                published_gate=published_rule,
                settings=read_settings(settings),
                seed=seed,
                serve_options=tuple(context.args),
            )
        )
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    out.print(table_of(report))
    out.print(f"written to {folder / 'report.json'} and {folder / 'report.html'}")
