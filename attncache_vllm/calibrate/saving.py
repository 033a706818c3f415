# SPDX-License-Identifier: Apache-2.0
"""What serving a map saves, as a share of the multiplications of all attention modules.

A KV group that is served needs neither its queries and keys nor its scores. The products with V and
the output projection stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attncache_vllm.reuse.layout import MapLayout

Groups = Mapping[int, tuple[int, ...]]


@dataclass(frozen=True)
class SavingModel:
    """Multiplications of a model's attention modules for one sequence.

    Attributes:
        layouts: of every layer that could be served.
        hidden: width of the hidden states.
        head_size: width of a head.
        num_layers: all layers of the model.
        length: tokens of the sequence.
        around: whether served groups leave out queries and keys as well; those of an aligned
            sequence have rows to compute.
    """

    layouts: Mapping[int, MapLayout]
    hidden: int
    head_size: int
    num_layers: int
    length: int
    around: bool = True

    def share(self, groups: Groups) -> float:
        """The share of the multiplications that serving ``groups`` (by layer) leaves out."""
        total = sum(self._layer(layout) for layout in self.layouts.values())
        total *= self.num_layers / len(self.layouts)
        return sum(self.saved(layer, len(served)) for layer, served in groups.items()) / total

    def saved(self, layer: int, groups: int) -> float:
        """Multiplications left out where ``groups`` KV groups of a layer are served."""
        layout = self.layouts[layer]
        saved = self._scores(layout)
        if self.around:
            saved += self._projection(layout.num_heads + layout.num_kv_heads)
        return saved * groups / layout.num_kv_heads

    def _layer(self, layout: MapLayout) -> float:
        # Queries, keys, values and the output, and two products with the map.
        return 2 * self._scores(layout) + 2 * self._projection(
            layout.num_heads + layout.num_kv_heads
        )

    def _projection(self, heads: int) -> float:
        """From the hidden states to so many heads, or back."""
        return self.length * self.hidden * self.head_size * heads

    def _scores(self, layout: MapLayout) -> float:
        return layout.mask.cells(self.length) * self.head_size * layout.num_heads


def by_damage_per_saving(
    damages: Mapping[tuple[int, int], float], model: SavingModel, whole_layers: bool
) -> Sequence[tuple[tuple[int, int], ...]]:
    """Parcels of (layer, KV group) in the order in which to take them: least damage for what they
    save first. A parcel is a whole layer, or a single group."""
    layers: dict[int, list[tuple[int, int]]] = {}
    for layer, group in sorted(damages):
        layers.setdefault(layer, []).append((layer, group))
    if whole_layers:
        parcels = [tuple(of_layer) for of_layer in layers.values()]
    else:
        parcels = [(item,) for of_layer in layers.values() for item in of_layer]

    def rate(parcel: tuple[tuple[int, int], ...]) -> float:
        damage = sum(max(0.0, damages[item]) for item in parcel)
        return damage / model.saved(parcel[0][0], len(parcel))

    return sorted(parcels, key=lambda parcel: (rate(parcel), parcel))
