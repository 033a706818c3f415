# SPDX-License-Identifier: Apache-2.0
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from local_store_samples import ENTRIES
from store_samples import build_store


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    """A published store of 12 entries in several segments."""
    path = tmp_path / "store"
    build_store(path, 12, roll_bytes=2048)
    return path


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published store of 6 entries in one segment. Copy it before harming it."""
    path = tmp_path_factory.mktemp("pristine") / "store"
    build_store(path, ENTRIES)
    return path


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    root = tmp_path_factory.mktemp("scratch")

    def copy(store: Path) -> Path:
        shutil.rmtree(root / "store", ignore_errors=True)
        return shutil.copytree(store, root / "store")

    return copy
