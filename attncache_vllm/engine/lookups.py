# SPDX-License-Identifier: Apache-2.0
"""Batched lookups beside the forward pass: candidates, the best match, and its maps."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future

import numpy as np
import torch

from attncache_vllm.engine import compat, metrics
from attncache_vllm.engine.background import thread_beside_forward
from attncache_vllm.engine.step import Hit, Sequence, Served
from attncache_vllm.errors import AttnCacheError, StoreTimeout
from attncache_vllm.reuse.align import Alignment, align
from attncache_vllm.reuse.codecs import CODECS, pruned
from attncache_vllm.reuse.feature import Projector
from attncache_vllm.reuse.layout import MapLayout
from attncache_vllm.reuse.maps import AttentionMap, RowBlocks
from attncache_vllm.reuse.match import (
    MIN_REUSED,
    AlignedGate,
    AlignedMatch,
    best_aligned,
    nearest,
)
from attncache_vllm.reuse.plan import Plan, Source
from attncache_vllm.reuse.sketch import sketch
from attncache_vllm.reuse.tiles import TiledMap
from attncache_vllm.store.protocol import Record, ServedStore
from attncache_vllm.store.records import MAX_LENGTH
from attncache_vllm.store.resident import ResidentSet

logger = compat.get_logger(__name__)

# Maps are read from read-only memory and never written to; torch warns because it cannot mark that.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

# Of exact neighbours the first would do; a compressed index ranks them a little wrong.
NEIGHBOURS = 8
# Aligning a candidate takes about a millisecond, and sketches rank them well.
OVERLAPS = 4

# Sources whose matches are looked up and loaded together.
_ALIGNED: tuple[Source, ...] = ("aligned", "prefix")
_NEAREST: tuple[Source, ...] = ("neighbour",)

Maps = dict[tuple[Source, int], AttentionMap]
Form = Callable[[RowBlocks | TiledMap], AttentionMap]


class Lookups:
    """Finds a match for each sequence of a batch, and loads its maps.

    One thread: while a lookup that outlived its step still runs, no other is queued behind it, so
    a slow store costs one step its deadline and not every step.
    """

    def __init__(
        self,
        store: ServedStore,
        projector: Projector,
        plan: Plan,
        resident_bytes: int,
        layouts: Mapping[int, MapLayout],
        groups: int,
        device: torch.device,
        form: Form,
    ) -> None:
        """``resident_bytes`` bounds the maps that are kept on ``device``, in the form that ``form``
        gives a stored one; ``layouts`` are those of the layers that reuse maps here; ``groups`` is
        the number of KV groups of all layers together."""
        self._store = store
        self._projector = projector
        self._plan = plan
        self._layouts = layouts
        self._device = device
        self._form = form
        self._causal = any(layout.mask.causal for layout in layouts.values())
        # One bidirectional layer, and rows of a common prefix are no longer exact.
        every_causal = all(layout.mask.causal for layout in layouts.values())
        self._aligned_gate = _aligned_gate(plan, every_causal, groups)
        # A template serves all rows of its groups: with fewer of all, an aligned entry is no gain.
        self._least_aligned = max(MIN_REUSED, _share(plan, "template", groups))
        # An entry is one tenant's, and so is what is kept under its id.
        self.resident: ResidentSet[tuple[tuple[Source, ...], int], Maps] = ResidentSet(
            resident_bytes
        )
        self._thread = thread_beside_forward("attncache-lookup")
        self._running: Future[list[Hit | None]] | None = None
        self._health = metrics.Health()

    @property
    def uses_features(self) -> bool:
        """Whether pooled feature inputs are looked at."""
        return "neighbour" in self._plan.sources

    def start(
        self, sequences: list[Sequence], pooled: torch.Tensor | None, deadline: float
    ) -> Future[list[Hit | None]] | None:
        """Look up sequences, by feature if their pooled feature inputs ``[B, slots, hidden]`` are
        given; None while another lookup runs. A sequence finds entries of its own tenant only, and
        none if that is not known."""
        if self._running is not None and not self._running.done():
            return None
        self._running = self._thread.submit(self._look_up, sequences, pooled, deadline)
        return self._running

    def _look_up(
        self, sequences: list[Sequence], pooled: torch.Tensor | None, deadline: float
    ) -> list[Hit | None]:
        started = time.monotonic()
        try:
            return self._find(sequences, pooled, deadline)
        except StoreTimeout:
            metrics.STORE_FAULTS.labels("late").inc()
            raise
        except AttnCacheError as error:
            metrics.STORE_FAULTS.labels("unavailable").inc()
            compat.warn_once(logger, "map store unavailable, computing exactly: %s", str(error))
            raise
        except Exception:
            # Not a fault of the store but of ours: say where, and let the step miss.
            metrics.STORE_FAULTS.labels("internal").inc()
            logger.exception("lookup failed, computing exactly")
            raise
        finally:
            metrics.LOOKUP_SECONDS.observe(time.monotonic() - started)
            self._health.publish(self._store.health())

    def _find(
        self, sequences: list[Sequence], pooled: torch.Tensor | None, deadline: float
    ) -> list[Hit | None]:
        hits: list[Hit | None] = [None] * len(sequences)
        owned = [i for i, sequence in enumerate(sequences) if sequence.tenant is not None]
        if len(owned) < len(sequences):
            compat.warn_once(
                logger,
                "requests whose tenant is not known find no stored maps; model runner V2 does not "
                "tell it, VLLM_USE_V2_MODEL_RUNNER=0 chooses the other",
            )
        known = [i for i in owned if sequences[i].token_ids is not None]
        if self._aligned_gate is not None and known:
            found = self._aligned([sequences[i] for i in known], deadline)
            for i, hit in zip(known, found, strict=True):
                hits[i] = hit
        rest = [i for i in owned if hits[i] is None]
        if pooled is not None and rest:
            found = self._nearest([sequences[i] for i in rest], pooled[rest], deadline)
            for i, hit in zip(rest, found, strict=True):
                hits[i] = hit
        return hits

    def _aligned(self, sequences: list[Sequence], deadline: float) -> list[Hit | None]:
        assert self._aligned_gate is not None
        tokens = [sequence.token_ids for sequence in sequences if sequence.token_ids is not None]
        candidates = self._store.overlaps(
            [sketch(ids) for ids in tokens],
            tenants=_tenants(sequences),
            neighbours=OVERLAPS,
            deadline=deadline,
        )
        wanted = sorted({candidate.entry_id for row in candidates for candidate in row})
        loaded = self._store.token_ids(wanted, deadline=deadline)
        stored = {i: ids for i, ids in zip(wanted, loaded, strict=True) if ids is not None}
        matches = [
            best_aligned(
                (
                    self._aligned_gate.match(c.entry_id, align(ids, stored[c.entry_id]))
                    for c in row
                    if c.entry_id in stored
                ),
                self._least_aligned,
            )
            for ids, row in zip(tokens, candidates, strict=True)
        ]
        entries = self._load(_ALIGNED, [match.entry_id for match in matches if match], deadline)
        return [
            _aligned_hit(match, entries[match.entry_id])
            if match is not None and match.entry_id in entries
            else None
            for match in matches
        ]

    def _nearest(
        self, sequences: list[Sequence], pooled: torch.Tensor, deadline: float
    ) -> list[Hit | None]:
        with torch.inference_mode():
            features = np.ascontiguousarray(self._projector(pooled).numpy(), dtype=np.float32)
        gate = self._plan.sources["neighbour"].gate
        usable = [(s.length, MAX_LENGTH if self._causal else s.length) for s in sequences]
        found = self._store.lookup(
            features,
            usable,
            tenants=_tenants(sequences),
            neighbours=NEIGHBOURS,
            deadline=deadline,
        )
        matches = [
            nearest(candidates, sequence.length, gate, longer=self._causal)
            for candidates, sequence in zip(found, sequences, strict=True)
        ]
        entries = self._load(_NEAREST, [match.entry_id for match in matches if match], deadline)
        return [
            _nearest_hit(entries[match.entry_id], sequence.length)
            if match is not None and match.entry_id in entries
            else None
            for match, sequence in zip(matches, sequences, strict=True)
        ]

    def _load(
        self, sources: tuple[Source, ...], entry_ids: list[int], deadline: float
    ) -> dict[int, Maps]:
        """The maps by source and layer of each entry whose record is sound."""
        wanted = sorted(set(entry_ids))
        found = {entry_id: self.resident.get((sources, entry_id)) for entry_id in wanted}
        absent = [entry_id for entry_id, maps in found.items() if maps is None]
        metrics.LOADS.labels("resident").inc(len(wanted) - len(absent))
        metrics.LOADS.labels("stored").inc(len(absent))
        if absent:
            records = self._store.load(absent, deadline=deadline)
            for entry_id, record in zip(absent, records, strict=True):
                maps = self._decode(sources, record) if record is not None else None
                if maps is None:
                    metrics.STORE_FAULTS.labels("damaged record").inc()
                    continue
                found[entry_id] = maps
                size = sum(blocks.nbytes for blocks in maps.values())
                # A hit saves about as much for every token.
                tokens = float(sum(blocks.length for blocks in maps.values()))
                self.resident.put((sources, entry_id), maps, size, tokens)
        metrics.RESIDENT_BYTES.set(self.resident.stats().bytes)
        return {entry_id: maps for entry_id, maps in found.items() if maps is not None}

    def _decode(self, sources: tuple[Source, ...], record: Record) -> Maps | None:
        """The record's maps; None when they are not what this model's maps must be."""
        codec = CODECS.get(record.codec)
        if codec is None:
            return None
        wanted = [
            (source, layer, part)
            for source, part in self._plan.sources.items()
            if source in sources
            for layer in part.layers
            if layer in self._layouts
        ]
        try:
            maps = {
                (source, layer): self._form(
                    pruned(
                        codec.decode(
                            torch.from_numpy(record.maps[layer]),
                            self._layouts[layer],
                            record.length,
                            part.groups[layer],
                        ),
                        part.dropped_in(layer),
                    )
                )
                for source, layer, part in wanted
            }
        except KeyError as error:
            compat.warn_once(logger, "a record lacks the map of layer %s", str(error))
            return None
        except ValueError as error:
            compat.warn_once(logger, "a stored map does not fit this model: %s", str(error))
            return None
        if self._device.type == "cuda":
            # The forward reads them on a stream of its own.
            torch.cuda.current_stream(self._device).synchronize()
        return maps


def _tenants(sequences: list[Sequence]) -> list[str]:
    return [sequence.tenant for sequence in sequences if sequence.tenant is not None]


def _aligned_gate(plan: Plan, causal: bool, groups: int) -> AlignedGate | None:
    """``groups`` is the number of KV groups of all layers; None if the plan aligns nothing."""
    if not any(source in plan.sources for source in _ALIGNED):
        return None
    gate = plan.sources["aligned"].gate if "aligned" in plan.sources else 0.0
    return AlignedGate(
        causal, gate, _share(plan, "aligned", groups), _share(plan, "prefix", groups)
    )


def _share(plan: Plan, source: Source, groups: int) -> float:
    """The share of all KV groups that a source serves."""
    part = plan.sources.get(source)
    return 0.0 if part is None else sum(map(len, part.groups)) / groups


def _aligned_hit(match: AlignedMatch, maps: Maps) -> Hit | None:
    served = {}
    for (source, layer), blocks in maps.items():
        alignment = match.aligned if source == "aligned" else match.prefix
        if alignment is None:
            continue
        if alignment.is_own_map(blocks.layout.mask.causal):
            served[layer] = Served(source, blocks)
        elif _sees_all(blocks, alignment):
            served[layer] = Served(source, blocks, alignment)
    if not served:
        return None
    approximate = any(item.source == "aligned" for item in served.values())
    return Hit("aligned" if approximate else "prefix", served)


def _sees_all(blocks: AttentionMap, alignment: Alignment) -> bool:
    """Whether no window hides anything: beyond one, a stored row and the row that it serves do not
    see the same columns."""
    window = blocks.layout.mask.window
    return window is None or window >= max(alignment.length, alignment.entry_length)


def _nearest_hit(maps: Maps, length: int) -> Hit | None:
    served = {
        layer: Served(source, blocks)
        for (source, layer), blocks in maps.items()
        if blocks.layout.mask.causal or blocks.length == length
    }
    return Hit("neighbour", served) if served else None
