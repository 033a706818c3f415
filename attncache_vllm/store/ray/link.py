# SPDX-License-Identifier: Apache-2.0
"""A connection to a gateway that is replaced whenever it is over."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import replace
from threading import Event, Thread

from attncache_vllm.errors import StoreError
from attncache_vllm.store.protocol import Namespace
from attncache_vllm.store.ray.channel import close_all, mapped
from attncache_vllm.store.ray.connection import Connection
from attncache_vllm.store.ray.edition import MAX_BYTES, Edition
from attncache_vllm.store.ray.messages import Open

logger = logging.getLogger(__name__)

# Ray takes about three seconds to join, and thirty to give up.
_OPEN_SECONDS = 120.0
# A gateway sends news every second. One that is silent for so long is ended.
_SILENT_SECONDS = 10.0
_LOOK_SECONDS = 0.5
_LONGEST_BACKOFF = 30.0


class Link:
    """Keeps a gateway running for one edition, from a thread of its own.

    While there is none, ``connection`` is one that is over: it refuses at once.

    Args:
        cluster: the Ray cluster, as Ray calls it.
        namespace: what the maps must be comparable with; None takes the only edition there is.

    Raises:
        StoreError: the cluster cannot be reached, or holds no edition.
        NamespaceMismatch: it has none of this namespace; the message lists the differences.
    """

    def __init__(self, cluster: str, namespace: Namespace | None) -> None:
        self._cluster = cluster
        self.connection, self.edition = _opened(cluster, Open(namespace, None))
        self._closed = Event()
        Thread(target=self._keep, name="attncache-store", daemon=True).start()

    def close(self) -> None:
        """End the gateway, for good."""
        self._closed.set()
        self.connection.close()

    def _keep(self) -> None:
        backoff = 1.0
        while not self._closed.wait(_LOOK_SECONDS):
            silent = time.monotonic() - self.connection.heard_at > _SILENT_SECONDS
            over = self.connection.over or ("the gateway to Ray hangs" if silent else "")
            if not over:
                backoff = 1.0
                continue
            logger.warning("the map store is out of reach, computing exactly: %s", over)
            self.connection.close()
            try:
                # The one that is served, although another one may be current by now.
                found, _ = _opened(self._cluster, Open(None, self.edition.digest))
            except StoreError as error:
                logger.warning("trying again in %.0f s: %s", backoff, error)
                self._closed.wait(backoff)
                backoff = min(_LONGEST_BACKOFF, 2 * backoff)
                continue
            found.before = self.connection.faults() + Counter(gateway=1)
            if found.news is None and self.connection.news is not None:
                found.news = replace(self.connection.news, faults={})
            self.connection = found
            logger.warning("the map store is within reach again")
        self.connection.close()


def _opened(cluster: str, request: Open) -> tuple[Connection, Edition]:
    connection = Connection(cluster)
    try:
        answer = connection.ask(request, time.monotonic() + _OPEN_SECONDS)
        try:
            if len(answer.files) != 1:
                raise ValueError(f"it must be one file, got {len(answer.files)!r}")
            return connection, Edition.from_bytes(mapped(answer.files[0], MAX_BYTES))
        except ValueError as error:
            raise StoreError(f"the edition cannot be read by this release: {error}") from error
        finally:
            close_all(answer.files)
    except BaseException:
        connection.close()
        raise
