# SPDX-License-Identifier: Apache-2.0
"""From what the setting ``store`` says to the store."""

from pathlib import Path

from attncache_vllm.store.local import LocalStore
from attncache_vllm.store.protocol import Namespace, ServedStore


def open_store(address: str | Path, namespace: Namespace | None = None) -> ServedStore:
    """The store in a folder, or on the cluster that a ``str`` beginning with ``ray:`` names.

    Args:
        address: a ``Path`` is a folder whatever its name.
        namespace: what its maps must be comparable with; None takes any.

    Raises:
        StoreError: there is no such store, it cannot be reached, or it is damaged.
        NamespaceMismatch: its maps are of another namespace; the message lists the differences.
    """
    if isinstance(address, str) and address.startswith("ray:"):
        # The embedded store needs nothing of Ray.
        from attncache_vllm.store.ray.client import RayStore

        return RayStore.connect(address, namespace)
    return LocalStore.open(address, namespace=namespace)
