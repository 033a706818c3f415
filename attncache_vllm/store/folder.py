# SPDX-License-Identifier: Apache-2.0
"""The folder of a store: who may write in it, and which files have no business there."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attncache_vllm.errors import StoreError, StoreInUse
from attncache_vllm.store.manifest import FILE_NAME, Manifest, owned_by_store

_LOCK_NAME = "lock"


def lock(folder: Path) -> int:
    """Become the store's only writer; closing the returned descriptor, or dying, gives it up.

    Raises:
        StoreInUse: another process, or another store object of this one, is writing.
        StoreError: the folder cannot be written to.
    """
    with storing(f"lock {folder}"):
        descriptor = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise StoreInUse(
            f"a store must have one writer at a time, got a second one for {folder}; "
            f"wait for the first or open it for reading ({error.strerror})"
        ) from error
    return descriptor


def require_empty(folder: Path) -> None:
    """``StoreError`` unless ``folder`` holds nothing but traces of an interrupted creation."""
    with storing(f"list {folder}"):
        names = set(os.listdir(folder)) - {_LOCK_NAME, FILE_NAME + ".tmp"}
    if FILE_NAME in names:
        raise StoreError(f"a new store needs a new folder, got the store {folder}; open it instead")
    if names:
        raise StoreError(
            f"a new store needs an empty folder, got {folder} with {min(names)!r} in it; "
            "choose another one"
        )


def remove_unreferenced(folder: Path, manifest: Manifest) -> None:
    """Remove the files of former states and of interrupted writes; foreign files stay."""
    kept = {segment.name for segment in manifest.segments}
    if manifest.published is not None:
        kept |= {file.name for file in manifest.published.files()}
    for name in os.listdir(folder):
        if owned_by_store(name) and name not in kept:
            (folder / name).unlink(missing_ok=True)


@contextmanager
def storing(action: str) -> Iterator[None]:
    """Turn an ``OSError`` of the block into a ``StoreError`` that names the action."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot {action}: {error.strerror or error}") from error
