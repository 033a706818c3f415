# SPDX-License-Identifier: Apache-2.0
"""A word to the servers of a store that tripped layers may be tried again: a file's time."""

from __future__ import annotations

from pathlib import Path

from attncache_vllm.store.folder import storing

_NAME = "rearmed"


def rearm(folder: Path) -> None:
    """Tell every server that reads this store, within its next few dozen hits.

    Raises:
        StoreError: the folder cannot be written to.
    """
    with storing(f"rearm the servers of {folder}"):
        (folder / _NAME).touch()


def rearmed_at(folder: Path) -> int:
    """When servers were told last, in nanoseconds of the file's time; 0 if never."""
    try:
        return (folder / _NAME).stat().st_mtime_ns
    except OSError:
        return 0
