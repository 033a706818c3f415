# SPDX-License-Identifier: Apache-2.0
"""Recording: the same ops and seams as serving, but every sequence is computed exactly and its
maps are kept. ``attncache build`` drives it, one sequence per engine step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attncache_vllm.config import RecordSettings
from attncache_vllm.engine import compat
from attncache_vllm.engine.answers import MapAnswer, ValueProjection
from attncache_vllm.engine.background import thread_beside_forward
from attncache_vllm.engine.layer import ExactModule
from attncache_vllm.engine.modules import AttentionModule
from attncache_vllm.engine.step import prompts_of
from attncache_vllm.errors import AttnCacheError
from attncache_vllm.reuse.apply import apply_map
from attncache_vllm.reuse.codecs import CODECS, servable
from attncache_vllm.reuse.encode import encode_attention
from attncache_vllm.reuse.feature import pool_tokens
from attncache_vllm.reuse.layout import MapLayout
from attncache_vllm.reuse.maps import AttentionMap
from attncache_vllm.reuse.sketch import sketch
from attncache_vllm.store.local import LocalStore
from attncache_vllm.store.protocol import Record, token_hash

if TYPE_CHECKING:
    from attncache_vllm.engine.backend import Exact

# bf16 keeps 8 bits: maps and products that are rounded on the way differ by a fraction of a
# percent from the standard backend's float32 accumulation. A module that does more than
# o_proj(softmax(QK^T) V) differs by far more.
PARITY_TOLERANCE = 0.03


def record_of(
    token_ids: np.ndarray, codec: str, pooled: torch.Tensor, maps: Mapping[int, torch.Tensor]
) -> Record:
    """What a store keeps of a sequence.

    Args:
        token_ids: int32 ``[length]``.
        codec: that ``maps`` are encoded with.
        pooled: float32 ``[slots, hidden]`` on the CPU, its pooled feature input.
        maps: encoded, uint8 ``[bytes]``, by layer.
    """
    return Record(
        token_hash=token_hash(token_ids),
        length=len(token_ids),
        codec=codec,
        pooled=pooled.numpy(),
        maps={layer: encoded.numpy() for layer, encoded in maps.items()},
        token_ids=token_ids,
        sketch=sketch(token_ids),
    )


class Recorder:
    """Collects the maps of the sequence that is being prefilled and puts them into the store."""

    def __init__(
        self,
        store: LocalStore,
        settings: RecordSettings,
        feature_layer: str,
        layouts: dict[int, MapLayout],
    ) -> None:
        """``feature_layer`` is vLLM's name of it; ``layouts`` are those of the recorded layers."""
        self._store = store
        self._settings = settings
        self._feature_layer = feature_layer
        self.layouts = layouts
        self._pooled: torch.Tensor | None = None
        self._length = 0
        self._token_ids: np.ndarray | None = None
        self._maps: dict[int, torch.Tensor] = {}
        self.parity: dict[int, float] = {}
        # The disk takes a good part of a prefill's time, and writes beside the next one.
        self._writer = thread_beside_forward("attncache-write")
        self._writing: Future[int] | None = None

    def observe(self, hidden_states: torch.Tensor) -> None:
        """Begin a sequence from the feature layer's input ``[T, hidden]``."""
        source = compat.metadata_source(compat.layer_metadata(self._feature_layer))
        if source is None:
            return  # profiling or warm-up
        whole = prompts_of(source).whole
        if len(whole) != 1 or source.common.num_reqs != 1:
            raise AttnCacheError(
                "recording takes one whole sequence per step, got "
                f"{len(whole)} of {source.common.num_reqs} rows; run `attncache build`"
            )
        self._length, self._token_ids = whole[0].length, whole[0].token_ids
        tokens = hidden_states[: self._length]
        self._pooled = pool_tokens(tokens, self._settings.slots)
        self._maps = {}

    @property
    def length(self) -> int:
        """Tokens of the sequence being recorded; 0 while vLLM profiles or warms up."""
        return self._length if self._pooled is not None else 0

    def keep(self, found: AttentionModule, query: torch.Tensor, key: torch.Tensor) -> None:
        """Encode a layer's map from its queries ``[L, H, d]`` and keys ``[L, KV, d]``."""
        self._maps[found.index] = encode_attention(
            self._settings.codec,
            query,
            key,
            found.attention.impl.scale,
            found.layout.mask,
            found.soft_cap,
        )

    def kept(self, found: AttentionModule, like: torch.Tensor) -> AttentionMap:
        """The map of a layer that was recorded last, as it will be read back by an engine whose
        tensors are ``like`` this one."""
        layer, layout = found.index, found.layout
        if layer not in self._maps:
            raise AttnCacheError(
                f"layer {layer} did not pass through the attention implementation that is "
                "watched; its maps cannot be recorded. Leave it out with --layers"
            )
        stored = CODECS[self._settings.codec].decode(self._maps[layer], layout, self._length, None)
        return servable(stored, like.device, like.dtype, found.attention.head_size)

    def check_parity(self, layer: int, own: torch.Tensor, exact: torch.Tensor) -> None:
        """A sequence's own map must give the model's own answer; remembers the relative error."""
        error = ((own - exact).float().norm() / exact.float().norm()).item()
        self.parity[layer] = max(error, self.parity.get(layer, 0.0))
        if not error <= PARITY_TOLERANCE:
            raise AttnCacheError(
                f"layer {layer} does not give its own answer from its own map: relative "
                f"error must be at most {PARITY_TOLERANCE}, got {error:.4f}. Its attention is "
                "more than softmax(QK^T) V and an output projection; leave the layer out with "
                "--layers"
            )

    def commit(self, token_ids: Sequence[int]) -> dict[str, Any]:
        """Begin to store the sequence recorded last, which has these token ids, when the one before
        is stored. An error of the store is raised by the next call of any method that needs it.

        Returns:
            What ``stats`` will be when it is stored; of its bytes, those of the maps.
        """
        if self._pooled is None or set(self._maps) != set(self._settings.layers):
            raise AttnCacheError(
                "a recorded sequence must have passed the feature layer and every recorded layer, "
                f"got layers {sorted(self._maps)!r} of {sorted(self._settings.layers)!r}"
            )
        tokens = np.asarray(token_ids, dtype=np.int32)
        if len(tokens) != self._length or (
            self._token_ids is not None and not np.array_equal(tokens, self._token_ids)
        ):
            # Alignment would match rows of other tokens than those that the maps are of.
            raise AttnCacheError(
                f"the token ids of a recorded sequence must be the {self._length} that the model "
                f"saw, got {len(tokens)} of which some differ; vLLM joins or truncates this text "
                "in another way than the model's tokenizer, so that it cannot be recorded"
            )
        record = record_of(tokens, self._settings.codec, self._pooled.cpu(), self._maps)
        self._pooled, self._maps = None, {}
        stats = self.stats()  # the store tells nothing while it writes
        self._writing = self._writer.submit(self._store.put, record)
        stats["entries"] += 1
        stats["bytes"] += sum(encoded.nbytes for encoded in record.maps.values())
        return stats

    def flush(self) -> None:
        """Make everything recorded so far durable."""
        self._await_writing()
        self._store.commit()

    def stats(self) -> dict[str, Any]:
        self._await_writing()
        stats = self._store.stats()
        return {"entries": stats.entries, "bytes": stats.bytes, "parity": self.parity}

    def close(self) -> None:
        self.flush()
        self._writer.shutdown()
        self._store.close()

    def _await_writing(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


class RecordScores:
    """Stands in place of the standard backend's attention of one layer: exact, and recorded."""

    def __init__(self, found: AttentionModule, recorder: Recorder) -> None:
        self._found = found
        self._recorder = recorder

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
        exact(query, key, value, attn_metadata, output)
        length = self._recorder.length
        if not length:
            return
        self._recorder.keep(self._found, query[:length], key[:length])
        if self._found.index not in self._recorder.parity:
            own = torch.empty_like(output[:length])
            kept = self._recorder.kept(self._found, value)
            apply_map(kept, value[:length], own.flatten(1))
            self._recorder.check_parity(self._found.index, own, output[:length])


class RecordModule:
    """Stands around an attention module of which a hit would compute the V rows only.

    The first sequence is answered from its own map as well: the module must not do more.
    """

    def __init__(self, found: AttentionModule, recorder: Recorder) -> None:
        self._exact = ExactModule(found)
        self._found = found
        self._answer = MapAnswer(found, ValueProjection(found))
        self._recorder = recorder
        self._checked = False

    def forward(self, hidden_states: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        output = self._exact(hidden_states, positions)
        length = self._recorder.length
        if length and not self._checked:
            kept = self._recorder.kept(self._found, output)
            own = self._answer([(kept, 0, length)], hidden_states[:length], None)
            self._recorder.check_parity(self._found.index, own, output[:length])
            self._checked = True
        return output


_active: Recorder | None = None


def activate(recorder: Recorder) -> None:
    """Make ``recorder`` the one that :class:`RecorderExtension` talks to in this worker."""
    global _active
    _active = recorder


class RecorderExtension:
    """Methods added to vLLM's worker while recording (``worker_extension_cls``), called by
    ``LLM.collective_rpc``. The names carry a prefix because they share the worker's namespace."""

    def attncache_stats(self) -> dict[str, Any]:
        return _recorder().stats()

    def attncache_layouts(self) -> list[tuple[int, int, int, bool, int | None]]:
        """Layer, query heads, KV heads, causal and window of every recorded layer: plain values,
        because vLLM sends no objects between its processes."""
        return [
            (layer, layout.num_heads, layout.num_kv_heads, layout.mask.causal, layout.mask.window)
            for layer, layout in _recorder().layouts.items()
        ]

    def attncache_commit(self, token_ids: list[int]) -> dict[str, Any]:
        return _recorder().commit(token_ids)

    def attncache_flush(self) -> None:
        _recorder().flush()

    def attncache_close(self) -> dict[str, Any]:
        recorder = _recorder()
        stats = recorder.stats()
        recorder.close()
        return stats


def _recorder() -> Recorder:
    if _active is None:
        raise AttnCacheError("nothing is being recorded; start the engine with `attncache build`")
    return _active
