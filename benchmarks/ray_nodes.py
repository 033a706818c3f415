# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster of this machine's own, out of reach of any other: nodes, and the commands on it.

For the demo, the soak and the integration tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

START_SECONDS = 120.0
COMMAND_SECONDS = 180.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(condition: Callable[[], bool], seconds: float = 60.0, pause: float = 0.1) -> float:
    """Wait until ``condition`` holds, asked every ``pause`` seconds; how many seconds that took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "it did not happen in time"
        time.sleep(pause)
    return time.monotonic() - started


class RayNodes:
    """Nodes of a cluster that asks for a token, each a group of processes, and a store on it.

    ``folder`` is for tokens, settings, logs and entries.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.client_port = free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        # Ray's sockets lie in it, and their paths must be short.
        self.temp = Path(tempfile.mkdtemp(prefix="ray-"))
        token = folder / "token"
        token.write_text("a token of these nodes, long enough for Ray\n")
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.nodes: list[subprocess.Popen[bytes]] = []

    def start(self, cpus: int = 2) -> None:
        """Start a node: the first is the head. To Ray each is a machine, by its address."""
        where = (
            ["--address", self.address, "--node-ip-address", f"127.0.0.{len(self.nodes) + 1}"]
            if self.nodes
            else [
                *("--head", "--node-ip-address", "127.0.0.1", "--port", str(self.port)),
                *("--include-dashboard", "false", "--temp-dir", str(self.temp)),
                *("--ray-client-server-port", str(self.client_port)),
            ]
        )
        command = [
            *(_script("ray"), "start", "--block", "--disable-usage-stats"),
            *("--num-cpus", str(cpus), "--object-store-memory", str(150 << 20)),
            *where,
        ]
        log = self.folder / f"node-{len(self.nodes)}.log"
        with log.open("ab") as output:
            begun = output.tell()
            self.nodes.append(
                subprocess.Popen(
                    command,
                    env=os.environ | self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            )
        eventually(lambda: b"Ray runtime started" in log.read_bytes()[begun:], START_SECONDS)

    def lose(self) -> None:
        """End the youngest node as if its machine were gone; the next one has its address."""
        node = self.nodes.pop()
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()

    def stop(self) -> None:
        """End all nodes, the youngest first."""
        for node in reversed(self.nodes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGTERM)
        for node in reversed(self.nodes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(3)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()
        self.nodes.clear()

    def settings(self, **changes: Any) -> Path:
        """A file of settings for a store on this cluster."""
        values = {
            "address": self.address,
            "shards": 2,
            "folder": str(self.folder / "shards"),
            "shard_mib": 64,
            "num_cpus": 0.5,
        }
        path = self.folder / "cluster.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        return path

    def store(self, command: str, *arguments: object) -> str:
        """Run ``attncache store COMMAND``; its standard output."""
        ran = subprocess.run(
            [sys.executable, "-m", "attncache_vllm", "store", command, *map(str, arguments)],
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            self.store("status", "--address", self.address, "--json")
        )
        return found

    def pids(self) -> dict[int, int]:
        """The process of each shard."""
        return {shard["shard"]: shard["pid"] for shard in self.status()["shards"]}


@contextlib.contextmanager
def ray_nodes(folder: Path, nodes: int) -> Iterator[RayNodes]:
    """A cluster of so many nodes while the block lasts."""
    cluster = RayNodes(folder)
    try:
        for _ in range(nodes):
            cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(cluster.temp, ignore_errors=True)


def _script(name: str) -> str:
    return shutil.which(name, path=sysconfig.get_path("scripts")) or name
