# SPDX-License-Identifier: Apache-2.0
"""Calibration of nearest entries, AttnCache's own source (arXiv 2510.25979): which whole layers
they may serve, and up to which distance.

Every text is served from the entry that a server would take, and the damage is told by bands of its
distance. As all bands see the same candidates, the gate costs no further runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attncache_vllm.calibrate.aligned import MAX_BYTES, decoded
from attncache_vllm.calibrate.budget import Budget
from attncache_vllm.calibrate.choose import (
    Candidate,
    Chosen,
    Groups,
    best_first,
    candidates,
    error_bands,
    every_layer,
    measure_curve,
    points,
    table,
)
from attncache_vllm.calibrate.corpus import how_many
from attncache_vllm.calibrate.edits import Tokens
from attncache_vllm.calibrate.fidelity import Fidelity, compare
from attncache_vllm.calibrate.hits import hits_by_text
from attncache_vllm.calibrate.measure import Measured
from attncache_vllm.calibrate.model import CalibratedModel
from attncache_vllm.calibrate.progress import progress
from attncache_vllm.calibrate.pruning import PRUNED_TEXTS, Shares, choose_shares, every_share
from attncache_vllm.calibrate.saving import SavingModel, by_damage_per_saving
from attncache_vllm.calibrate.trials import Trials
from attncache_vllm.engine.calibrate import HitOf
from attncache_vllm.engine.step import Served
from attncache_vllm.reuse.feature import Projector
from attncache_vllm.reuse.maps import RowBlocks
from attncache_vllm.reuse.match import Match, nearest
from attncache_vllm.reuse.plan import SourcePlan
from attncache_vllm.store.local import LocalStore
from attncache_vllm.store.records import MAX_LENGTH
from attncache_vllm.tenants import SHARED_TENANT

# Bands of about equally many texts.
BANDS = 4
FEWEST_IN_BAND = 4
# Fewer texts within a gate say nothing about ranks.
MIN_TEXTS = 8
# Tokens of the texts that the damage of every single layer is measured on.
PROBE_TOKENS = 8192


@dataclass(frozen=True, eq=False)
class Near:
    """Texts in the order of the distances to their nearest entries, and those entries' maps."""

    texts: list[Tokens]
    distances: list[float]
    maps: list[Mapping[int, RowBlocks]]

    def part(self, start: int, stop: int) -> Near:
        """Some of the texts, by their place in the order."""
        span = slice(start, stop)
        return Near(self.texts[span], self.distances[span], self.maps[span])

    def spread(self, size: int) -> Near:
        """About ``size`` texts, near and far ones alike."""
        step = max(1, len(self.texts) // size)
        return Near(self.texts[::step], self.distances[::step], self.maps[::step])

    def within(self, gate: float) -> Near:
        """The texts whose entries are no farther than ``gate``."""
        return self.part(0, sum(distance <= gate for distance in self.distances))

    def hits(self, groups: Groups) -> HitOf:
        """Serve the layers of ``groups``."""
        served = [
            {layer: Served("neighbour", maps[layer]) for layer in groups} for maps in self.maps
        ]
        return hits_by_text("neighbour", self.texts, served)


class NeighbourChooser:
    """Finds the layers and the distance at which nearest entries may serve."""

    def __init__(
        self,
        model: CalibratedModel,
        store: Path,
        choose: Sequence[Tokens],
        check: Sequence[Tokens],
        trials: Trials,
        saving: SavingModel,
    ) -> None:
        self._model = model
        self._trials = trials
        self._saving = saving
        whole = near(store, model, choose, {})
        self._dropped: Shares = {}
        if len(whole.texts) >= MIN_TEXTS:
            few = whole.spread(PRUNED_TEXTS).texts[:PRUNED_TEXTS]
            self._dropped = choose_shares(partial(self._errors_at, store, few))
        self._choose = near(store, model, choose, self._dropped) if self._dropped else whole
        self._check = near(store, model, check, self._dropped)

    def choose(self, budget: Budget) -> tuple[Chosen | None, list[dict[str, Any]]]:
        """The plan with the largest saving over all texts inside ``budget``, None if there is
        none; and the bands: bounds of the distance, texts, and damage by layer."""
        if len(self._choose.texts) < MIN_TEXTS:
            return None, []
        budget = budget.without_task()
        damages, bands = self._damages()
        parcels = by_damage_per_saving(damages, self._saving, whole_layers=True)
        sets_of = partial(candidates, parcels, self._saving)
        tried: list[tuple[float, Near, list[tuple[Candidate, Fidelity]]]] = []
        with progress() as bar:
            gates = self._gates()
            for near_ in bar.track(gates, description="measuring sets by distance"):
                measured = Measured(self._model, near_.texts)
                curve = measure_curve(sets_of, budget, partial(self._fidelity, near_, measured))
                tried += [
                    (candidate.saving * len(near_.texts), near_, curve)
                    for candidate in best_first(curve, budget)[:1]
                ]
        for _, near_, curve in sorted(tried, key=lambda item: -item[0]):
            candidate, gate = best_first(curve, budget)[0], near_.distances[-1]
            checked = self._check.within(gate)
            if len(checked.texts) < MIN_TEXTS:
                continue
            measured = Measured(self._model, checked.texts)
            with self._model.calibrator.serving(checked.hits(candidate.groups)):
                surely, report = measured.checked(measured.answers())
            if not budget.holds(surely):
                continue
            groups = every_layer(candidate.groups, self._saving.num_layers)
            plan = SourcePlan(
                groups,
                gate,
                errors=self._errors(candidate, near_),
                dropped=every_share(self._dropped, candidate.groups, self._saving.num_layers),
            )
            figures = {
                **report,
                **candidate.shares,
                "gate": round(gate, 4),
                "served_share": round(len(near_.texts) / len(self._choose.texts), 4),
            }
            sensitivity = table(damages, self._saving.num_layers)
            return Chosen(plan, sensitivity, points(curve), figures), bands
        return None, bands

    def _gates(self) -> list[Near]:
        """The texts up to the end of each band, the widest first."""
        total = len(self._choose.texts)
        sizes = {total * band // BANDS for band in range(1, BANDS + 1)}
        return [
            self._choose.part(0, size) for size in sorted(sizes, reverse=True) if size >= MIN_TEXTS
        ]

    def _damages(self) -> tuple[dict[tuple[int, int], float], list[dict[str, Any]]]:
        """By layer and KV group over all texts, and the bands."""
        probe = self._choose.spread(how_many(self._choose.texts, PROBE_TOKENS))
        count = min(BANDS, len(probe.texts) // FEWEST_IN_BAND)
        edges = [len(probe.texts) * band // count for band in range(count + 1)]
        parts = [probe.part(start, stop) for start, stop in pairwise(edges)]
        exact = [self._model.run(part.texts) for part in parts]
        bands: list[dict[str, Any]] = [
            {
                "distance": [round(part.distances[0], 4), round(part.distances[-1], 4)],
                "texts": len(part.texts),
                "damage": [0.0] * self._saving.num_layers,
            }
            for part in parts
        ]
        damages: dict[tuple[int, int], float] = {}
        with progress() as bar:
            layers = sorted(probe.maps[0])
            for layer in bar.track(layers, description="damage of each layer, nearest entry"):
                groups = probe.maps[0][layer].groups
                for number, part in enumerate(parts):
                    fidelity = self._trials.get(
                        f"neighbour layer {layer} band {number}",
                        partial(self._alone, {layer: groups}, part, exact[number]),
                    )
                    damage = 1 - fidelity.centred_cosine
                    bands[number]["damage"][layer] = round(damage, 6)
                    for group in groups:
                        share = len(part.texts) / len(probe.texts) / len(groups)
                        damages[layer, group] = damages.get((layer, group), 0.0) + damage * share
        return damages, bands

    def _alone(self, groups: Groups, texts: Near, exact: Tensor) -> Fidelity:
        with self._model.calibrator.serving(texts.hits(groups)):
            return compare(exact, self._model.run(texts.texts))

    def _fidelity(self, texts: Near, measured: Measured, candidate: Candidate) -> Fidelity:
        def run() -> Fidelity:
            with self._model.calibrator.serving(texts.hits(candidate.groups)):
                return measured.fidelity(measured.answers())

        return self._trials.get(f"neighbour {len(texts.texts)} texts {candidate.groups}", run)

    def _errors_at(
        self, store: Path, texts: Sequence[Tokens], share: float
    ) -> dict[int, list[float]]:
        """By layer the errors of some texts when maps lose ``share``."""
        dropped = dict.fromkeys(self._model.calibrator.layouts, share)
        found = near(store, self._model, texts, dropped)
        every = {layer: blocks.groups for layer, blocks in found.maps[0].items()}
        with self._model.calibrator.comparing(found.hits(every)) as errors:
            self._model.run(found.texts)
        return errors

    def _errors(self, candidate: Candidate, texts: Near) -> tuple[tuple[float, float], ...]:
        with self._model.calibrator.comparing(texts.hits(candidate.groups)) as errors:
            self._model.run(texts.texts)
        return error_bands(errors, self._saving.num_layers)


def near(store: Path, model: CalibratedModel, texts: Sequence[Tokens], dropped: Shares) -> Near:
    """The nearest entries of texts, of those that have one, nearest first, as far as memory for
    their maps, less what these may lose, allows."""
    layouts = model.calibrator.layouts
    causal = all(layout.mask.causal for layout in layouts.values())
    entries: dict[int, Mapping[int, RowBlocks]] = {}
    found: list[tuple[float, Tokens, Mapping[int, RowBlocks]]] = []
    held = 0
    with LocalStore.open(store) as opened:
        for tokens, match in zip(texts, _matches(opened, model, texts, causal), strict=True):
            if match is not None and match.entry_id not in entries and held <= MAX_BYTES:
                (record,) = opened.load([match.entry_id], deadline=math.inf)
                if record is not None:
                    maps = decoded(record, layouts, dropped)
                    entries[match.entry_id] = maps
                    held += sum(blocks.nbytes for blocks in maps.values())
            if match is not None and match.entry_id in entries:
                found.append((match.distance, tokens, entries[match.entry_id]))
    found.sort(key=lambda item: item[0])
    return Near(
        [tokens for _, tokens, _ in found],
        [distance for distance, _, _ in found],
        [maps for _, _, maps in found],
    )


def _matches(
    store: LocalStore, model: CalibratedModel, texts: Sequence[Tokens], causal: bool
) -> list[Match | None]:
    projector = Projector.from_bytes(store.projector_bytes)
    with model.calibrator.pooling(projector.slots) as pooled:
        model.run(texts)
    given = torch.stack([pooled[tokens.tobytes()] for tokens in texts])
    with torch.inference_mode():
        features = np.ascontiguousarray(projector(given).numpy(), dtype=np.float32)
    usable = [(len(tokens), MAX_LENGTH if causal else len(tokens)) for tokens in texts]
    rows = store.lookup(
        features,
        usable,
        tenants=[SHARED_TENANT] * len(texts),
        neighbours=1,
        deadline=math.inf,
    )
    return [
        nearest(row, len(tokens), math.inf, longer=causal)
        for row, tokens in zip(rows, texts, strict=True)
    ]
