# SPDX-License-Identifier: Apache-2.0
"""Calibration of aligned reuse: edited copies of the store's own texts, served from the originals.

The layers are chosen on edits of one rate; the gate is the novelty up to which they stay in the
budget on edits of several.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

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
from attncache_vllm.calibrate.edits import Tokens, edit
from attncache_vllm.calibrate.fidelity import Fidelity
from attncache_vllm.calibrate.hits import hits_by_text
from attncache_vllm.calibrate.measure import Measured
from attncache_vllm.calibrate.model import CalibratedModel
from attncache_vllm.calibrate.progress import progress
from attncache_vllm.calibrate.pruning import PRUNED_TEXTS, Shares, choose_shares, every_share
from attncache_vllm.calibrate.saving import SavingModel, by_damage_per_saving
from attncache_vllm.calibrate.trials import Trials
from attncache_vllm.engine.calibrate import HitOf
from attncache_vllm.engine.step import Served
from attncache_vllm.errors import SettingsError
from attncache_vllm.reuse.align import Alignment, align
from attncache_vllm.reuse.codecs import decode_blocks
from attncache_vllm.reuse.layout import MapLayout
from attncache_vllm.reuse.maps import RowBlocks
from attncache_vllm.reuse.match import AlignedGate
from attncache_vllm.reuse.plan import SourcePlan
from attncache_vllm.store.local import LocalStore
from attncache_vllm.store.protocol import Record

# Edited tokens of the copies that the layers are chosen on, and of those that set the gate.
CHOOSE_RATE = 0.05
GATE_RATES = (CHOOSE_RATE, 0.1, 0.2)
# Tokens of the texts that the damage of every single layer is measured on.
PROBE_TOKENS = 2048
# Bounds of the texts that are edited.
FEWEST = 8
MAX_TEXTS = 256
MAX_TOKENS = 20_480
# Bound of the maps held in memory at once.
MAX_BYTES = 4 * 2**30


@dataclass(frozen=True, eq=False)
class Original:
    """An entry of the store with its maps by layer."""

    entry_id: int
    tokens: Tokens
    maps: Mapping[int, RowBlocks]


@dataclass(frozen=True, eq=False)
class Copies:
    """Edited copies of some originals, and what serves them."""

    texts: list[Tokens]
    alignments: list[Alignment]
    maps: list[Mapping[int, RowBlocks]]

    @property
    def novelties(self) -> list[float]:
        causal = next(iter(self.maps[0].values())).layout.mask.causal
        return [alignment.novelty(causal) for alignment in self.alignments]

    def hits(self, groups: Groups) -> HitOf:
        """Serve the layers of ``groups``."""
        served = [
            {layer: Served("aligned", maps[layer], alignment) for layer in groups}
            for alignment, maps in zip(self.alignments, self.maps, strict=True)
        ]
        return hits_by_text("aligned", self.texts, served)


class AlignedChooser:
    """Finds the layers that aligned maps may serve."""

    def __init__(
        self,
        model: CalibratedModel,
        store: Path,
        seed: int,
        vocabulary: list[int],
        trials: Trials,
        saving: SavingModel,
    ) -> None:
        """``vocabulary`` are tokens that stand in for edited ones."""
        self._model = model
        self._seed = seed
        self._trials = trials
        self._saving = replace(saving, around=False)
        self._vocabulary = vocabulary
        self._originals = _originals(store, model, seed, {})
        self._dropped: Shares = {}
        if len(self._originals) >= FEWEST:
            self._dropped = choose_shares(partial(self._errors_at, store))
            self._originals = []  # before the others: they are large
            self._originals = _originals(store, model, seed, self._dropped)

    def choose(self, budget: Budget) -> dict[str, Chosen]:
        """Plans of the sources ``aligned`` and ``prefix``; none if the store has too few texts."""
        if len(self._originals) < FEWEST:
            return {}
        half = len(self._originals) // 2
        budget = budget.without_task()
        choose = self._copies(self._originals[:half], CHOOSE_RATE)
        check = self._originals[half:]
        measured = Measured(self._model, choose.texts)
        damages = self._damages(choose)
        parcels = by_damage_per_saving(damages, self._saving, whole_layers=True)

        sensitivity = table(damages, self._saving.num_layers)
        chosen: dict[str, Chosen] = {}
        with progress() as bar:
            measuring = bar.add_task("measuring sets, aligned", total=None)

            def measure(candidate: Candidate) -> Fidelity:
                bar.advance(measuring)
                return self._trials.get(
                    f"aligned {candidate.groups}",
                    partial(self._serve, candidate.groups, choose, measured),
                )

            curve = measure_curve(partial(candidates, parcels, self._saving), budget, measure)
            checking = bar.add_task("checking sets on other edits", total=None)
            for candidate in best_first(curve, budget):
                bar.advance(checking)
                found = self._gate(candidate, check, budget)
                if found is not None:
                    gate, figures = found
                    plan = SourcePlan(
                        every_layer(candidate.groups, self._saving.num_layers),
                        gate,
                        errors=self._errors(candidate, choose),
                        dropped=every_share(
                            self._dropped, candidate.groups, self._saving.num_layers
                        ),
                    )
                    chosen["aligned"] = Chosen(plan, sensitivity, points(curve), figures)
                    break
        chosen.update(self._prefix(chosen))
        return chosen

    def _prefix(self, chosen: Mapping[str, Chosen]) -> dict[str, Chosen]:
        """Everything else that is recorded, in causal models: exact, so nothing is measured."""
        served = chosen["aligned"].plan.layers if "aligned" in chosen else ()
        maps = self._originals[0].maps
        groups = {
            layer: blocks.groups
            for layer, blocks in maps.items()
            if layer not in served and blocks.layout.mask.causal
        }
        if not groups:
            return {}
        plan = SourcePlan(every_layer(groups, self._saving.num_layers))
        exact = {"rank_fidelity": 1.0, "self_retrieval": 1.0, "centred_cosine": 1.0}
        return {"prefix": Chosen(plan, [], [], exact)}

    def _damages(self, copies: Copies) -> dict[tuple[int, int], float]:
        size = max(2, how_many(copies.texts, PROBE_TOKENS))
        probe, damages = Measured(self._model, copies.texts[:size]), {}
        with progress() as bar:
            layers = sorted(copies.maps[0])
            for layer in bar.track(layers, description="damage of each layer, aligned"):
                groups = copies.maps[0][layer].groups
                fidelity = self._trials.get(
                    f"aligned layer {layer}", partial(self._serve, {layer: groups}, copies, probe)
                )
                for group in groups:
                    damages[layer, group] = (1 - fidelity.centred_cosine) / len(groups)
        return damages

    def _serve(self, groups: Groups, copies: Copies, measured: Measured) -> Fidelity:
        with self._model.calibrator.serving(copies.hits(groups)):
            return measured.fidelity(measured.answers())

    def _gate(
        self, candidate: Candidate, originals: Sequence[Original], budget: Budget
    ) -> tuple[float, dict[str, Any]] | None:
        """The novelty up to which texts that chose nothing stay in the budget, and what is kept
        there; None if copies edited as those that chose do not."""
        gate, rates = 0.0, []
        kept: dict[str, Any] = {}
        # What returning the originals' answers would keep, for comparison.
        stale = Measured(self._model, [original.tokens for original in originals]).exact
        for rate in GATE_RATES:
            copies = self._copies(originals, rate)
            measured = Measured(self._model, copies.texts)
            with self._model.calibrator.serving(copies.hits(candidate.groups)):
                surely, report = measured.checked(measured.answers())
            rates.append(
                {
                    "rate": rate,
                    "novelty": round(fmean(copies.novelties), 4),
                    "rank_fidelity": report["rank_fidelity"],
                    "self_retrieval": report["self_retrieval"],
                    "stale_rank_fidelity": round(measured.fidelity(stale).pairwise_spearman, 4),
                }
            )
            if not budget.holds(surely):
                break
            gate, kept = max(copies.novelties), report
        if not kept:
            return None
        # An evaluation on edits of these would not be on texts that chose nothing.
        entries = sorted(original.entry_id for original in self._originals)
        return gate, {**kept, **candidate.shares, "rates": rates, "entries": entries}

    def _errors_at(self, store: Path, share: float) -> dict[int, list[float]]:
        """By layer the errors of a few edited copies when maps lose ``share``."""
        dropped = dict.fromkeys(self._model.calibrator.layouts, share)
        originals = _originals(store, self._model, self._seed, dropped, PRUNED_TEXTS)
        copies = self._copies(originals, CHOOSE_RATE)
        every = {layer: blocks.groups for layer, blocks in originals[0].maps.items()}
        with self._model.calibrator.comparing(copies.hits(every)) as errors:
            self._model.run(copies.texts)
        return errors

    def _errors(self, candidate: Candidate, copies: Copies) -> tuple[tuple[float, float], ...]:
        with self._model.calibrator.comparing(copies.hits(candidate.groups)) as errors:
            self._model.run(copies.texts)
        return error_bands(errors, self._saving.num_layers)

    def _copies(self, originals: Sequence[Original], rate: float) -> Copies:
        texts, alignments = [], []
        for number, original in enumerate(originals):
            seed = (self._seed, number, round(rate * 1000))
            # A copy may have grown beyond what the model takes.
            tokens = edit(original.tokens, rate, self._vocabulary, seed)[: self._model.max_tokens]
            causal = next(iter(original.maps.values())).layout.mask.causal
            gate = AlignedGate(causal, math.inf, 1.0, 0.0)
            match = gate.match(0, align(tokens, original.tokens))
            assert match.aligned is not None
            texts.append(tokens)
            alignments.append(match.aligned)
        return Copies(texts, alignments, [original.maps for original in originals])


def _originals(
    store: Path, model: CalibratedModel, seed: int, dropped: Shares, limit: int | None = None
) -> list[Original]:
    """Some of the store's entries, drawn by ``seed``, as far as memory allows."""
    layouts = model.calibrator.layouts
    found: list[Original] = []
    with LocalStore.open(store) as opened:
        ids = np.random.default_rng(seed).permutation(len(opened.manifest.entries)).tolist()
        held = tokens = 0
        for entry_id in ids:
            if len(found) == (limit or MAX_TEXTS) or held > MAX_BYTES or tokens > MAX_TOKENS:
                break
            (record,) = opened.load([entry_id], deadline=math.inf)
            if record is None:
                continue
            maps = decoded(record, layouts, dropped)
            tokens += record.length
            if not maps:
                raise SettingsError(
                    "the store must hold maps of layers that can be reused, got those of layers "
                    f"{sorted(record.maps)!r}; see attncache doctor, or calibrate with "
                    "--sources template"
                )
            held += sum(blocks.nbytes for blocks in maps.values())
            found.append(Original(entry_id, np.array(record.token_ids), maps))
    return found


def decoded(
    record: Record, layouts: Mapping[int, MapLayout], dropped: Shares
) -> dict[int, RowBlocks]:
    """A record's maps by layer, of those layers that can be calibrated, less what they may lose."""
    return {
        layer: decode_blocks(
            record.codec,
            torch.from_numpy(encoded),
            layouts[layer],
            record.length,
            dropped.get(layer, 0.0),
        )
        for layer, encoded in record.maps.items()
        if layer in layouts
    }
