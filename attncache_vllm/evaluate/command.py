# SPDX-License-Identifier: Apache-2.0
"""The body of ``attncache evaluate``."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from rich.table import Table

from attncache_vllm.errors import AttnCacheError, SettingsError, StoreError
from attncache_vllm.evaluate import report as reports
from attncache_vllm.evaluate.maps import sample_maps
from attncache_vllm.evaluate.run import EvaluateOptions, evaluate

OURS = ("--attention-backend", "--additional-config")


def run(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluate, write ``report.json`` and ``report.html`` into ``options.out``; the report.

    Raises:
        AttnCacheError: as :func:`attncache_vllm.evaluate.run.evaluate`; nothing is written then.
    """
    for option in options.serve_options:
        if option.startswith(OURS):
            raise SettingsError(
                f"an evaluation sets {' and '.join(OURS)} itself, got {option!r}; give the "
                "plugin's settings as --settings '{...}'"
            )
    # Ended politely or not, the context managers of the servers end them.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    report = evaluate(options)
    try:
        maps = sample_maps(options.store)
    except (StoreError, ValueError) as error:  # the figures are there, the picture is not
        maps = str(error), {}
    reports.write(report, maps, options.out)
    return report


def read_settings(text: str | None) -> dict[str, Any]:
    """The object of ``--settings``, a JSON text or the path of a JSON file."""
    if text is None:
        return {}
    try:
        inline = text.lstrip().startswith("{")
        settings = json.loads(text if inline else Path(text).read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError) as error:
        raise AttnCacheError(
            "--settings must be a JSON object of the plugin's settings, or a file that holds one, "
            f"got {text!r}: {error}"
        ) from None
    return settings


def table_of(report: dict[str, Any]) -> Table:
    """All rows of a report for the terminal, beside the published rule where it was run."""
    table = Table(title=f"{report['model']}: exact against reused")
    for header in ("task", "figure", "reused", "published rule"):
        table.add_column(header)
    for row in report["rows"]:
        name = row["workload"]
        for figure, text in (reports.SHARES | reports.FIGURES).items():
            if figure in row:
                beside = row["published_rule"]
                table.add_row(
                    name,
                    text,
                    reports.figure_text(row, figure),
                    reports.figure_text(beside, figure) if beside else "",
                )
                name = ""
        table.add_section()
    return table
