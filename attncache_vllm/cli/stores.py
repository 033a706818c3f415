# SPDX-License-Identifier: Apache-2.0
"""Commands about a store: ``inspect``, ``verify`` and ``rearm``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from attncache_vllm.cli.common import (
    JsonOption,
    StoreArgument,
    app,
    out,
    ranges,
    user_errors,
)
from attncache_vllm.errors import StoreDamaged, StoreError


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


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(type(item) is int for item in value):
            yield prefix + key, ranges(value)
        else:
            yield prefix + key, f"{value:.5g}" if isinstance(value, float) else str(value)
