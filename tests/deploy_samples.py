# SPDX-License-Identifier: Apache-2.0
"""The manifest and what its tests read of it."""

from __future__ import annotations

import http.server
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent

DEPLOY = ROOT / "deploy"
GUIDE = (ROOT / "docs" / "deployment.md").read_text()
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
IMAGE = f"attncache-vllm:{VERSION}"
Json = dict[str, Any]


class Strict(yaml.SafeLoader):
    """A key twice in a mapping is an error, as it is to ``kubectl``."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{sorted(keys)} at {node.start_mark}"
        return super().construct_mapping(node, deep)


MANIFEST: list[Json] = list(yaml.load_all((DEPLOY / "kuberay.yaml").read_text(), Strict))


def named(kind: str, name: str) -> Json:
    (found,) = (
        resource
        for resource in MANIFEST
        if (resource["kind"], resource["metadata"]["name"]) == (kind, name)
    )
    return found


CONFIG = named("ConfigMap", "attncache-settings")["data"]

SERVER_SETTINGS, STORE_SETTINGS = (
    yaml.load(CONFIG[f"{n}.yaml"], Strict) for n in ("server", "store")
)


def templates(node: Any = MANIFEST) -> Iterator[Json]:
    """Every pod template, wherever it is."""
    if isinstance(node, dict):
        if "template" in node and "spec" in node["template"]:
            yield node["template"]
        for value in node.values():
            yield from templates(value)
    elif isinstance(node, list):
        for value in node:
            yield from templates(value)


PODS = list(templates())


class Answers(http.server.BaseHTTPRequestHandler):
    """As vLLM: /health is 200, or 503 when the engine is dead."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 503)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass
