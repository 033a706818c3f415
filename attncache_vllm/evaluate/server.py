# SPDX-License-Identifier: Apache-2.0
"""A real ``vllm serve`` as a context manager: started, awaited, and never left behind.

The clients, ``openai`` and ``httpx``, are dependencies of vLLM.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from attncache_vllm.errors import AttnCacheError

MODEL_NAME = "served"


class ServerError(AttnCacheError):
    """The server did not come up; the message ends with its log."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def pause(self) -> None:
        """Stop all its processes until :meth:`resume`.

        A vLLM worker polls for a second after its last request, on the core it is pinned to. Of
        two live servers the one that is asked must not share that core with the other's polling.
        """
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def samples(self, name: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each sample of a Prometheus metric; [] if it has none."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        return [
            (sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        ]

    def counters(self, name: str, label: str) -> dict[str, float]:
        """A Prometheus counter's values by one of its labels."""
        return {
            labels[label]: value
            for labels, value in self.samples(f"{name}_total")
            if label in labels
        }


@contextmanager
def serve(
    model: str | Path,
    arguments: Sequence[str],
    log: Path,
    *,
    timeout: float = 600.0,
    cores: Sequence[int] = (),
) -> Iterator[Server]:
    """Start ``vllm serve``, yield when healthy, end its whole group.

    Args:
        model: folder or hub name of the model.
        arguments: options of ``vllm serve``; the runner is ``pooling``, the task the model's own
            unless they say otherwise.
        log: file for what it prints.
        timeout: seconds until it must be healthy.
        cores: those that the model computes on; none is vLLM's own choice, which is the same for
            every server of a machine.

    Raises:
        ServerError: it exited, or was not healthy within ``timeout`` seconds.
    """
    port = _free_port()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
        *("--runner", "pooling"),
        *("--served-model-name", MODEL_NAME, "--host", "127.0.0.1", "--port", str(port)),
        *arguments,
    ]
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as metrics,
        log.open("w") as output,
        group(command, stdout=output, stderr=output, env=_environment(metrics, cores)) as process,
    ):
        server = Server(f"http://127.0.0.1:{port}", log, process)
        _await_health(server, process, timeout)
        yield server


@contextmanager
def group(command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, ended with all its children, whatever happens: vLLM's
    engines and workers do not always outlive their parent politely."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield process
    finally:
        _end(process)


def _environment(metrics: str, cores: Sequence[int]) -> Mapping[str, str]:
    bound = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))} if cores else {}
    return {
        # GiB of KV cache on a CPU, where vLLM takes half the memory; prefill-only needs little.
        "VLLM_CPU_KVCACHE_SPACE": "1",
        **os.environ,
        # Counters live in the worker; this folder carries them to the process behind /metrics.
        "PROMETHEUS_MULTIPROC_DIR": metrics,
        **bound,
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _await_health(server: Server, process: subprocess.Popen[Any], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"vllm serve exited with {process.returncode}:\n{_tail(server.log)}")
        with suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise ServerError(f"vllm serve was not healthy after {timeout:.0f} s:\n{_tail(server.log)}")


def _tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _end(process: subprocess.Popen[Any]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGCONT)
        process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=15)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
