# SPDX-License-Identifier: Apache-2.0
"""Where maps are kept: the `MapStore` protocol and its homes."""

from attncache_vllm.store.home import open_store
from attncache_vllm.store.local import LocalStore
from attncache_vllm.store.protocol import (
    GrowingStore,
    MapStore,
    Namespace,
    Neighbour,
    Overlap,
    Record,
    ServedStore,
    StoreHealth,
    StoreStats,
    VerifyReport,
    token_hash,
)
from attncache_vllm.store.records import MAX_LENGTH

__all__ = [
    "MAX_LENGTH",
    "GrowingStore",
    "LocalStore",
    "MapStore",
    "Namespace",
    "Neighbour",
    "Overlap",
    "Record",
    "ServedStore",
    "StoreHealth",
    "StoreStats",
    "VerifyReport",
    "open_store",
    "token_hash",
]
