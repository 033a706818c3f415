# SPDX-License-Identifier: Apache-2.0
"""Seam 10, and what of vLLM's public helpers the plugin uses."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

# --- Seam 10: the number of torch's threads ------------------------------------------------------
# Why:      a thread beside the forward must have no helpers on the model's cores, and vLLM's CPU
#           worker replaces torch.set_num_threads by a function that does nothing, because the
#           threads that compute the model are bound to cores.
# How:      the function that was replaced, from the module that torch takes it from.
# Upstream: vllm/v1/worker/cpu_worker.py, CPUWorker.init_device, skip_set_num_threads
# When:     when vLLM's guard spares threads that it did not bind.


def set_num_threads(count: int) -> None:
    """Of the calling thread, and of threads to come. Not for the one that computes the model."""
    torch._C.set_num_threads(count)


def get_logger(name: str) -> logging.Logger:
    """A logger under vLLM's own, so that its level and format apply in every process."""
    return logging.getLogger("vllm." + name)


@functools.cache
def warn_once(logger: logging.Logger, message: str, *args: str) -> None:
    """Warn the first time only."""
    logger.warning(message, *args)


def register_op(name: str, function: Any, fake: Any, mutates: list[str]) -> None:
    """Register ``torch.ops.vllm.<name>`` for the active platform's dispatch key."""
    from vllm.utils.torch_utils import direct_register_custom_op

    direct_register_custom_op(name, function, mutates_args=mutates, fake_impl=fake)
