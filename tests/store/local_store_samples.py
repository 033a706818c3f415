# SPDX-License-Identifier: Apache-2.0
"""What the tests of an embedded store do to its files."""

import math
from pathlib import Path
from typing import Any

from attncache_vllm.store import LocalStore

NEVER = math.inf
ENTRIES = 6  # of the store `pristine`


def load_one(store: LocalStore, entry_id: int) -> Any:
    return store.load([entry_id], deadline=NEVER)[0]


def files_like(path: Path, kind: str) -> list[Path]:
    return sorted(path.glob(f"{kind}-*"))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
