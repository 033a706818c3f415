# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` as the demo and the integration tests call it: offline, mean-pooled embeddings."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from attncache_vllm.evaluate import server
from attncache_vllm.evaluate.server import MODEL_NAME, Server, group

__all__ = ["MODEL_NAME", "Server", "group", "serve"]

# Mean-pooled embeddings, whatever the model.
MEAN_EMBEDDINGS = ("--convert", "embed", "--pooler-config", '{"seq_pooling_type": "MEAN"}')


@contextmanager
def serve(
    model: Path,
    arguments: Sequence[str],
    log: Path,
    *,
    task: Sequence[str] = MEAN_EMBEDDINGS,
    timeout: float = 300.0,
    cores: Sequence[int] = (),
) -> Iterator[Server]:
    """As :func:`attncache_vllm.evaluate.server.serve`.

    ``task`` are the options that choose what is answered; none is the model's own task.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    with server.serve(model, [*task, *arguments], log, timeout=timeout, cores=cores) as running:
        yield running
