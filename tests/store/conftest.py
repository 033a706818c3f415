# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
from store_samples import build_store


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    """A published store of 12 entries in several segments."""
    path = tmp_path / "store"
    build_store(path, 12, roll_bytes=2048)
    return path
