# SPDX-License-Identifier: Apache-2.0
"""The files calibration adds to a store: projector, features and the index over them."""

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attncache_vllm.errors import StoreDamaged, StoreError
from attncache_vllm.store import checks
from attncache_vllm.store.index import (
    FeatureIndex,
    Features,
    build_index,
    deserialize_index,
    serialize_index,
)
from attncache_vllm.store.manifest import FileRef, Manifest, Published, write_atomic

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Serving:
    """What a store answers lookups with. ``rebuilt``: its index file was damaged or gone."""

    projector: bytes
    index: FeatureIndex
    rebuilt: bool


def write_published(
    folder: Path,
    plan: dict[str, Any],
    report: dict[str, Any],
    projector: bytes,
    features: Features,
    factory: str,
) -> Published:
    """Write the three files and describe them. Nothing refers to them before a manifest does."""
    features = np.ascontiguousarray(features, dtype="<f4")
    contents = {
        "projector": projector,
        "features": features.tobytes(),
        "index": serialize_index(build_index(features, factory)),
    }
    files = {kind: FileRef.of(kind, data) for kind, data in contents.items()}
    published = Published(
        plan=checks.plain(plan, "plan"),
        report=checks.plain(report, "report"),
        rows=features.shape[0],
        dim=features.shape[1],
        factory=factory,
        **files,
    )
    for kind, data in contents.items():
        write_atomic(folder / files[kind].name, data)
    return published


def load_published(folder: Path, manifest: Manifest, published: Published) -> Serving:
    """Read and check the files; an index that is not what was written is built again in memory.

    Raises:
        StoreDamaged: projector or features are damaged, which only a new calibration can cure.
        FileNotFoundError: one of these two is gone, perhaps because a newer manifest replaced it.
    """
    projector = read_file(folder, published.projector)
    raw = read_file(folder, published.features)
    features = np.frombuffer(raw, dtype="<f4").reshape(published.rows, published.dim)
    rebuilt = False
    try:
        data = read_file(folder, published.index)
        index = deserialize_index(data, published.rows, published.dim)
    except (StoreError, OSError) as error:
        logger.warning("building the index of %s again: %s", folder, error)
        index, rebuilt = build_index(features, published.factory), True
    lengths = [entry.length for entry in manifest.entries[: published.rows]]
    return Serving(projector, FeatureIndex(index, features, lengths), rebuilt)


def read_consistently(folder: Path) -> tuple[Manifest, Serving | None]:
    """A manifest and the published files it names, although a writer may replace both meanwhile."""
    while True:
        manifest = Manifest.read(folder)
        if manifest.published is None:
            return manifest, None
        try:
            return manifest, load_published(folder, manifest, manifest.published)
        except OSError as error:
            if Manifest.read(folder) == manifest:
                raise StoreDamaged(
                    f"{folder} must have its features and projector, got {error}; "
                    "run 'attncache build' again"
                ) from error


def read_file(folder: Path, file: FileRef) -> bytes:
    """The bytes of ``file``, or ``StoreDamaged`` if they are not those that were written."""
    data = b""
    with (folder / file.name).open("rb") as stream:
        if os.fstat(stream.fileno()).st_size == file.size:
            data = stream.read(file.size)
    if hashlib.sha256(data).digest() != file.sha256:
        raise StoreDamaged(
            f"{folder / file.name} does not have its checksum; run 'attncache build' again"
        )
    return data
