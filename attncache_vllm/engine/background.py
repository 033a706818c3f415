# SPDX-License-Identifier: Apache-2.0
"""Threads that work beside the forward pass."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor

import torch

from attncache_vllm.engine import compat


def thread_beside_forward(name: str, *, idle: bool = False) -> ThreadPoolExecutor:
    """One thread, without helpers, off the core that vLLM pins the worker to; if ``idle`` it gets
    what time nobody else wants."""
    pool = ThreadPoolExecutor(
        1, thread_name_prefix=name, initializer=_stand_aside, initargs=(idle,)
    )
    _keep_to_one_thread(pool)
    return pool


def _stand_aside(idle: bool) -> None:
    _leave_compute_core()
    if idle and hasattr(os, "SCHED_IDLE"):  # Linux
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _leave_compute_core() -> None:
    """Let the calling thread run on any core that the worker's parent may use.

    vLLM pins a CPU worker's threads to cores, and a new thread inherits the pin: left there, the
    thread would run on the forward's own core, in turn with it instead of beside it.
    """
    if hasattr(os, "sched_setaffinity"):  # not on macOS
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))


def _keep_to_one_thread(pool: ThreadPoolExecutor) -> None:
    """Have torch start no helpers of the pool's thread.

    They would be as many again as those that compute the model, on the same cores, and each spins
    for milliseconds after its work is done.
    """
    threads = pool.submit(torch.get_num_threads).result()
    pool.submit(compat.set_num_threads, 1).result()
    # What a thread sets is its own number, and that of threads to come.
    with ThreadPoolExecutor(1) as another:
        another.submit(compat.set_num_threads, threads).result()
