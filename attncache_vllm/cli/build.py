# SPDX-License-Identifier: Apache-2.0
"""``attncache build``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from attncache_vllm.cli.common import (
    SERVE_OPTIONS,
    JsonOption,
    app,
    check_model_comes_first,
    err,
    out,
    ranges,
    user_errors,
)
from attncache_vllm.errors import AttnCacheError
from attncache_vllm.names import CodecName

# Below it the order of feature distances says next to nothing about the order of map distances.
WEAK_CORRELATION = 0.1


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
    factory: Annotated[
        str,
        typer.Option(
            help="`Flat`, or the faiss factory string of an inverted file; `auto` is `Flat` up to "
            "8,192 entries, and beyond an inverted file, which may miss a nearest entry."
        ),
    ] = "auto",
    codec: Annotated[
        CodecName,
        typer.Option(help="How maps are stored; `visible-bf16-lse` is twice as large and exact."),
    ] = "tiles-u8-lse",
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

        check_model_comes_first(model)
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
            codec=codec,
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
    table.add_row("layers with reuse", f"{ranges(report['layers'])} of {report['num_layers']}")
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
