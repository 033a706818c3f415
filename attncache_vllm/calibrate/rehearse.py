# SPDX-License-Identifier: Apache-2.0
"""Rehearsal of a plan: what it keeps of texts that took part in no choice, each served by what a
server's own lookup finds for it.

Of the sets that pass a check the largest is taken, so the check flatters it. And a plan is checked
source by source, where a server takes whichever fits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from attncache_vllm.calibrate.corpus import how_many
from attncache_vllm.calibrate.edits import Tokens, edit
from attncache_vllm.calibrate.measure import Measured
from attncache_vllm.calibrate.model import CalibratedModel
from attncache_vllm.engine.lookups import Lookups
from attncache_vllm.engine.step import Hit, template_hit
from attncache_vllm.engine.step import Sequence as Row
from attncache_vllm.reuse.codecs import servable
from attncache_vllm.reuse.feature import Projector
from attncache_vllm.reuse.plan import Plan
from attncache_vllm.reuse.template import Templates
from attncache_vllm.store.local import LocalStore
from attncache_vllm.tenants import SHARED_TENANT

# Bounds of the edited copies.
FEWEST = 8
MAX_TEXTS = 256
MAX_TOKENS = 16_384
RESIDENT_BYTES = 2**30


class Rehearsal:
    """Serves texts under a plan that is not published yet."""

    def __init__(
        self, model: CalibratedModel, store: LocalStore, plan: Plan, templates: Templates
    ) -> None:
        self._model = model
        self._templates = templates
        self._projector = Projector.from_bytes(store.projector_bytes)
        layouts = model.calibrator.layouts
        config, namespace = model.config, store.manifest.namespace
        cpu = torch.device("cpu")
        self._lookups: Lookups | None = None
        if set(plan.sources) - {"template"}:
            self._lookups = Lookups(
                store,
                self._projector,
                plan,
                RESIDENT_BYTES,
                layouts,
                namespace.num_layers * namespace.num_kv_heads,
                cpu,
                partial(servable, device=cpu, dtype=config.dtype, head_size=config.get_head_size()),
            )

    def figures(self, texts: Sequence[Tokens]) -> dict[str, Any]:
        """What is kept of ``texts``, with 95 % intervals, and how many each source served."""
        with self._model.calibrator.pooling(self._projector.slots) as pooled:
            measured = Measured(self._model, texts)
        hits: Counter[str] = Counter()

        def hit_of(row: Row) -> Hit | None:
            hit = self._found(row, pooled) or template_hit(self._templates, row.length)
            hits["none" if hit is None else hit.source] += 1
            return hit

        with self._model.calibrator.serving(hit_of):
            _, report = measured.checked(measured.answers())
        return {**report, "hits": dict(hits)}

    def _found(self, row: Row, pooled: Mapping[bytes, torch.Tensor]) -> Hit | None:
        if self._lookups is None:
            return None
        assert row.token_ids is not None
        features = pooled[row.token_ids.tobytes()][None] if self._lookups.uses_features else None
        running = self._lookups.start([replace(row, tenant=SHARED_TENANT)], features, math.inf)
        assert running is not None, "lookups of a rehearsal follow one another"
        return running.result()[0]


def edited_others(
    store: LocalStore,
    taken: Sequence[int],
    rate: float,
    vocabulary: Sequence[int],
    max_length: int,
    seed: int,
) -> dict[int, Tokens]:
    """Edited copies of entries, by their numbers, but of those that are ``taken``; none if few are
    left."""
    others = sorted(set(range(len(store.manifest.entries))) - set(taken))
    loaded = store.token_ids(others, deadline=math.inf)
    found = [(number, ids) for number, ids in zip(others, loaded, strict=True) if ids is not None]
    found = found[: min(MAX_TEXTS, how_many([ids for _, ids in found], MAX_TOKENS))]
    if len(found) < FEWEST:
        return {}
    return {
        number: edit(ids, rate, vocabulary, (seed, number))[:max_length] for number, ids in found
    }
