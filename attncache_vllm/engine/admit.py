# SPDX-License-Identifier: Apache-2.0
"""A store that grows: some of the texts it misses are recorded and admitted to it.

The forward pass pays for copies only: of a recorded sequence's queries and keys in the layers that
stored entries serve. Maps are computed from these, encoded and handed to the store by one thread
that gets what time nobody else wants.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from attncache_vllm.engine import compat, metrics
from attncache_vllm.engine.background import thread_beside_forward
from attncache_vllm.engine.modules import AttentionModule
from attncache_vllm.engine.record import record_of
from attncache_vllm.engine.step import Recording
from attncache_vllm.engine.step import Sequence as Prompt
from attncache_vllm.errors import SettingsError
from attncache_vllm.reuse.encode import encode_attention
from attncache_vllm.reuse.feature import Projector
from attncache_vllm.reuse.plan import Plan
from attncache_vllm.store.protocol import GrowingStore, ServedStore, token_hash

if TYPE_CHECKING:
    from attncache_vllm.engine.backend import Exact, ScoresTreatment
    from attncache_vllm.engine.layer import Steps

logger = compat.get_logger(__name__)

# Bounds of a recorded text. All cells of one layer's map: 256 MiB in float32, and a few times that
# while torch encodes it. Visible cells of all its maps: about a byte each in tiles, on a way to the
# shards that has room for 256 MiB.
MAP_CELLS = 1 << 26
RECORD_CELLS = 1 << 27


def admissions_of(
    store: ServedStore,
    plan: Plan,
    projector: Projector,
    reusable: Sequence[AttentionModule],
    per_minute: float,
) -> Admissions | None:
    """What records for ``store``, by whose own ``plan`` the layers ``reusable`` are served; None if
    ``per_minute`` is 0, or a layer that the plan serves from entries is not among them.

    Raises:
        SettingsError: the plan serves nothing from entries.
    """
    if not per_minute:
        return None
    served = {
        layer
        for source, part in plan.sources.items()
        if source != "template"
        for layer in part.layers
    }
    if not served:
        raise SettingsError(
            "admit_per_minute must be 0 for a plan that serves nothing from entries, got "
            f"{per_minute!r} and the sources {sorted(plan.sources)!r}; calibrate with more sources"
        )
    layers = {found.index: found for found in reusable if found.index in served}
    if missing := sorted(served - layers.keys()):
        # Other servers of the store may need them: an entry without is of no use there.
        logger.warning("attncache: nothing is admitted, for layers %s cannot be recorded", missing)
        return None
    assert isinstance(store, GrowingStore), "a folder is refused with the settings"
    logger.info("attncache: up to %g missed texts a minute are admitted", per_minute)
    return Admissions(store, projector, layers, per_minute)


class Admissions:
    """Chooses missed sequences, collects what their maps are made of, and admits the maps.

    One at a time, and none while the one before is worked on: that bounds what it takes of memory.
    All but that work is called by the thread of the forward pass.
    """

    def __init__(
        self,
        store: GrowingStore,
        projector: Projector,
        layers: Mapping[int, AttentionModule],
        per_minute: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``layers`` are those that an entry must hold; ``clock`` counts seconds."""
        self._store = store
        self._projector = projector
        self._layers = layers
        self._layouts = [found.layout for found in layers.values()]
        self._codec = str(store.build["codec"])
        self._seconds = 60.0 / per_minute
        self._clock = clock
        self._due = clock()
        self._begun: Recording | None = None
        self._busy = False
        self._said = False
        self._thread = thread_beside_forward("attncache-admit", idle=True)

    def watch(self, found: AttentionModule, steps: Steps) -> None:
        """Have a layer that is hooked already give what is recorded of it, if anything is."""
        if found.index in self._layers:
            inner = found.attention.attncache_scores
            found.attention.attncache_scores = AdmittedScores(found.index, inner, steps, self)

    def ready(self) -> bool:
        """Whether a sequence of the step that begins may be recorded."""
        if self._begun is not None:
            self.give_up("its step has ended, and not every layer was seen")
        return not self._busy and self._clock() >= self._due

    def begin(self, sequence: Prompt, pooled: torch.Tensor) -> Recording | None:
        """Begin to record a missed sequence, which is computed exactly then; None if it is not one
        to be recorded. ``pooled`` is its pooled feature input, float32 ``[slots, hidden]``."""
        if sequence.token_ids is None or sequence.tenant is None or not self._fits(sequence.length):
            return None
        if not self._store.wants(token_hash(sequence.token_ids), sequence.tenant):
            return None
        self._due = self._clock() + self._seconds
        self._begun = Recording(sequence, pooled)
        return self._begun

    def keep(
        self, recording: Recording, layer: int, query: torch.Tensor, key: torch.Tensor
    ) -> None:
        """Copy a layer's queries ``[L, H, d]`` and keys ``[L, KV, d]`` of the sequence. With the
        last layer the work begins."""
        if self._begun is not recording:  # complete: a layer may run twice, to be compared
            return
        recording.scores[layer] = query.clone(), key.clone()
        if recording.scores.keys() < self._layers.keys():
            return
        if query.is_cuda:
            # The other thread reads on a stream of its own.
            torch.cuda.current_stream(query.device).synchronize()
        self._begun, self._busy = None, True
        self._thread.submit(self._work, recording)

    def give_up(self, why: str | Exception) -> None:
        """Forget the sequence that was begun, or is worked on; logged the first time."""
        self._begun, self._busy = None, False
        metrics.ADMISSIONS.labels("failed").inc()
        if not self._said:
            self._said = True
            trace = why if isinstance(why, Exception) else None
            logger.warning("attncache: a text could not be recorded: %s", why, exc_info=trace)

    def _fits(self, length: int) -> bool:
        visible = sum(layout.num_heads * layout.mask.cells(length) for layout in self._layouts)
        largest = max(layout.num_heads for layout in self._layouts) * length**2
        return largest <= MAP_CELLS and visible <= RECORD_CELLS

    def _work(self, recording: Recording) -> None:
        """Encode a layer, or admit what is encoded. A piece at a time: a process that ends waits
        for the piece that runs."""
        try:
            with torch.inference_mode():
                if not recording.scores:
                    self._admit(recording)
                    return
                self._encode(recording, *recording.scores.popitem())
        except Exception as error:
            self.give_up(error)
            return
        with contextlib.suppress(RuntimeError):  # the process ends
            self._thread.submit(self._work, recording)

    def _encode(
        self, recording: Recording, layer: int, scores: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        query, key = (part.cpu() for part in scores)
        found = self._layers[layer]
        recording.maps[layer] = encode_attention(
            self._codec, query, key, found.attention.impl.scale, found.layout.mask, found.soft_cap
        )

    def _admit(self, recording: Recording) -> None:
        token_ids, tenant = recording.sequence.token_ids, recording.sequence.tenant
        assert token_ids is not None and tenant is not None
        record = record_of(token_ids, self._codec, recording.pooled, recording.maps)
        feature = self._projector(recording.pooled[None])[0].numpy()
        if self._store.admit(record, feature, tenant):
            metrics.ADMISSIONS.labels("recorded").inc()
        self._busy = False


class AdmittedScores:
    """Stands around what stands in place of the standard backend's attention of one layer, and
    copies queries and keys of the sequence that is recorded."""

    def __init__(
        self, layer: int, inner: ScoresTreatment, steps: Steps, admissions: Admissions
    ) -> None:
        self._layer = layer
        self._inner = inner
        self._steps = steps
        self._admissions = admissions

    def attend(
        self,
        exact: Exact,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
    ) -> None:
        """See :class:`attncache_vllm.engine.backend.ScoresTreatment`."""
        self._inner.attend(exact, query, key, value, attn_metadata, output)
        step, source = self._steps.current(), compat.metadata_source(attn_metadata)
        recording = step.recording if step is not None else None
        if recording is None or source is None:
            return
        starts = source.common.query_start_loc_cpu.tolist()
        for row in range(source.common.num_reqs):
            # This may be a part of the batch.
            if source.row_in_batch(row) != recording.sequence.row:
                continue
            span = slice(starts[row], starts[row + 1])
            try:
                self._admissions.keep(recording, self._layer, query[span], key[span])
            except Exception as error:  # a request never fails because of the cache
                self._admissions.give_up(error)
