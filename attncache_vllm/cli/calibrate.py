# SPDX-License-Identifier: Apache-2.0
"""``attncache calibrate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from attncache_vllm.cli.common import (
    SERVE_OPTIONS,
    JsonOption,
    app,
    check_model_comes_first,
    err,
    out,
    user_errors,
)
from attncache_vllm.errors import AttnCacheError

if TYPE_CHECKING:
    from attncache_vllm.calibrate.measure import Task


@app.command(context_settings=SERVE_OPTIONS)
def calibrate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model folder or hub name, as for vLLM.")],
    store: Annotated[Path, typer.Option(help="Folder of the store whose plan is calibrated.")],
    corpus: Annotated[
        Path, typer.Option(help="Texts like those to be served, not those of the store.")
    ],
    budget: Annotated[
        str, typer.Option(help="What answers must keep, see docs/fidelity.md.")
    ] = "rank=0.99,self-retrieval=0.99",
    pairs: Annotated[
        Path | None,
        typer.Option(help="Task of a budget `task=...`: .jsonl with `text`, `text_pair`, `score`."),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="Task of a budget `task=...`: .jsonl with `text` and `label`."),
    ] = None,
    sources: Annotated[
        str,
        typer.Option(
            help="What maps are taken from, of `template`, `aligned` and `neighbour`. The last "
            "takes minutes and rarely pays."
        ),
    ] = "template,aligned",
    min_tokens: Annotated[int, typer.Option(min=2, help="Leave out shorter texts.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=2, help="Cut texts at this length.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the split of the texts.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure what reuse would damage, and publish the plan that saves most inside a budget.

    Makes templates (mean maps of the corpus) and linear corrections, measures the damage of every
    KV group, and checks the joint effect on texts that chose nothing. Cut off, it goes on when
    called again. Other options are those of `vllm serve`: give the dtype and pooling to be served.

    Example: `attncache calibrate ./SmolLM2 --store ./maps --corpus held-out.jsonl --convert embed`
    """
    with user_errors():
        from attncache_vllm.calibrate.budget import Budget
        from attncache_vllm.calibrate.calibrate import CalibrateOptions
        from attncache_vllm.calibrate.calibrate import calibrate as calibrate_store
        from attncache_vllm.calibrate.corpus import read_corpus

        check_model_comes_first(model)
        kept = Budget.parse(budget)
        options = CalibrateOptions(
            model=model,
            store=store,
            budget=kept,
            task=_task(kept.task is not None, pairs, labels, seed),
            sources=parse_sources(sources),
            min_tokens=min_tokens,
            max_tokens=max_tokens,
            seed=seed,
            serve_options=tuple(context.args),
        )
        report = calibrate_store(options, list(read_corpus(corpus)))
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    table = Table(title=f"{store}: what the plan keeps on texts that did not choose it")
    for name in ("source", "KV groups", "saves of attention", "rank fidelity", "self-retrieval"):
        table.add_column(name)
    for source, figures in report["predicted"].items():
        _add_row(table, source, figures)
    table.add_section()
    for texts, figures in report["rehearsed"].items():
        _add_row(table, f"as served: {texts}", figures)
    out.print(table)
    if not report["predicted"]:
        err.print("warning: nothing can be reused inside this budget; every request is computed")


def _task(wanted: bool, pairs: Path | None, labels: Path | None, seed: int) -> Task | None:
    """The task of a budget."""
    from attncache_vllm.evaluate.files import read_labels, read_pairs
    from attncache_vllm.evaluate.tasks import Labels, Pairs

    if wanted != ((pairs is None) != (labels is None)):
        raise AttnCacheError(
            "a budget with `task=...` needs one of --pairs and --labels, and these need it, got "
            f"{'a' if wanted else 'no'} task budget, pairs {pairs}, labels {labels}"
        )
    if pairs is not None:
        return Pairs(read_pairs(pairs))
    return None if labels is None else Labels.split(read_labels(labels), seed)


def _add_row(table: Table, name: str, figures: dict[str, Any]) -> None:
    shares = (figures.get(key) for key in ("groups_share", "saving"))
    table.add_row(
        name,
        *("-" if share is None else f"{share:.1%}" for share in shares),
        *(_with_interval(figures, key) for key in ("rank_fidelity", "self_retrieval")),
    )


def _with_interval(figures: dict[str, Any], key: str) -> str:
    bounds = figures.get("ci95", {}).get(key)
    return f"{figures[key]:.4f}" + ("" if bounds is None else f" ({bounds[0]:.4f}-{bounds[1]:.4f})")


def parse_sources(text: str) -> tuple[str, ...]:
    """``"template,aligned"`` to its parts. Raises AttnCacheError for anything else."""
    known = ("template", "aligned", "neighbour")
    sources = tuple(part.strip() for part in text.split(","))
    if unknown := set(sources) - set(known):
        raise AttnCacheError(
            f"sources must be among {', '.join(known)}, with commas, got {sorted(unknown)!r}"
        )
    return sources
