# SPDX-License-Identifier: Apache-2.0
"""One stored text's own map, its nearest neighbour's, and the template, as a plot shows them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from attncache_vllm.reuse.codecs import decode_blocks
from attncache_vllm.reuse.feature import Projector
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.maps import AttentionMap
from attncache_vllm.reuse.plan import Plan
from attncache_vllm.reuse.template import Templates
from attncache_vllm.store.local import LocalStore
from attncache_vllm.store.protocol import Namespace, Record
from attncache_vllm.tenants import SHARED_TENANT

LOOKED_UP = 8  # neighbours: the text itself is one


def sample_maps(path: Path) -> tuple[str, dict[str, NDArray[np.float32]]]:
    """Maps ``[L, L]`` float32, means over heads, of one text and one layer of a store.

    The text is the one of median length, the layer the middle one of those with reuse; no engine
    runs. A source that has nothing for it is left out.

    Returns:
        A title, and the maps by name; no maps, and why, where the text's own cannot be read.
    """
    with LocalStore.open(path) as store:
        plan = Plan.from_dict(store.plan)
        published = store.manifest.published
        assert published is not None
        lengths = [entry.length for entry in store.manifest.entries[: published.rows]]
        own_id = sorted(range(len(lengths)), key=lengths.__getitem__)[len(lengths) // 2]
        (own,) = store.load([own_id], deadline=math.inf)
        layers = plan.reused_layers or tuple(own.maps if own else ())
        layer = layers[len(layers) // 2] if layers else 0
        if own is None or layer not in own.maps:
            return "the entry of median length is damaged or has no map of that layer", {}
        mask = _mask(own, layer, store.manifest.namespace)
        if mask is None:
            return "maps of windowed layers are not drawn", {}
        layout = _layout(store.manifest.namespace, mask)
        maps = {"own map": _decoded(own, layer, layout)}
        if (nearest := _neighbour(store, own_id, own, mask.causal)) is not None:
            maps["neighbour"] = _decoded(nearest, layer, layout)
        groups = tuple(range(layout.num_kv_heads))
        if (data := store.artifact("templates")) is not None:
            every = dict.fromkeys(range(plan.num_layers), layout)
            template = Templates.from_bytes(data, every).get(layer, own.length)
            if template is not None:
                # It holds the KV groups that it serves, so the others are left out everywhere.
                maps["template"], groups = template, template.groups
        heads = f"mean over the heads of KV groups {', '.join(map(str, groups))}"
        means = {name: _mean(blocks, own.length, groups) for name, blocks in maps.items()}
        return f"layer {layer}, {own.length} tokens, {heads}", means


def _neighbour(store: LocalStore, own_id: int, own: Record, causal: bool) -> Record | None:
    """The nearest other entry whose map can stand in for that of ``own``."""
    projector = Projector.from_bytes(store.projector_bytes)
    with torch.inference_mode():
        feature = projector(torch.from_numpy(own.pooled).float()[None]).numpy()
    longest = max(entry.length for entry in store.manifest.entries) if causal else own.length
    (found,) = store.lookup(
        feature,
        [(own.length, longest)],
        tenants=[SHARED_TENANT],
        neighbours=LOOKED_UP,
        deadline=math.inf,
    )
    others = [neighbour.entry_id for neighbour in found if neighbour.entry_id != own_id]
    return store.load(others[:1], deadline=math.inf)[0] if others else None


def _mask(record: Record, layer: int, namespace: Namespace) -> Mask | None:
    """What rows of the map see: its size tells, or what they saw. None where it is neither all nor
    all before."""
    for mask in (Mask(causal=False), Mask(causal=True)):
        try:
            found = _decoded(record, layer, _layout(namespace, mask))
        except ValueError:
            continue
        return mask if found.to_dense().triu(1).any() else Mask(causal=True)
    return None


def _layout(namespace: Namespace, mask: Mask) -> MapLayout:
    return MapLayout(namespace.num_heads, namespace.num_kv_heads, mask)


def _decoded(record: Record, layer: int, layout: MapLayout) -> AttentionMap:
    payload = torch.from_numpy(record.maps[layer].copy())
    return decode_blocks(record.codec, payload, layout, record.length)


def _mean(blocks: AttentionMap, length: int, groups: tuple[int, ...]) -> NDArray[np.float32]:
    """Mean over the heads of ``groups`` of the leading block ``[length, length]``."""
    size = blocks.layout.group
    heads = [group * size + member for group in groups for member in range(size)]
    mean: NDArray[np.float32] = blocks.to_dense()[heads].float().mean(0)[:length, :length].numpy()
    return mean
