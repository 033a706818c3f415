# SPDX-License-Identifier: Apache-2.0
"""Processes that tests start: each in its own process group, killed with it, its output kept."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 300.0
EXIT_SECONDS = 300.0
STOP_SECONDS = 20.0
GRACE_SECONDS = 3.0

LIVE_LOGS: dict[str, Path] = {}
"""Logs of the processes that run now, by title; a failing test shows their ends."""


def tail(log: Path, lines: int = 60) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def end_group(leader: int, grace: float = GRACE_SECONDS) -> None:
    """Kill what is left of the process group of ``leader``, and remove its shared memory.

    Within ``grace`` seconds the group may end by itself: Python's resource tracker belongs to it.
    """
    shared = _shared_memory(leader)
    deadline = time.monotonic() + grace
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(leader, 0)
            time.sleep(0.05)
        os.killpg(leader, signal.SIGKILL)
    for path in shared:
        path.unlink(missing_ok=True)


def _shared_memory(group: int) -> set[Path]:
    """Files of shared memory that processes of a group have mapped."""
    found: set[Path] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # the process has ended
            if os.getpgid(int(maps.parent.name)) == group:
                found |= {Path(name) for name in re.findall(r"/dev/shm/\S+", maps.read_text())}
    return found


@contextmanager
def shown_on_failure(log: Path) -> Iterator[None]:
    """Let tests that fail during the block show the end of ``log``."""
    title = f"{log.stem} ({log})"
    LIVE_LOGS[title] = log
    try:
        yield
    finally:
        del LIVE_LOGS[title]


@contextmanager
def started(
    command: list[str], log: Path, *, stdout: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``command`` while the block lasts; then interrupt it, and kill its whole group.

    Standard output goes to ``stdout`` if it is given, everything else to ``log``.
    """
    with log.open("wb") as errors, (stdout or log).open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors if stdout else output,
            start_new_session=True,
        )
    try:
        with shown_on_failure(log):
            yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        end_group(process.pid)
        process.wait()


@dataclass(frozen=True)
class Exit:
    """How a finished command ended."""

    code: int
    stdout: str
    log: str


def run(command: list[str], folder: Path, seconds: float = EXIT_SECONDS) -> Exit:
    """Run a command to its end; ``folder`` takes its output."""
    stdout, log = folder / "stdout", folder / f"{Path(command[0]).name}.log"
    stdout.unlink(missing_ok=True)
    with started(command, log, stdout=stdout) as process:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{command} must end in {seconds} s:\n{tail(log)}") from None
    return Exit(code, stdout.read_text(), log.read_text(errors="replace"))


def script(name: str) -> str:
    """A console script of the environment that the tests run in."""
    return str(Path(sys.executable).with_name(name))
