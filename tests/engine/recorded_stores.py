# SPDX-License-Identifier: Apache-2.0
"""Stores recorded from the small model of ``attention_samples``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention_samples import Shape, make_config, make_model, run_model, text, whole

from attncache_vllm.engine.record import RecorderExtension
from attncache_vllm.engine.startup import attach
from attncache_vllm.reuse.codecs import decode_blocks
from attncache_vllm.reuse.feature import Projector
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.plan import Plan, SourcePlan
from attncache_vllm.reuse.template import Templates
from attncache_vllm.store import LocalStore

SLOTS = 4
TEXTS = [text(seed, length) for seed, length in enumerate((20, 33, 70))]
OTHER = text(9, 33)
# Token ids of the texts; no text has one of another.
IDS = [np.arange(1000 * i, 1000 * i + len(rows), dtype=np.int32) for i, rows in enumerate(TEXTS)]
LAYOUT = MapLayout(Shape.heads, Shape.kv_heads, Mask())
PLAN = Plan.reusing(3, 2, (1, 2), max_distance=1e-3)
RECORD = {"layers": [1, 2], "slots": SLOTS}


def settings(store: Path | str, **changes: Any) -> dict[str, Any]:
    return {"store": str(store), "lookup_deadline_ms": 60_000.0, "min_tokens": 4, **changes}


def recorded(path: Path) -> Path:
    """A store of the maps of ``TEXTS`` in layers 1 and 2, not published yet."""
    model = make_model()
    attach(model, make_config(settings(path, record=RECORD)))
    worker = RecorderExtension()
    for number, rows in enumerate(TEXTS):
        run_model(model, [whole(rows)])
        worker.attncache_commit(IDS[number].tolist())
    worker.attncache_close()
    return path


def publish(
    path: Path,
    plan: Plan = PLAN,
    hidden_size: int = 48,
    artifacts: Mapping[str, bytes] | None = None,
) -> Path:
    torch.manual_seed(1)
    projector = Projector(hidden_size, SLOTS, width=32, dim=8)
    with LocalStore.open(path, writable=True) as store, torch.no_grad():
        pooled = torch.stack([torch.tensor(found.pooled) for _, found in store.records()])
        features = torch.zeros(len(pooled), 8) if hidden_size != 48 else projector(pooled)
        store.publish(
            plan.to_dict(),
            projector.to_bytes(),
            {},
            features.numpy(),
            artifacts=dict(artifacts or {}),
        )
    return path


WHOLE: tuple[tuple[int, ...], ...] = ((), (0, 1), (0, 1))


def own_templates(path: Path, number: int) -> Templates:
    """Of layers 1 and 2, the maps of a recorded text."""
    with LocalStore.open(path, writable=True) as store:
        record = dict(store.records())[number]
    return Templates(
        {
            layer: {
                record.length: decode_blocks(
                    record.codec, torch.tensor(encoded), LAYOUT, record.length
                )
            }
            for layer, encoded in record.maps.items()
        }
    )


def plan_of(**parts: SourcePlan) -> Plan:
    return Plan(0, 3, parts)  # type: ignore[arg-type]


def with_templates(path: Path, plan: Plan | None = None, **artifacts: bytes) -> Path:
    """A store that serves from the maps of the last text as from templates."""
    recorded(path)
    templates = own_templates(path, 2).to_bytes()
    plan = plan or plan_of(template=SourcePlan(WHOLE))
    return publish(path, plan, artifacts={"templates": templates, **artifacts})
