# SPDX-License-Identifier: Apache-2.0
"""The maps of the report's picture are those of the store, and of whom they are said to be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from store_samples import NAMESPACE, make_record

from attncache_vllm.evaluate.maps import sample_maps
from attncache_vllm.reuse.codecs import CODECS
from attncache_vllm.reuse.feature import Projector
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.plan import Plan
from attncache_vllm.reuse.template import TemplateSums
from attncache_vllm.store import LocalStore, token_hash

HEADS, KV_HEADS, LAYER = NAMESPACE.num_heads, NAMESPACE.num_kv_heads, 3
# The fourth has the median length, and the nearest longer one of its pooled input is the fifth.
LENGTHS = (4, 5, 6, 8, 10, 12, 14)
POOLED = (0.0, 1.0, 2.0, 3.0, 3.1, 9.0, -9.0)


def uniform(length: int, mask: Mask) -> torch.Tensor:
    """Maps ``[H, N, N]`` whose rows see everything they may alike."""
    visible = mask.visible(length).float()
    return (visible / visible.sum(1, keepdim=True)).expand(HEADS, -1, -1)


def build(path: Path, mask: Mask, templates: bool, codec: str = "tiles-u8-lse") -> Path:
    projector = Projector(4, slots=2)
    with LocalStore.create(path, NAMESPACE, {"layers": [LAYER]}) as store:
        features = []
        for number, (length, pooled) in enumerate(zip(LENGTHS, POOLED, strict=True)):
            ids = np.arange(number, number + length, dtype=np.int32)
            encode = CODECS[codec].encode
            payload = encode(uniform(length, mask), torch.zeros(HEADS, length), mask)
            record = replace(
                make_record(number),
                length=length,
                codec=codec,
                token_ids=ids,
                token_hash=token_hash(ids),
                pooled=np.full((2, 4), pooled, dtype=np.float32),
                maps={LAYER: payload.numpy()},
            )
            store.put(record)
            with torch.inference_mode():
                features.append(projector(torch.from_numpy(record.pooled)[None])[0].numpy())
        artifacts = {}
        if templates:
            sums = TemplateSums({LAYER: MapLayout(HEADS, KV_HEADS, mask)}, max(LENGTHS))
            for _ in range(3):
                sums.add(LAYER, uniform(max(LENGTHS), mask))
            artifacts["templates"] = sums.means(min_texts=1).select({LAYER: (1,)}).to_bytes()
        plan = Plan.reusing(NAMESPACE.num_layers, KV_HEADS, (LAYER,), 0.5)
        store.publish(
            plan.to_dict(), projector.to_bytes(), {}, np.stack(features), artifacts=artifacts
        )
    return path


def test_the_three_maps_are_of_one_text_and_one_layer(tmp_path: Path) -> None:
    mask = Mask(causal=True)
    title, maps = sample_maps(build(tmp_path / "store", mask, templates=True))
    assert title == "layer 3, 8 tokens, mean over the heads of KV groups 1"
    assert list(maps) == ["own map", "neighbour", "template"]
    # The maps of a longer uniform text begin with those of a shorter one.
    for found in maps.values():
        np.testing.assert_allclose(found, uniform(8, mask)[0].numpy(), atol=4e-3)


def test_a_bidirectional_text_has_no_neighbour_of_another_length(tmp_path: Path) -> None:
    mask = Mask(causal=False)
    _, maps = sample_maps(build(tmp_path / "store", mask, templates=False))
    assert list(maps) == ["own map"]
    np.testing.assert_allclose(maps["own map"], np.full((8, 8), 1 / 8), atol=4e-3)


@pytest.mark.parametrize("window", [2, 5])
def test_a_windowed_layer_is_drawn_where_the_map_itself_says_what_it_sees(
    tmp_path: Path, window: int
) -> None:
    mask = Mask(causal=True, window=window)
    _, maps = sample_maps(build(tmp_path / "tiles", mask, templates=False))
    np.testing.assert_allclose(maps["own map"], uniform(8, mask)[0].numpy(), atol=4e-3)
    path = build(tmp_path / "store", mask, templates=False, codec="visible-bf16-lse")
    title, maps = sample_maps(path)
    assert maps == {}
    assert "windowed" in title
