# SPDX-License-Identifier: Apache-2.0
"""Small stores with known contents. Record i is a function of i, so any process can check it."""

import math
from pathlib import Path

import numpy as np

from attncache_vllm.store import (
    MAX_LENGTH,
    LocalStore,
    MapStore,
    Namespace,
    Neighbour,
    Record,
    token_hash,
)
from attncache_vllm.tenants import SHARED_TENANT

NAMESPACE = Namespace(
    model="org/model",
    weights="0f" * 32,
    architecture="LlamaForCausalLM",
    dtype="bfloat16",
    attention="causal",
    num_layers=4,
    num_heads=9,
    num_kv_heads=3,
    head_size=64,
    rope="default-10000",
    tensor_parallel="0/1",
)
FEATURE_DIM = 8
ARTIFACTS = {"templates": bytes(range(200)), "corrections": b"corrections"}
ANY_LENGTH = (1, MAX_LENGTH)
# The tenant of one query.
SHARED = [SHARED_TENANT]


def make_record(number: int, *, map_bytes: int | None = None) -> Record:
    random = np.random.default_rng(number)
    size = 60 + number % 10 if map_bytes is None else map_bytes
    pooled = random.normal(size=(2, 4)).astype(np.float16).astype(np.float32)
    length = 1 + 37 * number % 300
    token_ids = 1 + np.arange(number, number + length, dtype=np.int32) ** 2 % 50_000
    return Record(
        token_hash=token_hash(token_ids),
        length=length,
        codec="test",
        pooled=pooled,
        maps={layer: random.integers(0, 256, size, dtype=np.uint8) for layer in (1, 3)},
        token_ids=token_ids,
        sketch=make_sketch(number),
    )


def make_sketch(number: int) -> np.ndarray:
    """Of 1 to 7 values, the first of which every sketch has."""
    own = np.random.default_rng(number).integers(1, 1 << 64, number % 7, dtype=np.uint64)
    return np.unique(np.append(own, np.uint64(1 << 63)))


def make_features(entries: int) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(entries, FEATURE_DIM)).astype(np.float32)


def near(
    store: MapStore, features: np.ndarray, neighbours: int = 1, deadline: float = math.inf
) -> list[list[Neighbour]]:
    """What is nearest, whatever its length."""
    queries = len(features)
    return store.lookup(
        features,
        [ANY_LENGTH] * queries,
        tenants=SHARED * queries,
        neighbours=neighbours,
        deadline=deadline,
    )


def assert_same(found: Record, expected: Record) -> None:
    assert found.token_hash == expected.token_hash
    assert (found.length, found.codec) == (expected.length, expected.codec)
    for name in ("pooled", "token_ids", "sketch"):
        array, same = getattr(found, name), getattr(expected, name)
        assert array.dtype == same.dtype
        np.testing.assert_array_equal(array, same)
    assert list(found.maps) == list(expected.maps)
    for layer, encoded in expected.maps.items():
        np.testing.assert_array_equal(found.maps[layer], encoded)


def build_store(path: Path, entries: int, **options: int) -> None:
    with LocalStore.create(path, NAMESPACE, {"texts": "sample"}, **options) as store:
        for number in range(entries):
            store.put(make_record(number))
        store.publish(
            {"layers": [1, 3]},
            b"projector",
            {"loss": 0.5},
            make_features(entries),
            artifacts=ARTIFACTS,
        )
