# SPDX-License-Identifier: Apache-2.0
"""The documentation says what the code does, wherever a test can tell."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from attncache_vllm.config import Settings, load_settings
from attncache_vllm.engine.eligibility import NO_LAYER

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGE = ROOT / "attncache_vllm"
PAGES = [*ROOT.glob("*.md"), *DOCS.glob("*.md")]


def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", DOCS / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def constants(tree: ast.AST) -> Iterator[str]:
    """The strings in a piece of code, and the constant parts of its f-strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def function(path: Path, name: str) -> ast.AST:
    tree = ast.parse(path.read_text())
    (found,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name)
    return found


def returned_strings(path: Path, name: str) -> list[str]:
    """What a function returns as a string; of an f-string its first part."""
    returned = (n.value for n in ast.walk(function(path, name)) if isinstance(n, ast.Return))
    texts = [next(constants(value), None) for value in returned if value is not None]
    return [text for text in texts if text is not None]


def reasons_given(outcome: str) -> set[str]:
    """Literal reasons in calls of ``Outcomes.miss`` and ``Outcomes.bypass``."""
    calls = (
        node
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == outcome
        and node.args
    )
    return {reason for call in calls for reason in constants(call.args[0])}


def reasons_of_lookups() -> set[str]:
    """Literal reasons why a lookup found nothing, which misses are counted under."""
    engine = PACKAGE / "engine"
    returned = (
        node.value
        for node in ast.walk(function(engine / "step.py", "_await_lookup"))
        if isinstance(node, ast.Return) and node.value is not None
    )
    assigned = (
        node.value
        for node in ast.walk(function(engine / "runtime.py", "_begin"))
        if isinstance(node, ast.Assign) and "reason" in ast.unparse(node.targets[0])
    )
    return {reason for value in (*returned, *assigned) for reason in constants(value)}


def quoted(page: str) -> set[str]:
    """What a page shows between single backticks."""
    return set(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page))


def test_generated_tables_are_up_to_date() -> None:
    page = (DOCS / "settings.md").read_text()
    assert tables().with_tables(page) == page, "run `.venv/bin/python docs/tables.py`"


def test_a_table_without_its_place_is_an_error() -> None:
    with pytest.raises(ValueError, match="'settings'"):
        tables().with_tables("no place")


@pytest.mark.parametrize(
    "name", ["why_engine_bypassed", "_why_not", "_who_reads", "_why_scores_only"]
)
def test_every_reason_for_a_bypass_is_documented(name: str) -> None:
    reasons = returned_strings(PACKAGE / "engine" / "eligibility.py", name)
    assert reasons
    assert {*reasons, NO_LAYER} <= quoted((DOCS / "limits.md").read_text())


def test_every_reason_of_a_sequence_is_documented() -> None:
    misses = {"canary", *reasons_given("miss"), *reasons_of_lookups()}
    bypasses = reasons_given("bypass")
    assert len(misses) >= 5 and len(bypasses) >= 2
    assert misses <= quoted((DOCS / "settings.md").read_text())
    assert bypasses <= quoted((DOCS / "limits.md").read_text())


def error_rows() -> list[str]:
    section = (DOCS / "settings.md").read_text().split("\n## Errors\n")[1]
    return [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]


def test_documented_error_messages_are_in_the_code() -> None:
    code = [
        text for path in PACKAGE.rglob("*.py") for text in constants(ast.parse(path.read_text()))
    ]
    shown = [re.findall(r"`([^`]+)`", row)[0] for row in error_rows()]
    assert len(shown) > 30
    assert [message for message in shown if not any(message in text for text in code)] == []


def test_every_settings_error_is_documented() -> None:
    shown = [re.findall(r"`([^`]+)`", row)[0] for row in error_rows()]
    missing = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and getattr(
                getattr(node.exc, "func", None), "id", ""
            ) in {"SettingsError", "NamespaceMismatch"}:
                parts = list(constants(node))
                # Without text of its own it passes another error's message on.
                if parts and not any(message in part for part in parts for message in shown):
                    missing.append(f"{path.name}:{node.lineno}: {parts[0]}")
    assert missing == []


def test_example_configuration_holds_every_setting_and_its_default() -> None:
    path = ROOT / "configs" / "embedded.yaml"
    assert set(yaml.safe_load(path.read_text())) == set(Settings.model_fields)
    settings = load_settings({"attncache": str(path)})
    assert settings == Settings(store=settings.store)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_pages_name_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:attncache_vllm|docs|configs|tests|benchmarks|packaging|requirements)/[\w./-]*)`",
        page.read_text(),
    )
    assert [name for name in named if not (ROOT / name).exists()] == []
