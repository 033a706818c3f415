# SPDX-License-Identifier: Apache-2.0
"""A running gateway, as its server sees it."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any

from attncache_vllm import errors
from attncache_vllm.errors import StoreError, StoreTimeout
from attncache_vllm.store.checks import unpack
from attncache_vllm.store.ray.channel import Channel, close_all
from attncache_vllm.store.ray.messages import (
    Head,
    Kind,
    News,
    Request,
    frame,
    parse_fault,
    parse_news,
    request_body,
)

# A gateway that takes nothing for so long hangs; its queue is far longer than what a step asks.
_SEND_SECONDS = 1.0
# Requests in a row that may run late, with no word from the gateway, before it is asked no more.
_UNANSWERED = 3


@dataclass(frozen=True)
class Answer:
    """The body of an answer, and descriptors of the files beside it, which are the asker's."""

    body: Any
    files: Sequence[int]


class Connection:
    """Starts a gateway, and asks it. Safe between threads; over when the gateway has ended."""

    before: Counter[str]
    """Faults that gateways before this one have told of."""

    def __init__(self, address: str) -> None:
        """``address`` is that of the Ray cluster; ``StoreError`` if no process can be started."""
        self.before = Counter()
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "attncache_vllm.store.ray.gateway"]
        parents = [str(os.getpid()), str(os.getppid())]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [*command, str(theirs.fileno()), *parents, address],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # the server's own is for its answers
                    start_new_session=True,  # what ends the server by the terminal is not for it
                )
        except OSError as error:
            ours.close()
            raise StoreError(f"the gateway to Ray cannot be started: {error}") from error
        self._channel = Channel(ours, _SEND_SECONDS)
        self._numbers = itertools.count(1)
        self._waiting: dict[int, SimpleQueue[Answer | StoreError]] = {}
        self._lock = Lock()
        self._over = ""
        self._unanswered = 0
        self.heard_at = time.monotonic()
        """When the gateway said something last, by ``time.monotonic()``."""
        self.news: News | None = None
        """What it said last on its own."""
        Thread(target=self._receive, name="attncache-gateway", daemon=True).start()

    @property
    def over(self) -> str:
        """Why nothing can be asked any more; empty as long as it can."""
        return self._over

    def faults(self) -> Counter[str]:
        """How often what went wrong, by kind, since the first gateway; see ``News``."""
        return self.before + Counter({} if self.news is None else self.news.faults)

    def ask(self, request: Request, deadline: float) -> Answer:
        """The gateway's answer.

        Raises:
            StoreTimeout: there is none by the deadline.
            StoreError: the gateway refuses, has ended, or has not said a word for several requests.
        """
        if self._unanswered >= _UNANSWERED:
            raise StoreError(
                "the gateway to Ray must answer, got nothing; it may be restarted soon"
            )
        number, box = next(self._numbers), SimpleQueue[Answer | StoreError]()
        with self._lock:
            if self._over:
                raise StoreError(self._over)
            self._waiting[number] = box
        try:
            self._send(Kind.REQUEST, number, request)
            answer = box.get(timeout=max(0.0, deadline - time.monotonic()))
        except Empty:
            self._unanswered += 1
            raise StoreTimeout("the gateway to Ray did not answer before the deadline") from None
        finally:
            with self._lock:
                self._waiting.pop(number, None)
            # What came between the deadline and now.
            with contextlib.suppress(Empty):
                late = box.get_nowait()
                close_all(late.files if isinstance(late, Answer) else ())
        if isinstance(answer, StoreError):
            raise answer
        return answer

    def tell(self, request: Request, files: Sequence[int]) -> None:
        """Send what has no answer; ``StoreError`` if it cannot be sent."""
        self._send(Kind.REQUEST, 0, request, files)

    def close(self) -> None:
        """End the gateway at once."""
        self._end("the connection to the gateway is closed")
        self._channel.close()
        self._process.kill()
        self._process.wait()

    def _send(self, kind: Kind, number: int, request: Request, files: Sequence[int] = ()) -> None:
        try:
            self._channel.send(frame(kind, number, request_body(request), len(files)), files)
        except ValueError as error:
            raise StoreError(str(error)) from error
        except OSError as error:
            raise StoreError(f"the gateway to Ray cannot be reached: {error}") from error

    def _receive(self) -> None:
        try:
            while True:
                head, body, files = self._channel.receive()
                self.heard_at = time.monotonic()
                self._unanswered = 0
                wanted = False
                try:
                    wanted = self._hear(head, Answer(unpack(body), files))
                finally:
                    if not wanted:
                        close_all(files)
        except EOFError:
            self._end("the gateway to Ray has ended; another one is being started")
        except ValueError as error:
            self._end(f"the gateway to Ray must send well-formed frames: {error}")

    def _hear(self, head: Head, said: Answer) -> bool:
        """Pass on what the gateway said; True if somebody now has the files."""
        if head.kind is Kind.NEWS:
            self.news = parse_news(said.body)
            return False
        fault = head.kind is Kind.FAULT
        answer = _fault(*parse_fault(said.body)) if fault else said
        with self._lock:
            box = self._waiting.pop(head.number, None)
            if box is not None:
                box.put(answer)
        return box is not None and not fault

    def _end(self, reason: str) -> None:
        with self._lock:
            self._over = self._over or reason
            waiting, self._waiting = self._waiting, {}
            for box in waiting.values():
                box.put(StoreError(self._over))


def _fault(name: str, message: str) -> StoreError:
    kind = getattr(errors, name, StoreError)
    if isinstance(kind, type) and issubclass(kind, StoreError):
        return kind(message)
    return StoreError(message)
