# SPDX-License-Identifier: Apache-2.0
"""Small stores with known contents. Record i is a function of i, so any process can check it."""

import hashlib
from pathlib import Path

import numpy as np

from attncache_vllm.store import MAX_LENGTH, LocalStore, Namespace, Record

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
ANY_LENGTH = (1, MAX_LENGTH)


def make_record(number: int, *, map_bytes: int | None = None) -> Record:
    random = np.random.default_rng(number)
    size = 60 + number % 10 if map_bytes is None else map_bytes
    pooled = random.normal(size=(2, 4)).astype(np.float16).astype(np.float32)
    return Record(
        token_hash=hashlib.sha256(str(number).encode()).digest(),
        length=1 + 37 * number % 300,
        codec="test",
        pooled=pooled,
        maps={layer: random.integers(0, 256, size, dtype=np.uint8) for layer in (1, 3)},
    )


def make_features(entries: int) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(entries, FEATURE_DIM)).astype(np.float32)


def assert_same(found: Record, expected: Record) -> None:
    assert found.token_hash == expected.token_hash
    assert (found.length, found.codec) == (expected.length, expected.codec)
    np.testing.assert_array_equal(found.pooled, expected.pooled)
    assert list(found.maps) == list(expected.maps)
    for layer, encoded in expected.maps.items():
        np.testing.assert_array_equal(found.maps[layer], encoded)


def build_store(path: Path, entries: int, **options: int) -> None:
    with LocalStore.create(path, NAMESPACE, {"texts": "sample"}, **options) as store:
        for number in range(entries):
            store.put(make_record(number))
        store.publish({"layers": [1, 3]}, b"projector", {"loss": 0.5}, make_features(entries))
