# SPDX-License-Identifier: Apache-2.0
"""The encodings of stored maps, by the name that a record has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attncache_vllm.reuse.codec import CODEC, decode_map, encode_map
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.maps import AttentionMap, RowBlocks
from attncache_vllm.reuse.tile_codec import decode_tiles, encode_tiles
from attncache_vllm.reuse.tiles import TiledMap, multiplies, tiled


@dataclass(frozen=True)
class Codec:
    """How maps are stored.

    Attributes:
        encode: probabilities `[H, N, N]`, log-sum-exps `[H, N]` and mask to uint8 `[bytes]`.
        decode: that, its layout, its length and KV groups (None is all) to a map.
    """

    encode: Callable[[Tensor, Tensor, Mask], Tensor]
    decode: Callable[[Tensor, MapLayout, int, tuple[int, ...] | None], RowBlocks | TiledMap]


CODECS = {
    "tiles-u8-lse": Codec(encode_tiles, decode_tiles),
    CODEC: Codec(encode_map, decode_map),
}
DEFAULT_CODEC = "tiles-u8-lse"


def servable(
    stored: RowBlocks | TiledMap, device: torch.device, dtype: torch.dtype, head_size: int
) -> AttentionMap:
    """The map in the form that is fastest for values of this device, dtype and head size."""
    if isinstance(stored, RowBlocks):
        return stored.to(device)
    if multiplies(device, dtype, head_size):
        return stored
    return stored.to_blocks().to(device)


def servable_template(
    blocks: RowBlocks, device: torch.device, dtype: torch.dtype, head_size: int
) -> AttentionMap:
    """The same for a template, which is served so often that it is worth a new form."""
    if multiplies(device, dtype, head_size):
        return tiled(blocks)
    return blocks.to(device)


def pruned(stored: RowBlocks | TiledMap, dropped: float) -> RowBlocks | TiledMap:
    """A stored map less what a plan lets it lose; dense blocks have no tiles to lose, and stay."""
    return stored.pruned(dropped) if isinstance(stored, TiledMap) else stored


def decode_blocks(
    codec: str, payload: Tensor, layout: MapLayout, length: int, dropped: float = 0.0
) -> RowBlocks:
    """A whole stored map, pruned, as dense blocks, whatever its encoding.

    Raises:
        ValueError: the codec is unknown, or the payload is not such a map.
    """
    if codec not in CODECS:
        raise ValueError(f"a map's codec must be one of {sorted(CODECS)}, got {codec!r}")
    stored = pruned(CODECS[codec].decode(payload, layout, length, None), dropped)
    return stored if isinstance(stored, RowBlocks) else stored.to_blocks()
