# SPDX-License-Identifier: Apache-2.0
"""``vllm.LLM`` in a process of its own: fresh environment, own log, nothing left behind.

The tests' process never imports vLLM, so that each engine loads plugins as its environment says
and not as an earlier test did.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from integration_tests.processes import LIVE_LOGS, START_SECONDS, STOP_SECONDS, end_group, tail

TokenIds = tuple[int, ...]
Prompt = str | TokenIds


class Engine:
    """A live engine; a context manager. ``options`` are the arguments of ``vllm.LLM``."""

    def __init__(self, log: Path, env: Mapping[str, str] | None = None, **options: Any) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._log = log
        # Not a daemon: those may not have children, and an engine has some.
        self._process = spawn.Process(target=_host, args=(theirs, log, dict(env or {}), options))
        self._process.start()
        theirs.close()
        LIVE_LOGS[log.stem] = log
        try:
            self._result(START_SECONDS)
        except BaseException:
            self.close()
            raise

    def embed(self, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        """Embeddings ``[B, D]`` of prompts that are sent together."""
        embeddings: NDArray[np.float32] = self._call("embed", list(prompts))
        return embeddings

    def embed_alone(self, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        """Embeddings ``[B, D]`` of prompts that are sent one after the other."""
        return np.concatenate([self.embed([prompt]) for prompt in prompts])

    def generate(self, prompts: Sequence[Prompt], max_tokens: int) -> list[TokenIds]:
        """Greedily generated token ids."""
        generated: list[TokenIds] = self._call("generate", list(prompts), max_tokens)
        return generated

    def probe(self, method: str) -> Any:
        """The answer of a method of :class:`integration_tests.probe.Probe` in the worker."""
        return self._call("probe", method)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def close(self) -> None:
        """Stop the engine and kill whatever is left of its process group."""
        with suppress(OSError):
            self._connection.send(None)
        self._process.join(STOP_SECONDS)
        assert self._process.pid is not None
        end_group(self._process.pid)
        self._process.join()
        self._connection.close()
        LIVE_LOGS.pop(self._log.stem, None)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _call(self, method: str, *arguments: Any) -> Any:
        self._connection.send((method, arguments))
        return self._result(START_SECONDS)

    def _result(self, seconds: float) -> Any:
        if not self._connection.poll(seconds):
            raise AssertionError(f"no answer in {seconds} s:\n{tail(self._log)}")
        try:
            error, result = self._connection.recv()
        except EOFError:
            raise AssertionError(f"the engine died:\n{tail(self._log)}") from None
        if error is not None:
            raise AssertionError(f"{error}\n{tail(self._log)}")
        return result


def _host(connection: Connection, log: Path, env: dict[str, str], options: dict[str, Any]) -> None:
    """Body of the engine's process: one call after the other, until None arrives."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted test run closes us in order
    os.environ.update(env)
    with log.open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    try:
        host = _Host(options)
        connection.send((None, None))
        with suppress(EOFError):  # the tests' process is gone
            while (call := connection.recv()) is not None:
                method, arguments = call
                connection.send((None, getattr(host, method)(*arguments)))
        host.close()
    except BaseException:
        connection.send((traceback.format_exc(), None))
        raise


class _Host:
    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        self._llm = LLM(**options)

    def embed(self, prompts: list[Prompt]) -> NDArray[np.float32]:
        outputs = self._llm.embed([_vllm_prompt(p) for p in prompts], use_tqdm=False)
        return np.array([output.outputs.embedding for output in outputs], dtype=np.float32)

    def generate(self, prompts: list[Prompt], max_tokens: int) -> list[TokenIds]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        outputs = self._llm.generate([_vllm_prompt(p) for p in prompts], sampling, use_tqdm=False)
        return [tuple(output.outputs[0].token_ids) for output in outputs]

    def probe(self, method: str) -> Any:
        return self._llm.collective_rpc(method)[0]

    def close(self) -> None:
        # Without the seconds that vLLM gives its workers to end: nothing is under way.
        self._llm.llm_engine.engine_core.shutdown(timeout=0)


def _vllm_prompt(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else {"prompt_token_ids": list(prompt)}
