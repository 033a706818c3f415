# SPDX-License-Identifier: Apache-2.0
"""Recording: the same ops and seams as serving, but every sequence is computed exactly and its
maps are kept. ``attncache build`` drives it, one sequence per engine step."""

from __future__ import annotations

from typing import Any

import torch

from attncache_vllm.config import RecordSettings
from attncache_vllm.engine import compat
from attncache_vllm.engine.layer import AttentionModule, ValueProjection
from attncache_vllm.engine.step import sequences_of
from attncache_vllm.errors import AttnCacheError
from attncache_vllm.reuse.apply import apply_map, exact_causal_probs
from attncache_vllm.reuse.codec import CODEC, decode_causal, encode_causal
from attncache_vllm.reuse.feature import pool_tokens
from attncache_vllm.store.local import LocalStore
from attncache_vllm.store.protocol import Record

# bf16 keeps 8 bits: maps and products that are rounded on the way differ by a fraction of a
# percent from the standard backend's float32 accumulation. A module that does more than
# o_proj(softmax(QK^T) V) differs by far more.
PARITY_TOLERANCE = 0.03


class Recorder:
    """Collects the maps of the sequence that is being prefilled and puts them into the store."""

    def __init__(self, store: LocalStore, settings: RecordSettings, feature_layer: str) -> None:
        self._store = store
        self._settings = settings
        self._feature_layer = feature_layer
        self._pooled: torch.Tensor | None = None
        self._length = 0
        self._maps: dict[int, torch.Tensor] = {}
        self.parity: dict[int, float] = {}

    def observe(self, hidden_states: torch.Tensor) -> None:
        """Begin a sequence from the feature layer's input ``[T, hidden]``."""
        source = compat.metadata_source(compat.layer_metadata(self._feature_layer))
        if source is None:
            return  # profiling or warm-up
        whole, partial = sequences_of(source)
        if len(whole) != 1 or partial:
            raise AttnCacheError(
                "recording takes one whole sequence per step, got "
                f"{len(whole)} whole and {len(partial)} partial ones; run `attncache build`"
            )
        self._length = whole[0].length
        tokens = hidden_states[whole[0].start : whole[0].start + self._length]
        self._pooled = pool_tokens(tokens, self._settings.slots)
        self._maps = {}

    @property
    def length(self) -> int:
        """Tokens of the sequence being recorded; 0 while vLLM profiles or warms up."""
        return self._length if self._pooled is not None else 0

    def keep(self, layer: int, encoded: torch.Tensor) -> None:
        self._maps[layer] = encoded

    def kept(self, layer: int) -> torch.Tensor | None:
        return self._maps.get(layer)

    def commit(self, token_hash: bytes) -> int:
        """Store the sequence recorded last under the hash of its token ids; returns entry id."""
        if self._pooled is None or set(self._maps) != set(self._settings.layers):
            raise AttnCacheError(
                "a recorded sequence must have passed the feature layer and every recorded layer, "
                f"got layers {sorted(self._maps)!r} of {sorted(self._settings.layers)!r}"
            )
        record = Record(
            token_hash=token_hash,
            length=self._length,
            codec=CODEC,
            pooled=self._pooled.cpu().numpy(),
            maps={layer: encoded.numpy() for layer, encoded in self._maps.items()},
        )
        self._pooled, self._maps = None, {}
        return self._store.put(record)

    def flush(self) -> None:
        """Make everything recorded so far durable."""
        self._store.commit()

    def stats(self) -> dict[str, Any]:
        stats = self._store.stats()
        return {"entries": stats.entries, "bytes": stats.bytes, "parity": self.parity}

    def close(self) -> None:
        self._store.commit()
        self._store.close()


class RecordAttention:
    """Stands around one attention module whose maps are recorded."""

    def __init__(self, found: AttentionModule, recorder: Recorder) -> None:
        self._index = found.index
        self._heads = (found.attention.num_heads, found.attention.num_kv_heads)
        self._exact = found.module.forward
        self._o_proj = found.module.o_proj
        self._value = ValueProjection(found)
        self._recorder = recorder

    def record_map(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        """Called by the attention implementation with q ``[T, H, d]`` and k ``[T, KV, d]``."""
        length = self._recorder.length
        if length:
            probs = exact_causal_probs(query[:length], key[:length], scale)
            self._recorder.keep(self._index, encode_causal(probs))

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self._exact(positions=positions, hidden_states=hidden_states)
        if self._recorder.length and self._index not in self._recorder.parity:
            self._check_parity(hidden_states, output)
        return output

    def _check_parity(self, hidden_states: torch.Tensor, exact: torch.Tensor) -> None:
        """Once per layer: the sequence's own map must give the module's own answer."""
        length = self._recorder.length
        encoded = self._recorder.kept(self._index)
        if encoded is None:
            raise AttnCacheError(
                f"layer {self._index} did not pass through the attention implementation that is "
                "watched; its maps cannot be recorded. Leave it out with --layers"
            )
        value = self._value(hidden_states[:length])
        heads = torch.empty(
            length, self._heads[0] * value.shape[2], dtype=value.dtype, device=value.device
        )
        apply_map(decode_causal(encoded, *self._heads, length).to(value.device), value, heads)
        own = self._o_proj(heads)[0]
        error = ((own - exact[:length]).float().norm() / exact[:length].float().norm()).item()
        self._recorder.parity[self._index] = error
        if not error <= PARITY_TOLERANCE:
            raise AttnCacheError(
                f"layer {self._index} does not give its own answer from its own map: relative "
                f"error must be at most {PARITY_TOLERANCE}, got {error:.4f}. The attention module "
                "does more than softmax(QK^T) V and an output projection; leave the layer out "
                "with --layers"
            )


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

    def attncache_commit(self, token_hash: bytes) -> dict[str, Any]:
        recorder = _recorder()
        recorder.commit(token_hash)
        return recorder.stats()

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
