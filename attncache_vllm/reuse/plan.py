# SPDX-License-Identifier: Apache-2.0
"""Which layers reuse a stored map, and how close the match must be."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Source = Literal["exact", "cached"]


@dataclass(frozen=True)
class LayerPlan:
    """Where one layer takes its map from.

    Attributes:
        source: `exact` computes the map, `cached` takes it from a match.
        max_distance: largest feature distance (L2) at which a `cached` layer takes the match;
            an `exact` layer does not read it.
        crop: whether a longer bidirectional map may serve, cropped and scaled to row sums of 1.
            A causal layer does not read it: its maps hold those of their prefixes exactly.

    Raises:
        ValueError: the source is unknown, the gate is not a finite number >= 0, or crop is not a
            bool.
    """

    source: Source
    max_distance: float = 0.0
    crop: bool = False

    def __post_init__(self) -> None:
        if self.source not in get_args(Source):
            raise ValueError(
                f"a layer's source must be one of {get_args(Source)}, got {self.source!r}; "
                "calibrate again or correct the plan"
            )
        gate = self.max_distance
        if (
            isinstance(gate, bool)
            or not isinstance(gate, int | float)
            or not 0 <= gate <= sys.float_info.max
        ):
            raise ValueError(
                f"max_distance must be a finite number >= 0, got {gate!r}; "
                "0 accepts identical features only"
            )
        object.__setattr__(self, "max_distance", float(gate))
        if not isinstance(self.crop, bool):
            raise ValueError(
                f"crop must be true or false, got {self.crop!r}; false serves equal lengths only"
            )


@dataclass(frozen=True)
class Plan:
    """The source and gate of every layer of a model.

    Attributes:
        feature_layer: layer whose input the feature is taken from; not after the first reused
            layer, which needs the match.
        layers: one `LayerPlan` per layer, in order.

    Raises:
        ValueError: no layers, or the feature layer does not exist or comes too late.
    """

    feature_layer: int
    layers: tuple[LayerPlan, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError(f"a plan must have at least one layer, got {self.layers!r}")
        layer = self.feature_layer
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise ValueError(f"feature_layer must be an integer, got {layer!r}; 0 is the first")
        last = len(self.layers) - 1 if self.first_reused is None else self.first_reused
        if not 0 <= layer <= last:
            raise ValueError(
                f"feature_layer must be in 0..{last}, not after the first reused layer, "
                f"got {layer!r}; take the feature earlier or reuse later layers"
            )

    @property
    def reused_layers(self) -> tuple[int, ...]:
        """Indices of the `cached` layers, ascending."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.source == "cached")

    @property
    def first_reused(self) -> int | None:
        """The first `cached` layer, None if every layer is exact."""
        return next(iter(self.reused_layers), None)

    @classmethod
    def reusing(
        cls,
        num_layers: int,
        layers: Iterable[int],
        max_distance: float,
        feature_layer: int = 0,
        crop: bool = False,
    ) -> Plan:
        """A plan that reuses `layers` (indices), all behind one gate and all cropping or none.

        Raises:
            ValueError: a layer is not in `0..num_layers - 1`, or as for `Plan`.
        """
        reused = set(layers)
        if unknown := reused - set(range(num_layers)):
            raise ValueError(
                f"reused layers must be in 0..{num_layers - 1}, got {sorted(unknown)!r}; "
                "count the model's layers from 0"
            )
        exact, cached = LayerPlan("exact"), LayerPlan("cached", max_distance, crop)
        return cls(
            feature_layer, tuple(cached if i in reused else exact for i in range(num_layers))
        )

    @classmethod
    def last_third(
        cls, num_layers: int, max_distance: float, feature_layer: int = 0, crop: bool = False
    ) -> Plan:
        """A plan that reuses the last third of the layers (at least one), the cheapest to lose.

        Raises:
            ValueError: as for `Plan`.
        """
        first = num_layers - max(1, num_layers // 3)
        return cls.reusing(num_layers, range(first, num_layers), max_distance, feature_layer, crop)

    def to_dict(self) -> dict[str, Any]:
        """Plain ints, floats, strings, lists and dicts; `from_dict` reads it back."""
        return {
            "feature_layer": self.feature_layer,
            "layers": [asdict(layer) for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, data: object) -> Plan:
        """Read a plan from a store or a file; nothing about `data` is trusted.

        Raises:
            ValueError: a key is missing or unknown, or a value has the wrong type or range.
        """
        fields = _fields("a plan", data, {"feature_layer", "layers"})
        if not isinstance(fields["layers"], list | tuple):
            raise ValueError(
                f"a plan's layers must be a list, got {fields['layers']!r}; give one per layer"
            )
        layers = [
            LayerPlan(**_fields(f"layer {i} of a plan", layer, {"source", "max_distance", "crop"}))
            for i, layer in enumerate(fields["layers"])
        ]
        return cls(fields["feature_layer"], tuple(layers))


def _fields(what: str, data: object, names: set[str]) -> Mapping[str, Any]:
    if not isinstance(data, Mapping) or set(data) != names:
        raise ValueError(
            f"{what} must be a mapping with exactly the keys {sorted(names)}, got {data!r}; "
            "calibrate again or correct the plan"
        )
    return data
