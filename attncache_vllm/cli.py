# SPDX-License-Identifier: Apache-2.0
"""The command ``attncache``.

Exit codes: 0 done; 1 the answer is bad news (damage found, not ready); 2 a mistake in the call or
its inputs, said in one line; 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attncache_vllm.errors import AttnCacheError, StoreDamaged, StoreError

if TYPE_CHECKING:
    from attncache_vllm.calibrate.measure import Task
    from attncache_vllm.doctor import Check

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

# Below it the order of feature distances says next to nothing about the order of map distances.
WEAK_CORRELATION = 0.1

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


@app.command(context_settings=SERVE_OPTIONS)
def build(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model folder or hub name, as for vLLM.")],
    corpus: Annotated[Path, typer.Option(help="Texts to record: .jsonl with `text`, or .txt.")],
    store: Annotated[Path, typer.Option(help="Folder of the store, new or to be extended.")],
    layers: Annotated[
        str | None,
        typer.Option(help="Layers to reuse, like `20-29` or `4,8-11`. [default: the last third]"),
    ] = None,
    feature_layer: Annotated[
        int, typer.Option(min=0, help="Layer whose input is searched with; the paper's is 0.")
    ] = 0,
    max_entries: Annotated[int, typer.Option(min=1, help="Stop at this many entries.")] = 1000,
    max_bytes: Annotated[
        int | None, typer.Option(min=1, help="Stop at this size of the maps, in bytes.")
    ] = None,
    min_tokens: Annotated[
        int,
        typer.Option(min=2, help="Leave out shorter texts; a server has its own `min_tokens`."),
    ] = 16,
    max_tokens: Annotated[
        int,
        typer.Option(
            min=2, help="Cut texts at this length, or the model's; longer requests never hit."
        ),
    ] = 512,
    max_distance: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Gate: largest predicted distance of two maps (0 equal, 1 disjoint) that still "
            "counts as a hit.",
        ),
    ] = 0.2,
    factory: Annotated[str, typer.Option(help="faiss index factory string.")] = "Flat",
    seed: Annotated[int, typer.Option(help="Seed of the projector's training.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Record attention maps of a corpus by running the model in vLLM.

    Cut off, it continues where it stopped when called again; with a higher `--max-entries` or
    another corpus it extends the store. A store that was calibrated keeps its plan and gates.
    Other options are taken as those of `vllm serve`: give those that change what the model
    computes, like `--dtype`, as you will serve it.

    Example: `attncache build ./SmolLM2 --corpus texts.jsonl --store ./maps --max-entries 500`
    """
    with user_errors():
        from attncache_vllm.calibrate.build import BuildOptions
        from attncache_vllm.calibrate.build import build as build_store
        from attncache_vllm.calibrate.corpus import read_corpus

        _check_model_comes_first(model)
        options = BuildOptions(
            model=model,
            store=store,
            layers=None if layers is None else parse_layers(layers),
            feature_layer=feature_layer,
            max_entries=max_entries,
            max_bytes=max_bytes,
            min_tokens=min_tokens,
            max_tokens=max_tokens,
            max_distance=max_distance,
            factory=factory,
            seed=seed,
            serve_options=tuple(context.args),
        )
        texts = list(read_corpus(corpus))
        if not texts:
            raise AttnCacheError(f"the corpus must hold at least one text, got {str(corpus)!r}")
        report = build_store(options, texts)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    training = report["training"]
    table = Table(title=str(store), show_header=False)
    table.add_row("entries", f"{report['entries']} ({report['recorded']} recorded now)")
    table.add_row("size", f"{report['bytes'] / 2**20:.1f} MiB")
    table.add_row("layers with reuse", f"{_ranges(report['layers'])} of {report['num_layers']}")
    table.add_row("recording", f"{report['sequences_per_second']:.2f} sequences/s")
    if report["parity"]:
        table.add_row("own-map error", f"{max(report['parity'].values()):.4f} (relative, worst)")
    if training is None:
        table.add_row("plan", "kept as calibrated, with its projector and gates")
    else:
        table.add_row("training loss", f"{training['train_loss']:.5f}")
        table.add_row("held-out loss", f"{training['heldout_loss']:.5f}")
        table.add_row("rank correlation", f"{training['rank_correlation']:.3f} (held out)")
    out.print(table)
    if training is not None and training["rank_correlation"] < WEAK_CORRELATION:
        err.print(
            "warning: on held-out texts the feature hardly tells near maps from far ones; record "
            "more texts, or texts more like those to be served"
        )


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

        _check_model_comes_first(model)
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
        table.add_row(
            source,
            *(
                f"{figures[key]:.1%}" if key in figures else "-"
                for key in ("groups_share", "saving")
            ),
            *(_with_interval(figures, key) for key in ("rank_fidelity", "self_retrieval")),
        )
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


def _with_interval(figures: dict[str, Any], key: str) -> str:
    bounds = figures.get("ci95", {}).get(key)
    return f"{figures[key]:.4f}" + ("" if bounds is None else f" ({bounds[0]:.4f}-{bounds[1]:.4f})")


@app.command()
def rearm(store: StoreArgument) -> None:
    """Let the servers of a store try again the layers that their canaries have switched off.

    Example: `attncache rearm ./maps`
    """
    with user_errors():
        from attncache_vllm.store.manifest import Manifest
        from attncache_vllm.store.rearm import rearm as rearm_servers

        Manifest.read(store)  # refuses a folder that is no store
        rearm_servers(store)
    out.print("servers of this store look for it every few dozen hits")


@app.command()
def inspect(
    store: StoreArgument,
    as_json: JsonOption = False,
    plan_only: Annotated[
        bool, typer.Option("--plan", help="Print the plan alone, as the setting `plan` reads it.")
    ] = False,
) -> None:
    """Show what a store holds: namespace, entries, plan, training figures, artifacts.

    Example: `attncache inspect ./maps --json`
    """
    with user_errors():
        from attncache_vllm.reuse.plan import Plan
        from attncache_vllm.store.manifest import Manifest

        manifest = Manifest.read(store)
        published = manifest.published
        try:
            plan = None if published is None else Plan.from_dict(published.plan)
        except ValueError as error:
            raise StoreError(f"{store} has a plan this release cannot read: {error}") from None
        if plan_only and plan is None:
            raise StoreError(f"{store} must have a plan, got none yet; run 'attncache build'")
    if plan_only and plan is not None:
        typer.echo(json.dumps(plan.to_dict(), indent=2))
        return
    lengths = sorted(entry.length for entry in manifest.entries)
    summary: dict[str, Any] = {
        "namespace": {**manifest.namespace.to_dict(), "digest": manifest.namespace.digest()},
        "build": manifest.build,
        "entries": len(lengths),
        "bytes": sum(entry.size for entry in manifest.entries),
        "tokens": {
            "min": lengths[0] if lengths else None,
            "median": lengths[len(lengths) // 2] if lengths else None,
            "max": lengths[-1] if lengths else None,
        },
        "segments": [dataclasses.asdict(segment) for segment in manifest.segments],
        "findable": 0 if published is None else published.rows,
        "layers_reused": [] if plan is None else list(plan.reused_layers),
        "feature_layer": None if plan is None else plan.feature_layer,
        "sources": {}
        if plan is None
        else {
            source: {
                "layers": list(part.layers),
                "kv_groups": sum(map(len, part.groups)),
                "gate": part.gate,
                "corrected": list(part.corrected),
            }
            for source, part in plan.sources.items()
        },
        "artifacts": {}
        if published is None
        else {name: file.size for name, file in sorted(published.artifacts.items())},
        "training": None
        if published is None
        else {key: value for key, value in published.report.items() if key != "curve"},
    }
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
        return
    table = Table(title=str(store), show_header=False)
    for key, value in _flat(summary):
        table.add_row(key, value)
    out.print(table)


@app.command()
def verify(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Read a whole store again and check every size and checksum. Exit code 1 on damage.

    Example: `attncache verify ./maps && echo sound`
    """
    with user_errors():
        from attncache_vllm.store import LocalStore, VerifyReport

        try:
            with LocalStore.open(store) as opened:
                report = opened.verify()
        except StoreDamaged as error:
            report = VerifyReport(entries=0, damaged=[], problems=[str(error)])
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        for entry_id, reason in report.damaged:
            out.print(f"entry {entry_id}: {reason}", highlight=False, soft_wrap=True)
        for problem in report.problems:
            out.print(problem, highlight=False, soft_wrap=True)
        if report.unpublished:
            out.print(f"{report.unpublished} entries are not findable yet; run `attncache build`")
        verdict = ("sound", "green") if report.ok else ("damaged", "red")
        out.print(Text.assemble(f"{report.entries} entries read: ", verdict))
    if not report.ok:
        raise typer.Exit(1)


@app.command(context_settings=SERVE_OPTIONS)
def doctor(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help="Model folder or hub name, as for vLLM.", show_default=False),
    ] = None,
    store: Annotated[Path | None, typer.Option(help="Store to check.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check versions, plugin, machine and store, say for each layer of the model what a hit skips,
    and why requests would not be reused.

    Other options are taken as those of `vllm serve`. Exit code 1 when something stands in the way.

    Example: `attncache doctor ./SmolLM2 --store ./maps --pooler-config.seq_pooling_type MEAN`
    """
    from attncache_vllm.doctor import examine

    with user_errors():
        _check_model_comes_first(model)
        checks = examine(store, model, context.args)
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

        _check_model_comes_first(model)
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


def _check_model_comes_first(model: str | None) -> None:
    if model is not None and model.startswith("-"):
        raise AttnCacheError(
            f"the model must come before the options of `vllm serve`, got {model!r} first"
        )


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
        yield state, f"layer{'s' if len(layers) > 1 else ''} {_ranges(layers)}", finding


def parse_sources(text: str) -> tuple[str, ...]:
    """``"template,aligned"`` to its parts. Raises AttnCacheError for anything else."""
    known = ("template", "aligned", "neighbour")
    sources = tuple(part.strip() for part in text.split(","))
    if unknown := set(sources) - set(known):
        raise AttnCacheError(
            f"sources must be among {', '.join(known)}, with commas, got {sorted(unknown)!r}"
        )
    return sources


def parse_layers(text: str) -> tuple[int, ...]:
    """``"4,8-11"`` to ``(4, 8, 9, 10, 11)``. Raises AttnCacheError for anything else."""
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise AttnCacheError(
                f"layers must be numbers and ranges like 4,8-11 (the first is 0), got {text!r}"
            )
        if int(last or first) < int(first):
            raise AttnCacheError(f"a range of layers must ascend, got {text!r}")
        layers.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(layers))


def _ranges(layers: list[int]) -> str:
    """``[4, 8, 9, 10]`` to ``"4, 8-10"``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(type(item) is int for item in value):
            yield prefix + key, _ranges(value)
        else:
            yield prefix + key, f"{value:.5g}" if isinstance(value, float) else str(value)
