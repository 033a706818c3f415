# SPDX-License-Identifier: Apache-2.0
"""Shards with known contents, on clocks that stand still until a test moves them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from store_samples import (
    ANY_LENGTH,
    ARTIFACTS,
    FEATURE_DIM,
    NAMESPACE,
    make_features,
    make_record,
)

from attncache_vllm.store.ray.edition import Edition
from attncache_vllm.store.ray.ring import entry_id
from attncache_vllm.store.ray.shard import Limits, Shard
from attncache_vllm.store.records import encode_record

EDITION = Edition(
    namespace=NAMESPACE,
    build={"texts": "sample"},
    plan={"layers": [1, 3]},
    report={"loss": 0.5},
    projector=b"projector",
    dim=FEATURE_DIM,
    artifacts=ARTIFACTS,
)
DIGEST = EDITION.digest
ALICE, BOB = "a11ce0", "b0b000"
PLENTY = Limits(1 << 30)
FEATURES = make_features(4096)


@dataclass
class Clock:
    now: float = 1e9

    def __call__(self) -> float:
        return self.now


def open_shard(folder: Path, limits: Limits = PLENTY, **options: Any) -> Shard:
    """A shard to which the edition is published."""
    shard = Shard(folder, limits, **options)
    shard.publish(EDITION.to_bytes())
    return shard


def bytes_of(number: int, *, map_bytes: int | None = None) -> np.ndarray:
    record = b"".join(encode_record(make_record(number, map_bytes=map_bytes)))
    return np.frombuffer(record, np.uint8)


def id_of(number: int, tenant: str = "") -> int:
    return entry_id(tenant, make_record(number).token_hash)


def put(
    shard: Shard,
    numbers: Sequence[int],
    tenant: str = "",
    *,
    edition: str = DIGEST,
    map_bytes: int | None = None,
    ages_s: Sequence[float] | None = None,
) -> list[str]:
    records = [bytes_of(number, map_bytes=map_bytes) for number in numbers]
    features = FEATURES[list(numbers)].reshape(len(records), FEATURE_DIM)
    return shard.put(edition, tenant, features, records, ages_s)


def held(shard: Shard, tenant: str | None = None, edition: str = DIGEST) -> set[int]:
    return set(shard.ids(edition, tenant).tolist())


def other_edition() -> Edition:
    return replace(EDITION, plan={"layers": [3]})


def find(shard: Shard, number: int, tenant: str = "", edition: str = DIGEST) -> int:
    """The id of the nearest entry to the feature of ``number``, -1 for none."""
    bounds = np.array([ANY_LENGTH])
    ids, _, _ = shard.lookup(edition, [tenant], FEATURES[[number]], bounds, 1)
    return int(ids[0, 0])


def path_of(folder: Path, number: int, tenant: str = "") -> Path:
    return folder / DIGEST[:16] / f"{id_of(number, tenant):016x}.entry"
