# SPDX-License-Identifier: Apache-2.0
"""The command line in this process, and a published store for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from store_samples import NAMESPACE, make_features, make_record
from typer.testing import CliRunner

from attncache_vllm import cli
from attncache_vllm.reuse.plan import Plan
from attncache_vllm.store import LocalStore

ENTRIES = 5
PLAN = Plan.reusing(NAMESPACE.num_layers, 3, (1, 3), 0.25, feature_layer=1).to_dict()
ARTIFACTS = {"templates": b"maps", "corrections": b"matrices"}
REPORT = {"train_loss": 0.125, "heldout_loss": 0.5, "curve": [[0.5, 0.25]]}


def published(path: Path, plan: dict[str, Any] = PLAN) -> Path:
    with LocalStore.create(path, NAMESPACE, {"slots": 2}) as store:
        for number in range(ENTRIES):
            store.put(make_record(number))
        store.publish(plan, b"projector", REPORT, make_features(ENTRIES), artifacts=ARTIFACTS)
    return path


def attncache(*arguments: object) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [str(part) for part in arguments])


def one_line_error(result: Any) -> str:
    """The message of a refused call: exit code 2, one line, nothing on stdout, no traceback."""
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return str(result.stderr)
