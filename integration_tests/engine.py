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


# In an environment with this, vLLM's engine lives in the process of ``vllm.LLM``: it starts in a
# few seconds once that process has loaded vLLM.
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


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

    def replace(self, **options: Any) -> None:
        """End the engine and start another in the same process."""
        self._call("start", options)

    def end(self) -> None:
        """End the engine; the process waits for another."""
        self._call("close")

    def build(
        self, texts: Sequence[str] | Sequence[tuple[str, str]], **options: Any
    ) -> dict[str, Any]:
        """End the engine and build a store of texts or pairs; ``options`` are those of
        ``BuildOptions``."""
        report: dict[str, Any] = self._call("build", list(texts), options)
        return report

    def calibrate(self, texts: Sequence[str], **options: Any) -> dict[str, Any]:
        """End the engine and calibrate a store; ``options`` are those of ``CalibrateOptions``."""
        report: dict[str, Any] = self._call("calibrate", list(texts), options)
        return report

    def embed(
        self, prompts: Sequence[Prompt], salts: Sequence[str | None] | None = None
    ) -> NDArray[np.float32]:
        """Embeddings ``[B, D]`` of prompts that are sent together, each with its ``cache_salt``."""
        salts = [None] * len(prompts) if salts is None else salts
        embeddings: NDArray[np.float32] = self._call("embed", list(prompts), list(salts))
        return embeddings

    def embed_alone(self, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
        """Embeddings ``[B, D]`` of prompts that are sent one after the other."""
        return np.concatenate([self.embed([prompt]) for prompt in prompts])

    def encode(self, prompts: Sequence[Prompt]) -> list[NDArray[np.float32]]:
        """What the model's own pooling task gives for each prompt, sent one after the other:
        probabilities ``[labels]``, embeddings ``[D]`` or ``[tokens, D]``."""
        encoded: list[NDArray[np.float32]] = self._call("encode", list(prompts))
        return encoded

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Scores of pairs by a cross-encoder, sent one after the other."""
        scores: list[float] = self._call("score", list(pairs))
        return scores

    def tokenize(self, texts: Sequence[str], max_tokens: int) -> list[TokenIds]:
        """Token ids as a build takes them."""
        tokenized: list[TokenIds] = self._call("tokenize", list(texts), max_tokens)
        return tokenized

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


class Counted:
    """Differences of the worker's counters since the last call."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._before = engine.probe("probe_counters")

    def since(self) -> dict[str, int]:
        now = self._engine.probe("probe_counters")
        before, self._before = self._before, now
        return {name: int(value - before.get(name, 0)) for name, value in now.items()}


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
        self._llm: Any = None
        self.start(options)

    def start(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        self.close()
        self._llm = LLM(**options)

    def build(
        self, texts: list[str] | list[tuple[str, str]], options: dict[str, Any]
    ) -> dict[str, Any]:
        from attncache_vllm.calibrate.build import BuildOptions, build
        from attncache_vllm.calibrate.corpus import Text

        self.close()
        corpus = [Text(text) if isinstance(text, str) else Text(*text) for text in texts]
        return build(BuildOptions(**options), corpus)

    def calibrate(self, texts: list[str], options: dict[str, Any]) -> dict[str, Any]:
        from attncache_vllm.calibrate.calibrate import CalibrateOptions, calibrate
        from attncache_vllm.calibrate.corpus import Text

        self.close()
        return calibrate(CalibrateOptions(**options), [Text(text) for text in texts])

    def embed(self, prompts: list[Prompt], salts: list[str | None]) -> NDArray[np.float32]:
        given = [_vllm_prompt(p, salt) for p, salt in zip(prompts, salts, strict=True)]
        outputs = self._llm.embed(given, use_tqdm=False)
        return np.array([output.outputs.embedding for output in outputs], dtype=np.float32)

    def encode(self, prompts: list[Prompt]) -> list[NDArray[np.float32]]:
        task = self._llm.pooling_task
        outputs = [
            self._llm.encode([_vllm_prompt(p)], pooling_task=task, use_tqdm=False)[0]
            for p in prompts
        ]
        return [output.outputs.data.float().numpy() for output in outputs]

    def score(self, pairs: list[tuple[str, str]]) -> list[float]:
        outputs = [self._llm.score(a, b, use_tqdm=False)[0] for a, b in pairs]
        return [output.outputs.score for output in outputs]

    def tokenize(self, texts: list[str], max_tokens: int) -> list[TokenIds]:
        tokenizer = self._llm.get_tokenizer()
        return [
            tuple(tokenizer(text, truncation=True, max_length=max_tokens).input_ids)
            for text in texts
        ]

    def generate(self, prompts: list[Prompt], max_tokens: int) -> list[TokenIds]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        outputs = self._llm.generate([_vllm_prompt(p) for p in prompts], sampling, use_tqdm=False)
        return [tuple(output.outputs[0].token_ids) for output in outputs]

    def probe(self, method: str) -> Any:
        return self._llm.collective_rpc(method)[0]

    def close(self) -> None:
        if self._llm is not None:
            # Without the seconds that vLLM gives its workers to end: nothing is under way.
            self._llm.llm_engine.engine_core.shutdown(timeout=0)
            self._llm = None


def _vllm_prompt(prompt: Prompt, salt: str | None = None) -> Any:
    made: dict[str, Any] = {"cache_salt": salt} if salt is not None else {}
    if isinstance(prompt, str):
        return {"prompt": prompt, **made}
    return {"prompt_token_ids": list(prompt), **made}
