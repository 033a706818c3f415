# SPDX-License-Identifier: Apache-2.0
"""From an embedded store to the shards, and back."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from attncache_vllm.errors import StoreError
from attncache_vllm.store.index import Features
from attncache_vllm.store.local import LocalStore
from attncache_vllm.store.published import read_file
from attncache_vllm.store.ray.edition import Edition
from attncache_vllm.store.ray.fanout import Fanout
from attncache_vllm.store.ray.moving import entries, exported
from attncache_vllm.store.ray.reading import Bytes
from attncache_vllm.store.ray.ring import entry_id
from attncache_vllm.store.records import decode_record, encode_record
from attncache_vllm.tenants import SHARED_TENANT

_SECONDS = 120.0
_BATCH_BYTES = 64 << 20


def load(
    fanout: Fanout, folder: Path, report: Callable[[int, int], None] = lambda done, all: None
) -> dict[str, int]:
    """Publish what an embedded store published, and put its sound entries, for the shared tenant.

    Args:
        fanout: to the shards.
        folder: of the embedded store.
        report: told how many entries are done, of how many.

    Returns:
        How many entries were kept, known before, and refused by a shard that should hold them.

    Raises:
        StoreError: the store cannot be read, or a shard does not answer.
    """
    outcomes: Counter[str] = Counter(kept=0, known=0, refused=0)
    with LocalStore.open(folder) as store:
        edition = Edition.of(store)
        features = _features(store, folder)
        fanout.every("publish", edition.to_bytes(), deadline=_soon())
        batch: list[tuple[int, Features, Bytes, float]] = []
        size = 0
        for number, record in store.records():
            if number >= len(features):
                break  # put but not published: it cannot be found there either
            data = np.frombuffer(b"".join(encode_record(record)), dtype=np.uint8)
            own = entry_id(SHARED_TENANT, record.token_hash)
            batch.append((own, features[number], data, 0.0))
            size += data.nbytes
            if size >= _BATCH_BYTES or number + 1 == len(features):
                outcomes += _put(fanout, edition.digest, batch)
                report(number + 1, len(features))
                batch, size = [], 0
        if batch:
            outcomes += _put(fanout, edition.digest, batch)
        report(len(features), len(features))
    return {name: outcomes[name] for name in ("kept", "known", "refused")}


def save(fanout: Fanout, folder: Path, digest: str | None = None) -> int:
    """Make an embedded store of an edition's entries of the shared tenant that hold all layers of
    its build: those that a server has admitted may hold the plan's only, and what is calibrated
    from reads them all.

    Args:
        fanout: to the shards.
        folder: where; empty, or not there.
        digest: the beginning of the edition's digest; None takes the only current one.

    Returns:
        How many entries it has.

    Raises:
        StoreError: there is no such edition, or several; it has no entry; a shard does not answer.
    """
    listed = fanout.every("editions", deadline=_soon())
    chosen = {
        found: shard
        for shard, editions in listed.items()
        for found, about in editions.items()
        if (about["current"] if digest is None else found.startswith(digest))
    }
    if len(chosen) != 1:
        raise StoreError(
            f"one edition must be chosen, got {sorted(found[:16] for found in chosen)!r}; "
            "name it with --edition, see 'attncache store status'"
        )
    [(found, home)] = chosen.items()
    data = fanout.every("edition", found, deadline=_soon(), shards=[home])[home]
    edition = Edition.from_bytes(data)
    features = []
    layers = set(edition.build.get("layers", ()))
    with LocalStore.create(folder, edition.namespace, edition.build) as store:
        seen: set[int] = set()
        for shard in listed:
            ids = [
                i for i in entries(fanout, shard, found, SHARED_TENANT).tolist() if i not in seen
            ]
            for own, entry in exported(fanout, shard, found, ids):
                seen.add(own)
                record = decode_record(entry.record.data)
                if layers <= record.maps.keys():
                    store.put(record)
                    features.append(entry.feature)
        if not features:
            raise StoreError(f"the edition {found[:16]} must have entries to be saved, got none")
        store.publish(
            edition.plan,
            edition.projector,
            edition.report,
            np.stack(features),
            artifacts=edition.artifacts,
        )
    return len(features)


def _features(store: LocalStore, folder: Path) -> Features:
    published = store.manifest.published
    assert published is not None, "an edition was made of it"
    data = read_file(folder, published.features)
    return np.frombuffer(data, dtype="<f4").reshape(published.rows, published.dim)


def _put(
    fanout: Fanout, edition: str, batch: list[tuple[int, Features, Bytes, float]]
) -> Counter[str]:
    said = fanout.put(edition, SHARED_TENANT, batch, _soon())
    outcomes: Counter[str] = Counter()
    for (own, *_), each in zip(batch, said, strict=True):
        owners = len(fanout.placement.owners(own))
        refused = len(each) < owners or any(outcome.startswith("refused") for outcome in each)
        outcomes["refused" if refused else "kept" if "kept" in each else "known"] += 1
    return outcomes


def _soon() -> float:
    return time.monotonic() + _SECONDS
