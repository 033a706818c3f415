# SPDX-License-Identifier: Apache-2.0
"""Which room may import which, and who may touch vLLM. Imports inside functions count as well."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import attncache_vllm

PACKAGE = Path(attncache_vllm.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# Arrows go one way: a room knows only what is listed here, and its own modules.
MAY_IMPORT = {
    "__init__": set[str](),
    "__main__": {"cli"},
    "errors": set[str](),
    "names": set[str](),
    "tenants": set[str](),
    "validation": {"errors"},
    "config": {"errors", "names", "validation"},
    "reuse": set[str](),
    "store": {"errors", "tenants", "validation"},
    "serve_options": set[str](),
    "calibrate": {"errors", "names", "reuse", "serve_options", "store", "tenants"},
    "evaluate": {"calibrate", "errors", "reuse", "serve_options", "store", "tenants"},
    "engine": {"config", "errors", "reuse", "store", "tenants"},
    "plugin": {"engine"},
    "doctor": {"config", "engine", "errors", "reuse", "serve_options", "store"},
    "cli": {"calibrate", "doctor", "errors", "evaluate", "names", "reuse", "store", "tenants"},
}
# Outside of the engine room, vLLM is only used through what it offers to its users.
USERS_OF_VLLM = {"calibrate/build.py", "calibrate/model.py", "doctor.py", "serve_options.py"}
# Ray ends the process of a driver that has lost its cluster: no module that a server loads has it.
USERS_OF_RAY = {f"store/ray/{name}.py" for name in ("actor", "cluster")}
# A calibration runs in the engine's process and says what its layers serve. Only what gives them
# that knows the engine room; what is measured, compared and chosen does not.
DRIVERS_OF_THE_ENGINE = {
    *("calibrate/hits.py", "calibrate/model.py", "calibrate/template.py"),
    *("calibrate/aligned.py", "calibrate/neighbour.py", "calibrate/rehearse.py"),
}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text())


def room(module: str) -> str:
    return module.split("/")[0].removesuffix(".py")


def imports(node: ast.AST) -> Iterator[str]:
    """Dotted names imported anywhere under ``node``; ``from a import b`` gives ``a.b``."""
    for item in ast.walk(node):
        if isinstance(item, ast.Import):
            yield from (alias.name for alias in item.names)
        elif isinstance(item, ast.ImportFrom):
            assert item.level == 0, "relative imports hide the room"
            yield from (f"{item.module}.{alias.name}" for alias in item.names)


def packages(module: str) -> set[str]:
    return {name.split(".")[0] for name in imports(tree(module))}


def rooms_imported(module: str) -> set[str]:
    own = [name.split(".") for name in imports(tree(module)) if name.startswith("attncache_vllm.")]
    return {parts[1] for parts in own} - {"__version__"}


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_the_rooms_below_it(module: str) -> None:
    driven = {"engine"} if module in DRIVERS_OF_THE_ENGINE else set()
    assert rooms_imported(module) - {room(module)} <= MAY_IMPORT[room(module)] | driven


def test_only_what_drives_the_engine_of_a_calibration_knows_it() -> None:
    driving = {
        module
        for module in MODULES
        if room(module) == "calibrate" and "engine" in rooms_imported(module)
    }
    assert driving == DRIVERS_OF_THE_ENGINE


def test_every_room_has_its_rule() -> None:
    assert {room(module) for module in MODULES} == MAY_IMPORT.keys()


def test_only_the_engine_room_and_the_users_of_vllm_import_it() -> None:
    importing = {module for module in MODULES if "vllm" in packages(module)}
    assert {module for module in importing if room(module) != "engine"} == USERS_OF_VLLM


@pytest.mark.parametrize("module", sorted(USERS_OF_VLLM))
def test_users_of_vllm_import_it_only_when_they_need_it(module: str) -> None:
    at_import = [
        item for item in tree(module).body if isinstance(item, ast.Import | ast.ImportFrom)
    ]
    assert not [name for item in at_import for name in imports(item) if name.startswith("vllm")]


@pytest.mark.parametrize(
    ("rooms", "foreign"),
    [
        ({"reuse"}, {"vllm", "ray", "faiss", "msgpack", "transformers"}),
        ({"store"}, {"vllm", "torch", "transformers"}),
        ({"config", "errors", "tenants", "validation"}, {"vllm", "ray", "torch"}),
    ],
)
def test_the_lower_rooms_stay_free_of_foreign_packages(rooms: set[str], foreign: set[str]) -> None:
    for module in MODULES:
        if room(module) in rooms:
            assert not packages(module) & foreign, module


def test_only_what_runs_outside_of_servers_imports_ray() -> None:
    assert {module for module in MODULES if "ray" in packages(module)} == USERS_OF_RAY


def root_name(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def names_from_vllm(module: str) -> set[str]:
    names: set[str] = set()
    for item in ast.walk(tree(module)):
        if isinstance(item, ast.ImportFrom) and str(item.module).split(".")[0] == "vllm":
            names |= {alias.asname or alias.name for alias in item.names}
        elif isinstance(item, ast.Import):
            vllm = [alias for alias in item.names if alias.name.split(".")[0] == "vllm"]
            names |= {alias.asname or "vllm" for alias in vllm}
    return names


def patches(module: str) -> list[str]:
    """Places where something imported from vLLM gets an attribute, or anything gets a reducer."""
    from_vllm = names_from_vllm(module)
    found = []
    for item in ast.walk(tree(module)):
        targets: list[ast.expr] = []
        if isinstance(item, ast.Assign | ast.Delete):
            targets = item.targets
        elif isinstance(item, ast.AugAssign | ast.AnnAssign):
            targets = [item.target]
        elif isinstance(item, ast.Call) and ast.unparse(item.func) in {"setattr", "copyreg.pickle"}:
            found.append(f"{module}:{item.lineno}")
        for target in targets:
            if not isinstance(target, ast.Name) and root_name(target) in from_vllm:
                found.append(f"{module}:{item.lineno}")
    return found


def test_only_the_seams_patch_vllm() -> None:
    found = {module: patches(module) for module in MODULES}
    seams = {module for module in found if module.startswith("engine/compat/")}
    assert any(found[module] for module in seams), "the test must see the patches that there are"
    assert [place for module in found if module not in seams for place in found[module]] == []


def loaded_by(code: str) -> set[str]:
    child = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    ran = subprocess.run(
        [sys.executable, "-c", child], capture_output=True, text=True, check=True, timeout=60
    )
    return {name.split(".")[0] for name in json.loads(ran.stdout)}


@pytest.mark.parametrize("module", ["plugin", "cli"])
def test_loading_the_plugin_or_the_help_of_the_command_is_light(module: str) -> None:
    loaded = loaded_by(f"import attncache_vllm.{module}")
    assert not loaded & {"vllm", "torch", "numpy", "faiss", "pydantic", "transformers"}


def test_the_version_of_the_package_is_that_of_the_project() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    assert attncache_vllm.__version__ == project["version"]


def test_vllm_finds_the_plugin_where_it_is() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    [target] = project["entry-points"]["vllm.general_plugins"].values()
    module, function = target.split(":")
    path = PACKAGE.parent / f"{module.replace('.', '/')}.py"
    defined = {item.name for item in ast.parse(path.read_text()).body if hasattr(item, "name")}
    assert function in defined
