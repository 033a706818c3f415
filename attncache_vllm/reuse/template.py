# SPDX-License-Identifier: Apache-2.0
"""Templates: mean maps of a corpus, which serve any text at the layers that tolerate them.

The mean of the maps is the constant map with the least expected squared distance to the map of a
text. A causal template of N tokens serves every length up to N by its leading block, as any causal
map does. A bidirectional map depends on where the text ends, so there is one template per length
bucket, cut to a shorter text in the middle: the first half keeps its distance to the beginning and
the second half to the end, where encoders have their separators.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from attncache_vllm.reuse.codec import decode_map, encode_map
from attncache_vllm.reuse.layout import MapLayout
from attncache_vllm.reuse.maps import AttentionMap, RowBlocks

# A mean of fewer maps is the map of these texts rather than that of the corpus.
MIN_TEXTS = 4
# Bidirectional buckets: every length up to 32 tokens, then steps of an eighth.
_FINE_LENGTHS = 32
_LENGTHS_PER_BUCKET = 8


def bucket_of(length: int) -> int:
    """The longest length of the bucket that serves ``length`` tokens in a bidirectional layer."""
    bucket = _FINE_LENGTHS
    if length <= bucket:
        return length
    while bucket < length:
        bucket += max(1, bucket // _LENGTHS_PER_BUCKET)
    return bucket


def resize(probs: Tensor, length: int) -> Tensor:
    """Cut a bidirectional map ``[H, N, N]`` in the middle, or widen it there, to ``length`` tokens.

    The first half of the new rows and columns keeps its distance to the beginning, the second half
    to the end; a wider map repeats the middle token. Rows are scaled to sum 1 again; what a window
    hides has to be hidden by the caller.

    Raises:
        ValueError: ``length`` is below 1.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length!r}; skip empty sequences")
    old = probs.shape[-1]
    if length == old:
        return probs
    picked = _places(old, length)
    return _scaled_to_one(probs[:, picked][:, :, picked])


def _places(old: int, new: int) -> Tensor:
    """Where each of ``new`` tokens is among ``old`` ones that are cut or widened in the middle."""
    position = torch.arange(new)
    half = (new + 1) // 2
    picked = torch.where(position < half, position, old - new + position)
    # Only a wider map needs the bounds: there both halves run into the middle token.
    middle = old // 2
    return torch.where(position < half, picked.clamp(max=middle), picked.clamp(min=middle))


def _scaled_to_one(probs: Tensor) -> Tensor:
    return probs / probs.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


class TemplateSums:
    """Sums of the maps of a corpus, one text and layer at a time, in float32.

    A causal layer keeps ``[H, longest, longest]``, a bidirectional one as much for every bucket.
    """

    def __init__(self, layouts: Mapping[int, MapLayout], longest: int) -> None:
        self._layouts = dict(layouts)
        self._longest = longest
        self._sums: dict[int, dict[int, Tensor]] = {layer: {} for layer in layouts}
        self._counts: dict[int, dict[int, Tensor]] = {layer: {} for layer in layouts}

    def add(self, layer: int, probs: Tensor) -> None:
        """Add a map ``[H, L, L]`` of any float dtype; tokens beyond ``longest`` are left out.

        Raises:
            ValueError: the map does not fit the layer.
        """
        layout = self._layouts[layer]
        length = probs.shape[-1]
        if probs.shape != (layout.num_heads, length, length):
            raise ValueError(
                f"a map of layer {layer} must be [{layout.num_heads}, L, L], "
                f"got {tuple(probs.shape)!r}"
            )
        probs = probs.detach().to("cpu", torch.float32)
        if layout.mask.causal:
            bucket, length = self._longest, min(length, self._longest)
            probs = probs[:, :length, :length]
        else:
            bucket = bucket_of(length)
            probs, length = _hidden(resize(probs, bucket), layout), bucket
            if bucket > self._longest:
                return
        sums = self._sums[layer]
        if bucket not in sums:
            sums[bucket] = torch.zeros(layout.num_heads, bucket, bucket)
            self._counts[layer][bucket] = torch.zeros(bucket)
        sums[bucket][:, :length, :length] += probs
        self._counts[layer][bucket][:length] += 1

    def means(self, min_texts: int = MIN_TEXTS) -> Templates:
        """The mean maps of the rows and buckets that at least ``min_texts`` texts reached.

        The longest texts of a corpus are few: rows of a causal layer that some texts reached, but
        not enough, continue the mean for up to an eighth of its length (`_continued`).

        Raises:
            ValueError: nothing is left of a layer.
        """
        templates: dict[int, dict[int, RowBlocks]] = {}
        for layer, layout in self._layouts.items():
            means = {}
            for bucket, total in self._sums[layer].items():
                counts = self._counts[layer][bucket]
                length = int((counts >= min_texts).sum())  # counts never grow along the rows
                if length:
                    mean = total[:, :length, :length] / counts[:length, None]
                    longest = length + length // _LENGTHS_PER_BUCKET
                    mean = _continued(mean, min(longest, int((counts > 0).sum())), layout)
                    means[mean.shape[-1]] = _decoded(mean, layout)
            if not means:
                raise ValueError(
                    f"a template of layer {layer} needs at least {min_texts} texts of similar "
                    "length; give more texts"
                )
            templates[layer] = means
        return Templates(templates)


class Templates:
    """The templates of some layers, by layer and length."""

    def __init__(
        self,
        maps: Mapping[int, Mapping[int, RowBlocks]],
        form: Callable[[RowBlocks], AttentionMap] = lambda blocks: blocks,
    ) -> None:
        """``maps`` gives for each layer its maps by their length in tokens, ``form`` what they are
        served as."""
        self._maps = {layer: dict(of_layer) for layer, of_layer in maps.items()}
        self._form = form
        self._lengths = {layer: sorted(of_layer) for layer, of_layer in self._maps.items()}
        # Made when first served; there are few buckets, each with at most as many lengths as it is
        # wide, and one causal length.
        self._served: dict[tuple[int, int], AttentionMap] = {}

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(self._maps))

    @property
    def longest(self) -> int:
        """Longest sequence in tokens that every layer has a template for."""
        return min((lengths[-1] for lengths in self._lengths.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes held, apart from maps cut to a length on request."""
        return sum(blocks.nbytes for _, _, blocks in self._items())

    def get(self, layer: int, length: int) -> AttentionMap | None:
        """The map that serves ``length`` tokens in ``layer``; None if none is long enough."""
        lengths = self._lengths.get(layer, [])
        at = bisect_left(lengths, length)
        if at == len(lengths):
            return None
        blocks = self._maps[layer][lengths[at]]
        serves = blocks.length if blocks.layout.mask.causal else length
        if (layer, serves) not in self._served:
            if serves != blocks.length:
                held = blocks.to_dense()[_heads(blocks)].float()
                # Tokens only come closer to each other, so that a window hides no more than before.
                blocks = _held(resize(held, length), blocks.layout, blocks.groups)
            self._served[layer, serves] = self._form(blocks)
        return self._served[layer, serves]

    def select(self, groups: Mapping[int, tuple[int, ...]]) -> Templates:
        """The same templates with only these KV groups of only these layers.

        Raises:
            ValueError: a layer or a group has no template.
        """
        chosen = {}
        for layer, wanted in groups.items():
            if layer not in self._maps:
                raise ValueError(f"layer {layer} has no template, only {self.layers!r} have")
            chosen[layer] = {n: _only(blocks, wanted) for n, blocks in self._maps[layer].items()}
        return Templates(chosen)

    def served_as(self, form: Callable[[RowBlocks], AttentionMap]) -> Templates:
        """The same templates, whose maps are served as what ``form`` makes of them. That takes a
        while for each map: it is done here for causal ones, of which there is one in a layer."""
        served = Templates(self._maps, form)
        for layer, length, blocks in self._items():
            if blocks.layout.mask.causal:
                served.get(layer, length)
        return served

    def to_bytes(self) -> bytes:
        """Safetensors with one encoded map per layer and length; `from_bytes` reads it back."""
        tensors, groups = {}, {}
        for layer, length, blocks in self._items():
            probs = blocks.to_dense()[_heads(blocks)]
            no_scores = torch.zeros(probs.shape[:2])  # a template has no rows of one text
            tensors[f"{layer}.{length}"] = encode_map(probs, no_scores, blocks.layout.mask)
            groups[layer] = list(blocks.groups)
        data: bytes = save_tensors(tensors, {"groups": json.dumps(groups)})
        return data

    @classmethod
    def from_bytes(cls, data: bytes, layouts: Mapping[int, MapLayout]) -> Templates:
        """Read templates; nothing about ``data`` is trusted.

        Args:
            data: what `to_bytes` made.
            layouts: those of the model's layers.

        Raises:
            ValueError: the data are not templates of such layers.
        """
        try:
            tensors = load_tensors(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            groups: dict[str, Any] = json.loads(header["__metadata__"]["groups"])
            maps: dict[int, dict[int, RowBlocks]] = {}
            for name, payload in tensors.items():
                layer, length = (int(part) for part in name.split("."))
                layout, held = layouts[layer], tuple(groups[str(layer)])
                own = [group for group in range(layout.num_kv_heads) if group in held]
                if not held or list(held) != own or {type(group) for group in held} != {int}:
                    raise ValueError(f"KV groups of layer {layer} must be its own, got {held!r}")
                small = _layout_of(layout, len(held))
                blocks = decode_map(payload, small, length)
                maps.setdefault(layer, {})[length] = replace(
                    blocks, layout=layout, groups=held, lse=None
                )
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"these are not templates of this model's layers: {error!r}; calibrate again"
            ) from None
        return cls(maps)

    def _items(self) -> Iterator[tuple[int, int, RowBlocks]]:
        for layer, of_layer in self._maps.items():
            for length, blocks in of_layer.items():
                yield layer, length, blocks


def _continued(probs: Tensor, length: int, layout: MapLayout) -> Tensor:
    """A causal map ``[H, N, N]`` with rows up to ``length``, ``[H, length, length]``.

    Each further row is the last one, widened in the middle: it keeps its distance to the beginning
    and to the token itself.
    """
    old = probs.shape[-1]
    whole = probs.new_zeros(probs.shape[0], length, length)
    whole[:, :old, :old] = probs
    for row in range(old, length):
        whole[:, row, : row + 1] = probs[:, -1, _places(old, row + 1)]
    whole[:, old:] = _scaled_to_one(whole[:, old:] * layout.mask.visible(length)[old:])
    return whole


def _layout_of(layout: MapLayout, groups: int) -> MapLayout:
    return MapLayout(groups * layout.group, groups, layout.mask)


def _decoded(probs: Tensor, layout: MapLayout) -> RowBlocks:
    return _held(probs, layout, tuple(range(layout.num_kv_heads)))


def _held(probs: Tensor, layout: MapLayout, groups: tuple[int, ...]) -> RowBlocks:
    """Row blocks of the maps ``[len(groups) * G, N, N]`` of some KV groups."""
    length = probs.shape[-1]
    probs = probs.clamp(0, 1)  # sums of rounded numbers
    encoded = encode_map(probs, torch.zeros(probs.shape[:2]), layout.mask)
    blocks = decode_map(encoded, _layout_of(layout, len(groups)), length)
    return replace(blocks, layout=layout, groups=groups, lse=None)


def _heads(blocks: RowBlocks) -> list[int]:
    """Query heads of the KV groups that ``blocks`` holds."""
    size = blocks.layout.group
    return [group * size + member for group in blocks.groups for member in range(size)]


def _only(blocks: RowBlocks, groups: tuple[int, ...]) -> RowBlocks:
    if not set(groups) <= set(blocks.groups):
        raise ValueError(f"only the KV groups {blocks.groups!r} have a template, got {groups!r}")
    at = [blocks.groups.index(group) for group in groups]
    parts = tuple(replace(b, probs=b.probs[at].contiguous()) for b in blocks.blocks)
    return replace(blocks, blocks=parts, groups=groups)


def _hidden(probs: Tensor, layout: MapLayout) -> Tensor:
    """Rows of ``probs`` without what a window hides, scaled to sum 1 again."""
    if layout.mask.window is None:
        return probs
    seen = probs * layout.mask.visible(probs.shape[-1], probs.device)
    return seen / seen.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
