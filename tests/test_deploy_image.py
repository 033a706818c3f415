# SPDX-License-Identifier: Apache-2.0
"""The image: its contents, and its health check."""

from __future__ import annotations

import ast
import fnmatch
import http.server
import importlib.util
import json
import re
import shlex
import socket
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import ModuleType

import pytest
from deploy_samples import (
    DEPLOY,
    GUIDE,
    IMAGE,
    PODS,
    ROOT,
    STORE_SETTINGS,
    Answers,
)

# -- the image --------------------------------------------------------------------------------


def instructions(path: Path) -> list[tuple[str, str]]:
    """Of a Dockerfile: the words in front, and what follows, in one line each."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (word, " ".join(rest.split()))
        for word, _, rest in (line.strip().partition(" ") for line in joined.splitlines())
        if word
    ]


IMAGE_FILE = instructions(DEPLOY / "Dockerfile")


def arguments_of(word: str) -> list[str]:
    return [rest for found, rest in IMAGE_FILE if found == word]


def ignored(path: str) -> bool:
    """By ``.dockerignore``: the last pattern that a path or a folder above it has decides."""
    parts = PurePosixPath(path).parts
    above = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    left_out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if not pattern or pattern.startswith("#"):
            continue
        if pattern.startswith("**/"):
            hit = any(fnmatch.fnmatchcase(part, pattern[3:]) for part in parts)
        else:
            hit = any(
                fnmatch.fnmatchcase(prefix, pattern) and prefix.count("/") == pattern.count("/")
                for prefix in above
            )
        if hit:
            left_out = not line.startswith("!")
    return left_out


def copied() -> list[str]:
    sources = []
    for rest in arguments_of("COPY"):
        words = rest.split()
        if not words[0].startswith("--from"):
            sources += words[:-1]
    return sources


def test_every_source_of_the_image_is_in_the_repository_and_in_the_context() -> None:
    for source in copied():
        path = ROOT / source
        assert path.exists(), source
        files = [path] if path.is_file() else [*path.rglob("*.py"), *path.rglob("*.toml")]
        for file in files:
            assert not ignored(file.relative_to(ROOT).as_posix()), file


@pytest.mark.parametrize(
    "path",
    [
        ".git/HEAD",
        ".venv/bin/python",
        "build/demo/store/manifest",
        "tests/test_deploy.py",
        "deploy/kuberay.yaml",
        "configs/embedded.yaml",
        "auth_token",
        "attncache_vllm/reuse/_tiles.cpython-311-x86_64-linux-gnu.so",
        "attncache_vllm/store/__pycache__/local.cpython-311.pyc",
    ],
)
def test_nothing_else_is_in_the_context(path: str) -> None:
    assert ignored(path)


def test_the_package_can_be_built_from_what_is_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {"pyproject.toml", project["project"]["readme"], "attncache_vllm"} <= set(copied())
    for module in project["tool"]["setuptools"]["ext-modules"]:
        for source in module["sources"]:
            assert not ignored(source)


def test_the_image_has_the_packages_of_the_lock_and_no_others() -> None:
    installs = [
        command.strip()
        for rest in arguments_of("RUN")
        for command in rest.split("&&")
        if "pip install" in command
    ]
    locked, own = installs
    assert "--no-deps" in locked and locked.endswith("-r /src/requirements/cpu.txt")
    assert "--no-deps" in own and "--no-build-isolation" in own
    # As the Makefile does it.
    makefile = (ROOT / "Makefile").read_text()
    assert "install --no-deps $(TORCH_ARGS) -r" in makefile
    assert "--no-deps --no-build-isolation ./$(ALIAS)" in makefile


def test_the_base_is_pinned_and_has_the_python_of_the_lock() -> None:
    (base, *_) = arguments_of("ARG")
    name, _, image = base.partition("=")
    assert arguments_of("FROM") == [f"${{{name}}} AS build", f"${{{name}}}"]
    tag = re.fullmatch(r"python:(\d+\.\d+)\.\d+-slim-\w+", image)
    assert tag is not None, image
    assert f"PYTHON ?= python{tag[1]}\n" in (ROOT / "Makefile").read_text()


def test_nothing_is_run_that_was_just_downloaded() -> None:
    text = "\n".join(f"{word} {rest}" for word, rest in IMAGE_FILE)
    assert not re.search(r"\b(curl|wget)\b|\| *(ba)?sh\b|^ADD ", text, re.MULTILINE)


def test_the_image_does_not_run_as_root_and_is_the_user_of_the_manifest() -> None:
    (user,) = arguments_of("USER")
    security = PODS[0]["spec"]["securityContext"]
    assert user == f"{security['runAsUser']}:{security['runAsGroup']}"
    # Nothing is run as root after it.
    words = [word for word, _ in IMAGE_FILE]
    assert "RUN" not in words[words.index("USER") :]
    made = " ".join(arguments_of("RUN"))
    assert f"useradd --uid {security['runAsUser']} " in made
    assert STORE_SETTINGS["folder"] in made


def test_the_image_is_called_the_same_everywhere() -> None:
    said = (DEPLOY / "Dockerfile").read_text() + GUIDE
    assert set(re.findall(r"attncache-vllm:[\w.]+", said)) == {IMAGE}


# -- the health check -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def health() -> ModuleType:
    spec = importlib.util.spec_from_file_location("healthy", DEPLOY / "healthy.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_a_server_is_healthy_while_it_says_so(health: ModuleType, port: int) -> None:
    assert health.healthy(f"http://127.0.0.1:{port}/health")
    assert not health.healthy(f"http://127.0.0.1:{port}/dead")


def test_a_ray_node_is_healthy_while_it_listens(health: ModuleType, port: int) -> None:
    assert health.healthy(f"tcp://127.0.0.1:{port}")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert not health.healthy(f"tcp://127.0.0.1:{closed.getsockname()[1]}")
        assert not health.healthy(f"http://127.0.0.1:{closed.getsockname()[1]}/health")


@pytest.mark.parametrize("address", ["", "127.0.0.1:8000", "tcp://127.0.0.1", "ftp://host:21/x"])
def test_an_address_that_is_none_is_a_mistake(health: ModuleType, address: str) -> None:
    with pytest.raises(ValueError, match="HEALTH must be"):
        health.healthy(address)


def test_the_image_checks_its_health_with_the_standard_library(health: ModuleType) -> None:
    (check,) = arguments_of("HEALTHCHECK")
    program = json.loads(check.partition("CMD ")[2])
    assert program[0] == "python"
    assert f"deploy/healthy.py {program[1]}" in arguments_of("COPY")
    (environment,) = [rest for rest in arguments_of("ENV") if "HEALTH=" in rest]
    default = dict(word.split("=", 1) for word in shlex.split(environment))["HEALTH"]
    assert health.healthy(default) in (True, False)  # an address
    # It runs every few seconds.
    tree = ast.parse((DEPLOY / "healthy.py").read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert "attncache_vllm" not in ast.dump(ast.Module([*imported], []))
