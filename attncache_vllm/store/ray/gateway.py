# SPDX-License-Identifier: Apache-2.0
"""The process between a server and Ray: ``python -m attncache_vllm.store.ray.gateway``.

Ray's core worker ends its process when it has lost its head (version 2.60: after 60 seconds, with
exit code 1). A server must outlive that, so none hosts it: the server starts this process, asks it
over a pair of sockets, and starts another one when it has ended.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from attncache_vllm.errors import AttnCacheError, NamespaceMismatch, StoreError
from attncache_vllm.store.checks import unpack
from attncache_vllm.store.protocol import Namespace
from attncache_vllm.store.ray.actor import RayCalls, join
from attncache_vllm.store.ray.channel import Channel, close_all, mapped, sealed
from attncache_vllm.store.ray.fanout import Fanout
from attncache_vllm.store.ray.messages import (
    MAX_RECORD_BYTES,
    Kind,
    Lookup,
    News,
    Open,
    Overlaps,
    Put,
    Request,
    TokenIds,
    found_body,
    frame,
    news_body,
    parse_request,
    token_ids_body,
)
from attncache_vllm.store.ray.reading import Bytes

logger = logging.getLogger(__name__)

_SEND_SECONDS = 10.0
_TEND_SECONDS = 1.0
_OPEN_SECONDS = 10.0
_PUT_SECONDS = 30.0
_PUT_BATCH = 16
_THREADS = 4
# A driver whose head comes back in time at the same address, but as another cluster, goes on, and
# its shards are never found again.
_LONELY_SECONDS = 10.0
_REASON = 4096
# What an answer takes on its way back: a shard that is late must not make the others late too.
_RETURN_SECONDS = 0.01


class Gateway:
    """Answers the frames of one server until that is gone."""

    def __init__(self, channel: Channel, connect: Callable[[], Fanout]) -> None:
        """``connect`` finds the shards; it is called by the first request, which opens."""
        self._channel = channel
        self._connect = connect
        self._fanout: Fanout | None = None
        self._edition = ""
        self._puts: queue.Queue[tuple[Put, Bytes]] = queue.Queue(maxsize=4 * _PUT_BATCH)
        self._dropped = 0
        self._over = threading.Event()

    def serve(self) -> None:
        """Returns when the server is gone; ``ValueError`` if it sends what is no frame."""
        pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="attncache-gateway")
        with contextlib.suppress(EOFError):
            while True:
                head, body, files = self._channel.receive()
                try:
                    request = parse_request(unpack(body))
                except ValueError as error:
                    close_all(files)
                    self._refuse(head.number, error)
                    continue
                try:
                    if isinstance(request, Put):
                        self._take(request, files)
                    elif isinstance(request, Open):
                        self._answer(head.number, request)  # Ray wants to start in the main thread
                    else:
                        pool.submit(self._answer, head.number, request)
                finally:
                    close_all(files)
        self._over.set()

    def _answer(self, number: int, request: Request) -> None:
        files: list[int] = []
        try:
            answer = frame(Kind.ANSWER, number, self._do(request, files), len(files))
        except Exception as error:
            if not isinstance(error, AttnCacheError):
                logger.exception("a request failed")
            self._refuse(number, error)
        else:
            with contextlib.suppress(OSError):  # the server is gone, and so is this process, soon
                self._channel.send(answer, files)
        finally:
            close_all(files)

    def _refuse(self, number: int, error: Exception) -> None:
        reason = (str(error) or "it gives no reason")[:_REASON]
        with contextlib.suppress(OSError):
            self._channel.send(frame(Kind.FAULT, number, [_public_name(error), reason]))

    def _do(self, request: Request, files: list[int]) -> Any:
        """The body of the answer; descriptors of files that go with it are added to ``files``."""
        if isinstance(request, Open):
            return self._open(request, files)
        if self._fanout is None or isinstance(request, Put):
            raise StoreError("a gateway must be opened before it is asked")
        fanout, edition = self._fanout, self._edition
        left = request.deadline - time.monotonic()
        deadline = request.deadline - min(_RETURN_SECONDS, left / 10)
        if isinstance(request, Lookup):
            return found_body(
                fanout.lookup(
                    edition,
                    request.tenants,
                    request.features,
                    request.lengths,
                    request.neighbours,
                    deadline,
                )
            )
        if isinstance(request, Overlaps):
            return found_body(
                fanout.overlaps(
                    edition, request.tenants, request.sketches, request.neighbours, deadline
                )
            )
        if isinstance(request, TokenIds):
            return token_ids_body(fanout.token_ids(edition, request.ids, deadline))
        records = fanout.load(edition, request.ids, deadline)
        files += [sealed(record.data) for record in records if record is not None]
        return [record is not None for record in records]

    # -- opening ------------------------------------------------------------------------------

    def _open(self, request: Open, files: list[int]) -> str:
        fanout = self._connect()
        deadline = time.monotonic() + _OPEN_SECONDS
        listed = fanout.control("editions", deadline=deadline)
        digest = request.edition or _current(list(listed.values()), request.namespace)
        for shard in listed:
            answer = fanout.control("edition", digest, deadline=deadline, shards=[shard])
            if (data := answer.get(shard)) is not None:
                files.append(sealed(data))
                break
        else:
            raise StoreError(
                f"the edition {digest[:16]} must be in a shard, got none of {len(listed)}; "
                "load it with 'attncache store load DIR'"
            )
        self._edition, self._fanout = digest, fanout
        for loop in (self._tend, self._tell, self._put):
            threading.Thread(target=loop, daemon=True).start()
        return digest

    # -- beside the requests ------------------------------------------------------------------

    def _tend(self) -> None:
        assert self._fanout is not None
        answered_at = time.monotonic()
        while not self._over.wait(_TEND_SECONDS):
            if len(self._fanout.out()) < len(self._fanout.placement.active):
                answered_at = time.monotonic()
            elif time.monotonic() - answered_at > _LONELY_SECONDS:
                logger.warning("no shard has answered for %.0f s: joining anew", _LONELY_SECONDS)
                self._channel.close()
            try:
                self._fanout.tend()
            except Exception:
                logger.exception("shards could not be looked at")

    def _tell(self) -> None:
        """News, and with them the word that this process is alive, although shards may not be."""
        assert self._fanout is not None
        with contextlib.suppress(OSError):
            while True:
                fanout = self._fanout
                faults = {**fanout.faults(), "dropped": self._dropped}
                news = News(fanout.figures(), fanout.rearmed_at(), fanout.out(), faults)
                self._channel.send(frame(Kind.NEWS, 0, news_body(news)))
                time.sleep(_TEND_SECONDS)

    def _take(self, request: Put, files: list[int]) -> None:
        """Queue a record up. What cannot be kept is counted; nobody waits for it."""
        try:
            [file] = files
            record = np.frombuffer(mapped(file, MAX_RECORD_BYTES), dtype=np.uint8)
            self._puts.put_nowait((request, record))
        except (ValueError, queue.Full):
            self._dropped += 1

    def _put(self) -> None:
        assert self._fanout is not None
        while True:
            batch = [self._puts.get()]
            with contextlib.suppress(queue.Empty):
                while len(batch) < _PUT_BATCH:
                    batch.append(self._puts.get_nowait())
            by_tenant = defaultdict(list)
            for request, record in batch:
                by_tenant[request.tenant].append((request.entry_id, request.feature, record, 0.0))
            for tenant, entries in by_tenant.items():
                deadline = time.monotonic() + _PUT_SECONDS
                try:
                    said = self._fanout.put(self._edition, tenant, entries, deadline)
                except Exception:
                    logger.exception("entries could not be put")
                    said = [[] for _ in entries]
                self._dropped += sum(not {"kept", "known"} & set(each) for each in said)


def _current(listed: list[dict[str, Any]], namespace: Namespace | None) -> str:
    """The digest of the edition that most shards have as the current one of the namespace.

    Raises:
        NamespaceMismatch: none has one.
        StoreError: there is none at all; or several, and no namespace to choose by.
    """
    current = {
        digest: Namespace.from_dict(about["namespace"])
        for editions in listed
        for digest, about in editions.items()
        if about["current"]
    }
    if not current:
        raise StoreError(
            "the shards must hold an edition, got none; load one with 'attncache store load DIR'"
        )
    fitting = [
        digest
        for editions in listed
        for digest, about in editions.items()
        if about["current"] and (namespace is None or not current[digest].differences(namespace))
    ]
    if namespace is None and len({found.digest() for found in current.values()}) > 1:
        raise StoreError(
            "without a namespace there must be one edition to choose from, got "
            f"{_listed(current)}; name the model"
        )
    if not fitting:
        assert namespace is not None
        raise NamespaceMismatch(
            "the maps of the shards are of another namespace: "
            + " | ".join(
                f"{digest[:16]} ({found.model}): {'; '.join(found.differences(namespace))}"
                for digest, found in sorted(current.items())
            )
            + "; serve a model they were built with, or load a store of this one"
        )
    votes = Counter(fitting)
    return max(sorted(votes), key=votes.__getitem__)


def _listed(current: dict[str, Namespace]) -> str:
    return ", ".join(f"{digest[:16]} ({found.model})" for digest, found in sorted(current.items()))


def _public_name(error: Exception) -> str:
    """The class that the server raises: of a refusal that came through Ray, the shard's own."""
    for kind in type(error).__mro__:
        if kind.__module__ == AttnCacheError.__module__:
            return kind.__name__
    return StoreError.__name__


def _connect(address: str) -> Fanout:
    join(address)
    return Fanout(RayCalls())


def _end_with(parent: int) -> None:
    """A child of the server may hold the other socket open: the server's end is seen here, too."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


def main() -> None:
    """Arguments: descriptor of the socket, the server's process, its parent, the cluster."""
    descriptor, parent, grandparent = map(int, sys.argv[1:4])
    logging.basicConfig(format="attncache gateway: %(message)s", level=logging.WARNING)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # vLLM pins a CPU worker to the cores of its model, and its children inherit that.
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, os.sched_getaffinity(grandparent))
    channel = Channel(socket.socket(fileno=descriptor), _SEND_SECONDS)
    Gateway(channel, lambda: _connect(sys.argv[4])).serve()
    # Not by way of Ray's own clean-up, which waits for a head that may be gone.
    os._exit(0)


if __name__ == "__main__":
    main()
