# SPDX-License-Identifier: Apache-2.0
"""What one engine's worker holds for serving: store, projector, resident maps and counters."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from attncache_vllm.config import Settings
from attncache_vllm.engine import compat, metrics
from attncache_vllm.engine.step import Hit, Sequence, Step, prompts_of
from attncache_vllm.errors import AttnCacheError, StoreTimeout
from attncache_vllm.reuse.apply import RowBlocks, crop
from attncache_vllm.reuse.codec import CODEC, decode_map
from attncache_vllm.reuse.feature import Projector, pool_tokens
from attncache_vllm.reuse.layout import MapLayout
from attncache_vllm.reuse.match import Match, choose
from attncache_vllm.reuse.plan import Plan
from attncache_vllm.reuse.resident import ResidentSet
from attncache_vllm.store.protocol import MapStore, Record
from attncache_vllm.store.records import MAX_LENGTH

logger = compat.get_logger(__name__)

# Maps are read from read-only memory and never written to; torch warns because it cannot mark that.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

_STEP = "attncache"
# Of exact neighbours the first would do; a compressed index ranks them a little wrong.
NEIGHBOURS = 8


class Lookups:
    """Batched lookups beside the forward pass: features, search, gate, and the maps themselves.

    One thread: while a lookup that outlived its step still runs, no other is queued behind it, so
    a slow store costs one step its deadline and not every step.
    """

    def __init__(
        self,
        store: MapStore,
        projector: Projector,
        plan: Plan,
        settings: Settings,
        layouts: dict[int, MapLayout],
        device: torch.device,
    ) -> None:
        """``layouts`` are those of the layers that reuse maps here; maps are kept on ``device``."""
        self._store = store
        self._projector = projector
        self._layouts = layouts
        self._device = device
        self._widest_gate = max(plan.layers[layer].max_distance for layer in layouts)
        # Layers that a longer entry can serve: causal maps hold the maps of their prefixes.
        self._longer = frozenset(
            layer
            for layer, layout in layouts.items()
            if layout.mask.causal or plan.layers[layer].crop
        )
        self.resident: ResidentSet[int, dict[int, RowBlocks]] = ResidentSet(settings.resident_bytes)
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="attncache-lookup", initializer=_leave_compute_core
        )
        self._running: Future[list[Hit | None]] | None = None

    def start(
        self, pooled: torch.Tensor, lengths: list[int], deadline: float
    ) -> Future[list[Hit | None]] | None:
        """Look up pooled feature inputs ``[B, slots, hidden]``; None while another one runs."""
        if self._running is not None and not self._running.done():
            return None
        self._running = self._thread.submit(self._look_up, pooled, lengths, deadline)
        return self._running

    def _look_up(
        self, pooled: torch.Tensor, lengths: list[int], deadline: float
    ) -> list[Hit | None]:
        started = time.monotonic()
        try:
            with torch.inference_mode():
                features = self._projector(pooled).numpy()
            return self._find(np.ascontiguousarray(features, dtype=np.float32), lengths, deadline)
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

    def _find(self, features: np.ndarray, lengths: list[int], deadline: float) -> list[Hit | None]:
        longer = bool(self._longer)
        usable = [(length, MAX_LENGTH if longer else length) for length in lengths]
        neighbours = self._store.lookup(features, usable, neighbours=NEIGHBOURS, deadline=deadline)
        matches = [
            choose(found, length, self._widest_gate, longer)
            for found, length in zip(neighbours, lengths, strict=True)
        ]
        maps = self._load(
            sorted({match.entry_id for match in matches if match is not None}), deadline
        )
        return [self._hit(match, maps) for match in matches]

    def _hit(self, match: Match | None, maps: dict[int, dict[int, RowBlocks]]) -> Hit | None:
        if match is None or match.entry_id not in maps:
            return None
        entry = maps[match.entry_id]
        if match.entry_length == match.length:
            return Hit(match, entry)
        return Hit(match, {layer: crop(entry[layer], match.length) for layer in self._longer})

    def _load(self, entry_ids: list[int], deadline: float) -> dict[int, dict[int, RowBlocks]]:
        found = {entry_id: self.resident.get(entry_id) for entry_id in entry_ids}
        absent = [entry_id for entry_id, maps in found.items() if maps is None]
        if absent:
            records = self._store.load(absent, deadline=deadline)
            for entry_id, record in zip(absent, records, strict=True):
                maps = self._decode(record) if record is not None else None
                if maps is None:
                    metrics.STORE_FAULTS.labels("damaged record").inc()
                    continue
                found[entry_id] = maps
                self.resident.put(entry_id, maps, sum(m.nbytes for m in maps.values()))
        return {entry_id: maps for entry_id, maps in found.items() if maps is not None}

    def _decode(self, record: Record) -> dict[int, RowBlocks] | None:
        """The record's maps by layer; None when they are not what this model's maps must be."""
        if record.codec != CODEC:
            return None
        try:
            maps = {
                layer: decode_map(torch.from_numpy(record.maps[layer]), layout, record.length)
                for layer, layout in self._layouts.items()
            }
        except KeyError as error:
            compat.warn_once(logger, "a record lacks the map of layer %s", str(error))
            return None
        except ValueError as error:
            compat.warn_once(logger, "a stored map does not fit this model: %s", str(error))
            return None
        maps = {layer: blocks.to(self._device) for layer, blocks in maps.items()}
        if self._device.type == "cuda":
            # The forward reads them on a stream of its own.
            torch.cuda.current_stream(self._device).synchronize()
        return maps


def _leave_compute_core() -> None:
    """Let the calling thread run on any core that the worker's parent may use.

    vLLM pins a CPU worker's threads to cores, and a new thread inherits the pin: left there, the
    lookup would run on the forward's own core, in turn with it instead of beside it.
    """
    if hasattr(os, "sched_setaffinity"):  # not on macOS
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))


class Serving:
    """Observes the feature layer, starts the lookup and hands each layer the current step."""

    def __init__(
        self, plan: Plan, lookups: Lookups, settings: Settings, slots: int, feature_layer_name: str
    ) -> None:
        self._plan = plan
        self._lookups = lookups
        self._settings = settings
        self._slots = slots
        self._feature_layer_name = feature_layer_name
        self.outcomes = metrics.Outcomes(settings.log_interval_s)

    def observe(self, hidden_states: torch.Tensor) -> None:
        """Begin a step from the feature layer's input ``[T, hidden]``."""
        attn_metadata = compat.layer_metadata(self._feature_layer_name)
        source = compat.metadata_source(attn_metadata)
        if source is None:
            return  # profiling or warm-up
        self.outcomes.log(logger)
        compat.forward_context().additional_kwargs[_STEP] = self._begin(source, hidden_states)

    def current(self) -> Step | None:
        """The step of the forward pass that is running; None while profiling or warming up."""
        step: Step | None = compat.forward_context().additional_kwargs.get(_STEP)
        return step

    def _begin(self, source: compat.MetadataSource, hidden_states: torch.Tensor) -> Step:
        prompts = prompts_of(source)
        self.outcomes.bypass("only a part of the prompt in the step", prompts.ending)
        eligible = [seq for seq in prompts.whole if seq.length >= self._settings.min_tokens]
        self.outcomes.bypass("shorter than min_tokens", len(prompts.whole) - len(eligible))
        deadline = time.monotonic() + self._settings.lookup_deadline_ms / 1e3
        lookup = self._start_lookup(eligible, hidden_states, deadline) if eligible else None
        if lookup is None:
            self.outcomes.miss("lookup still running", len(eligible))
            eligible = []
        return Step(self._plan, eligible, lookup, deadline, self.outcomes)

    def _start_lookup(
        self, sequences: list[Sequence], hidden_states: torch.Tensor, deadline: float
    ) -> Future[list[Hit | None]] | None:
        pooled = torch.stack(
            [
                pool_tokens(hidden_states[seq.start : seq.start + seq.length], self._slots)
                for seq in sequences
            ]
        )
        # Rounded as a store keeps them, so that a recorded text finds itself at distance 0.
        pooled = pooled.to("cpu", torch.float16).float()
        return self._lookups.start(pooled, [seq.length for seq in sequences], deadline)
