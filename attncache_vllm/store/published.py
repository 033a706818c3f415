# SPDX-License-Identifier: Apache-2.0
"""The files that are published in a store: projector, features, sketches and artifacts."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attncache_vllm.errors import StoreDamaged, StoreError
from attncache_vllm.store import checks
from attncache_vllm.store.index import FeatureIndex, Features, build_index, chosen_factory
from attncache_vllm.store.manifest import (
    FileRef,
    Manifest,
    Published,
    artifact_kind,
    write_atomic,
)
from attncache_vllm.store.sketches import Sketch, SketchIndex, encode_sketches


@dataclass(frozen=True)
class Serving:
    """What a store answers lookups with."""

    projector: bytes
    index: FeatureIndex
    sketches: SketchIndex

    def forget(self, entry_id: int) -> None:
        """Never answer with ``entry_id`` again."""
        self.index.forget(entry_id)
        self.sketches.forget(entry_id)


def write_published(
    folder: Path,
    plan: dict[str, Any],
    report: dict[str, Any],
    projector: bytes,
    features: Features,
    factory: str,
    sketches: Sequence[Sketch],
    artifacts: Mapping[str, bytes],
) -> Published:
    """Write the files and describe them. Nothing refers to them before a manifest does.

    Raises:
        StoreError: an argument does not fit, see ``LocalStore.publish``.
    """
    if features.ndim != 2 or not 0 < len(features) == len(sketches):
        raise StoreError(
            f"features must be one row for each of {len(sketches)} (at least 1) entries, "
            f"got shape {features.shape!r}"
        )
    if not np.isfinite(features).all():
        raise StoreError("features must be finite, got NaN or infinity; train again")
    features = np.ascontiguousarray(features, dtype="<f4")
    factory = chosen_factory(factory, *features.shape)
    build_index(features, factory)  # refused now, not when the store is opened
    contents = {
        "projector": projector,
        "features": features.tobytes(),
        "sketches": encode_sketches(sketches),
    }
    files = {kind: FileRef.of(kind, data) for kind, data in contents.items()}
    published = Published(
        plan=checks.plain(plan, "plan"),
        report=checks.plain(report, "report"),
        rows=features.shape[0],
        dim=features.shape[1],
        factory=factory,
        artifacts=write_artifacts(folder, artifacts),
        **files,
    )
    for kind, data in contents.items():
        write_atomic(folder / files[kind].name, data)
    return published


def write_artifacts(folder: Path, artifacts: Mapping[str, bytes]) -> dict[str, FileRef]:
    """Write a file for each artifact; ``StoreError`` if one has no good name."""
    try:
        files = {name: FileRef.of(artifact_kind(name), data) for name, data in artifacts.items()}
    except ValueError as error:
        raise StoreError(str(error)) from None
    for name, file in files.items():
        write_atomic(folder / file.name, artifacts[name])
    return files


def load_published(folder: Path, manifest: Manifest, published: Published) -> Serving:
    """Read and check the files, and build the index.

    Raises:
        StoreDamaged: projector, features or sketches are damaged, which only a build can cure.
        FileNotFoundError: one of these is gone, perhaps because a newer manifest replaced it.
    """
    projector = read_file(folder, published.projector)
    raw = read_file(folder, published.features)
    features = np.frombuffer(raw, dtype="<f4").reshape(published.rows, published.dim)
    lengths = [entry.length for entry in manifest.entries[: published.rows]]
    sketches = SketchIndex(read_file(folder, published.sketches), lengths)
    index = FeatureIndex(features, lengths, published.factory)
    return Serving(projector, index, sketches)


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
                    f"{folder} must have its features, sketches and projector, got {error}; "
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


def read_artifact(folder: Path, file: FileRef) -> bytes:
    """As ``read_file``, for what a build does not make again; one that is gone is damage too."""
    try:
        return read_file(folder, file)
    except (StoreDamaged, OSError) as error:
        raise StoreDamaged(
            f"{folder / file.name} must be as it was published; if it was replaced meanwhile open "
            "the store again, else run 'attncache calibrate' again"
        ) from error
