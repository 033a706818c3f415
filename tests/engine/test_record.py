# SPDX-License-Identifier: Apache-2.0
"""Recording one attention module: its answer stays its own, its map is kept, and a module whose
answer is more than its map and its values is found out."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention_samples import (
    BertAttention,
    Decoder,
    LlamaAttention,
    ModernAttention,
    Row,
    Shape,
    inputs_of,
    make_module,
    run,
    step_of,
    text,
    whole,
)
from store_samples import NAMESPACE
from vllm.forward_context import ForwardContext, override_forward_context

from attncache_vllm.config import RecordSettings
from attncache_vllm.engine import ops, record
from attncache_vllm.engine.modules import find_attention_modules
from attncache_vllm.engine.record import Recorder, RecorderExtension, RecordModule, RecordScores
from attncache_vllm.errors import AttnCacheError, StoreError
from attncache_vllm.names import CodecName
from attncache_vllm.reuse.apply import exact_map
from attncache_vllm.reuse.codec import CODEC, decode_map
from attncache_vllm.reuse.feature import pool_tokens
from attncache_vllm.reuse.sketch import sketch
from attncache_vllm.reuse.tile_codec import decode_tiles
from attncache_vllm.store import LocalStore, token_hash

FAMILIES = {
    "causal": (LlamaAttention, Shape()),
    "multi-query, window": (ModernAttention, Shape(kv_heads=1, window=24, dtype=torch.bfloat16)),
    "bidirectional": (LlamaAttention, Shape(causal=False)),
    "BERT": (BertAttention, Shape(heads=3, kv_heads=3, causal=False, output_proj=False)),
}


class Recording:
    """A module that is recorded, as at start, into a store that is opened again to look."""

    def __init__(
        self, path: Path, module: Any, treatments: tuple[str, ...], codec: CodecName
    ) -> None:
        self.path, self.module = path, module
        (self.found,) = find_attention_modules(Decoder([module], hidden=module.shape.hidden))
        layer = self.found.index
        store = LocalStore.create(path, NAMESPACE, {})
        settings = RecordSettings(layers=(layer,), slots=4, codec=codec)
        layouts = {layer: self.found.layout}
        self.recorder = Recorder(store, settings, self.found.name, layouts)
        if "scores" in treatments:
            module.attn.attncache_scores = RecordScores(self.found, self.recorder)
        if "module" in treatments:
            ops.replace_forward(self.found, RecordModule(self.found, self.recorder))
        ops.observe_input(self.found, self.recorder.observe)

    def stored(self) -> Any:
        self.recorder.commit(ids(self.recorder.length))
        self.recorder.close()
        with LocalStore.open(self.path, writable=True) as store:
            ((_, found),) = store.records()
            return found


def ids(length: int) -> list[int]:
    return [7 * i % 11 for i in range(length)]


Record = Callable[..., Recording]


@pytest.fixture
def recording(tmp_path: Path) -> Record:
    def make(module: Any, *treatments: str, codec: CodecName = "visible-bf16-lse") -> Recording:
        return Recording(tmp_path / "store", module, treatments or ("scores", "module"), codec)

    return make


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("treatments", [("scores", "module"), ("scores",)])
def test_a_recorded_text_is_answered_exactly_and_its_map_kept(
    recording: Record, family: str, treatments: tuple[str, ...]
) -> None:
    module = make_module(*FAMILIES[family])
    rows = text(1, 70, module.shape)
    exact = run(module, [whole(rows)])
    recorded = recording(module, *treatments)
    # The runner may have padded the step.
    assert torch.equal(run(module, [whole(rows)], padding=2)[:70], exact)
    found = recorded.stored()
    assert (found.token_hash, found.length, found.codec) == (token_hash(ids(70)), 70, CODEC)
    assert found.token_ids.tolist() == ids(70)
    assert np.array_equal(found.sketch, sketch(found.token_ids))
    pooled = pool_tokens(rows, 4).half().float()
    torch.testing.assert_close(torch.tensor(found.pooled), pooled)
    positions = None if isinstance(module, BertAttention) else torch.arange(70)
    query, key, _ = module.heads(rows, positions)
    layout = recorded.found.layout
    probs, _ = exact_map(query, key, module.attn.impl.scale, layout.mask)
    maps = decode_map(torch.tensor(found.maps[1]), layout, 70)
    torch.testing.assert_close(maps.to_dense(), probs.bfloat16())
    assert 0 < recorded.recorder.parity[1] < 2**-8


def test_maps_in_tiles_are_recorded_as_such(recording: Record) -> None:
    module = make_module()
    recorded = recording(module, codec="tiles-u8-lse")
    run(module, [whole(text(1, 70))])
    query, key, _ = module.heads(text(1, 70), torch.arange(70))
    layout = recorded.found.layout
    probs, lse = exact_map(query, key, module.attn.impl.scale, layout.mask)
    found = recorded.stored()
    assert found.codec == "tiles-u8-lse"
    kept = decode_tiles(torch.tensor(found.maps[1]), layout, 70)
    torch.testing.assert_close(kept.to_dense().float(), probs, atol=0.01, rtol=0)
    torch.testing.assert_close(kept.lse, lse)
    assert 0 < recorded.recorder.parity[1] < 0.02


def test_capped_scores_are_recorded_capped(recording: Record) -> None:
    module = make_module()
    module.attn.impl.logits_soft_cap = 0.5
    recorded = recording(module, "scores")
    # The standard backend here does not cap: the parity check tells.
    with pytest.raises(AttnCacheError, match="layer 1 does not give its own answer"):
        run(module, [whole(text(1, 40))])
    query, key, _ = module.heads(text(1, 40), torch.arange(40))
    layout = recorded.found.layout
    probs, _ = exact_map(query, key, module.attn.impl.scale, layout.mask, soft_cap=0.5)
    kept = recorded.recorder.kept(recorded.found, query)
    torch.testing.assert_close(kept.to_dense(), probs.bfloat16())


# -- modules that do more ----------------------------------------------------------------------


def add_to_heads(module: Any) -> None:
    """A backend whose attention has something added to it, like a sink's value."""
    row = module.attn.impl._row
    module.attn.impl._row = lambda *args: row(*args) + 0.5


def gate_answer(module: Any) -> None:
    """A module that scales its answer by something no child shows."""
    attend = module.attend
    module.attend = lambda states, positions: attend(states, positions) * 1.1


def add_input(module: Any) -> None:
    attend = module.attend
    module.attend = lambda states, positions: attend(states, positions) + states


@pytest.mark.parametrize(
    ("change", "treatments"),
    [
        (add_to_heads, ("scores",)),
        (add_to_heads, ("scores", "module")),
        (gate_answer, ("scores", "module")),
        (add_input, ("scores", "module")),
    ],
)
def test_a_module_that_does_more_is_found_out_by_its_first_text(
    recording: Record, change: Callable[[Any], None], treatments: tuple[str, ...]
) -> None:
    module = make_module()
    change(module)
    recording(module, *treatments)
    with pytest.raises(AttnCacheError, match=r"layer 1 .* leave the layer out with --layers"):
        run(module, [whole(text(1, 40))])


def test_a_module_that_does_more_is_sound_where_only_its_scores_are_skipped(
    recording: Record,
) -> None:
    module = make_module()
    gate_answer(module)
    recorded = recording(module, "scores")
    run(module, [whole(text(1, 40))])
    assert recorded.stored().length == 40


def test_an_answer_that_is_not_a_number_is_found_out(recording: Record) -> None:
    recorded = recording(make_module())
    answer = torch.ones(3, 2)
    with pytest.raises(AttnCacheError, match="got nan"):
        recorded.recorder.check_parity(1, answer * math.nan, answer)


def test_an_attention_that_is_not_watched_is_found_out(recording: Record) -> None:
    module = make_module()
    recording(module, "module")
    with pytest.raises(AttnCacheError, match="layer 1 did not pass through the attention"):
        run(module, [whole(text(1, 40))])


# -- one whole sequence at a time --------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        [whole(text(1, 20)), whole(text(2, 20))],
        [Row(text(1, 20), 0, 10)],
        [Row(text(1, 20), 10, 20)],
        [whole(text(1, 20)), Row(text(2, 20), 0, 10)],
    ],
    ids=["two", "first chunk", "last chunk", "a whole one and a chunk"],
)
def test_anything_but_one_whole_text_is_refused(recording: Record, rows: list[Row]) -> None:
    module = make_module()
    recording(module)
    with pytest.raises(AttnCacheError, match="one whole sequence per step, got"):
        run(module, rows)


def test_nothing_is_recorded_while_vllm_profiles(recording: Record) -> None:
    module = make_module()
    recorded = recording(module)
    layer = module.attn
    context = ForwardContext(
        no_compile_layers={layer.layer_name: layer}, attn_metadata=None, slot_mapping={}
    )
    with override_forward_context(context):
        module(torch.arange(9), text(1, 9))
    assert recorded.recorder.length == 0
    with pytest.raises(AttnCacheError, match=r"got layers \[\] of \[1\]"):
        recorded.recorder.commit(ids(9))


def test_a_text_is_committed_once(recording: Record) -> None:
    module = make_module()
    recorded = recording(module)
    run(module, [whole(text(1, 9))])
    recorded.recorder.commit(ids(9))
    with pytest.raises(AttnCacheError, match=r"got layers \[\] of \[1\]"):
        recorded.recorder.commit(ids(9))


def test_a_text_is_written_while_the_next_is_computed(
    recording: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_module()
    recorder = recording(module).recorder
    put, may_write = recorder._store.put, threading.Event()
    monkeypatch.setattr(recorder._store, "put", lambda kept: may_write.wait(60) and put(kept))
    run(module, [whole(text(1, 9))])
    assert recorder.commit(ids(9))["entries"] == 1
    run(module, [whole(text(2, 12))])
    may_write.set()
    assert recorder.commit(ids(12))["entries"] == 2
    recorder.flush()
    assert recorder.stats()["entries"] == 2


def test_a_text_that_could_not_be_written_is_not_lost_silently(
    recording: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_module()
    recorder = recording(module).recorder

    def refuse(kept: Any) -> int:
        raise StoreError("the disk is full")

    for following in (recorder.flush, recorder.stats, lambda: recorder.commit(ids(12))):
        with monkeypatch.context() as full:
            full.setattr(recorder._store, "put", refuse)
            run(module, [whole(text(1, 9))])
            recorder.commit(ids(9))
            run(module, [whole(text(2, 12))])
            with pytest.raises(StoreError, match="the disk is full"):
                following()
        recorder.flush()
        assert recorder.stats()["entries"] == 0


@pytest.mark.parametrize("length", [8, 10])
def test_a_text_is_not_committed_with_the_token_ids_of_another(
    recording: Record, length: int
) -> None:
    module = make_module()
    recorded = recording(module)
    run(module, [whole(text(1, 9))])
    with pytest.raises(AttnCacheError, match=f"must be the 9 that the model saw, got {length}"):
        recorded.recorder.commit(ids(length))
    assert recorded.recorder.stats()["entries"] == 0


def test_a_text_that_missed_a_layer_is_not_committed(recording: Record) -> None:
    module = make_module()
    recorded = recording(module)
    with step_of([module.attn], [whole(text(1, 9))]):
        recorded.recorder.observe(inputs_of([whole(text(1, 9))]))
    with pytest.raises(AttnCacheError, match=r"got layers \[\] of \[1\]"):
        recorded.recorder.commit(ids(9))


# -- the worker's methods ----------------------------------------------------------------------


def test_the_workers_methods_reach_the_active_recorder(
    recording: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "_active", None)
    worker = RecorderExtension()
    with pytest.raises(AttnCacheError, match="nothing is being recorded"):
        worker.attncache_stats()

    module = make_module(ModernAttention, Shape(kv_heads=1, window=24))
    recorded = recording(module)
    record.activate(recorded.recorder)
    assert worker.attncache_layouts() == [(1, 6, 1, True, 24)]
    assert worker.attncache_stats()["entries"] == 0
    run(module, [whole(text(1, 9))])
    stats = worker.attncache_commit(ids(9))
    assert stats["entries"] == 1
    assert stats["parity"].keys() == {1}
    worker.attncache_flush()
    closed = worker.attncache_close()
    # The maps are counted before they are written, the rest of the record after.
    assert 0 < stats["bytes"] < closed["bytes"] < stats["bytes"] + 4096
    assert {**closed, "bytes": stats["bytes"]} == stats
    with LocalStore.open(recorded.path, writable=True) as store:
        assert store.stats().entries == 1
