# SPDX-License-Identifier: Apache-2.0
"""Which KV groups of which layers take a map that was not computed, from where, and when."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

Source = Literal["aligned", "prefix", "neighbour", "template"]

# A sequence is served from an entry that shares its tokens, else from one whose feature is near,
# else from templates.
#   aligned    rows whose token has a counterpart in the entry; the others are computed
#   prefix     rows of the common prefix only, in layers that are not `aligned`: in a causal model
#              they are exact by construction
#   neighbour  the entry with the nearest feature (AttnCache, arXiv 2510.25979)
#   template   the mean map of a corpus, which serves any text
SOURCES: tuple[Source, ...] = get_args(Source)


@dataclass(frozen=True)
class SourcePlan:
    """What one source serves.

    Attributes:
        groups: per layer, the KV heads whose query heads take their maps from the source,
            ascending; empty where the layer is exact.
        gate: `aligned`: largest novelty (see `Alignment.novelty`); `neighbour`: largest feature
            distance (L2); `prefix` and `template` have no gate and do not read it.
        corrected: layers whose served heads pass a fitted linear correction, ascending.
        errors: per layer mean and standard deviation of the relative error of a text's served
            heads when the layer's input is exact, as calibration measured it; canaries compare
            with it. Empty where nothing was measured.
        dropped: per layer the share of what a row has beside its largest probability that its map
            may lose to be smaller and faster (see `TiledMap.pruned`); empty is none anywhere.

    Raises:
        ValueError: numbers out of order or range, or a corrected layer that serves nothing.
    """

    groups: tuple[tuple[int, ...], ...]
    gate: float = 0.0
    corrected: tuple[int, ...] = ()
    errors: tuple[tuple[float, float], ...] = ()
    dropped: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for layer, groups in enumerate(self.groups):
            if not _ascending(groups):
                raise ValueError(
                    f"the KV groups of layer {layer} must be different numbers from 0 in "
                    f"ascending order, got {groups!r}; calibrate again or correct the plan"
                )
        if not _ascending(self.corrected) or not set(self.corrected) <= set(self.layers):
            raise ValueError(
                f"corrected layers must be layers that serve, {self.layers!r}, in ascending order, "
                f"got {self.corrected!r}; calibrate again or correct the plan"
            )
        if not _is_measure(self.gate):
            raise ValueError(
                f"a gate must be a finite number >= 0, got {self.gate!r}; "
                "0 accepts only what is as close as can be"
            )
        object.__setattr__(self, "gate", float(self.gate))
        if self.errors and (
            len(self.errors) != len(self.groups)
            or not all(len(pair) == 2 and all(map(_is_measure, pair)) for pair in self.errors)
        ):
            raise ValueError(
                "errors must be a mean and a standard deviation for each layer, finite and >= 0, "
                f"got {self.errors!r}; calibrate again"
            )
        if self.dropped and (
            len(self.dropped) != len(self.groups)
            or not all(_is_measure(share) and share < 1 for share in self.dropped)
        ):
            raise ValueError(
                f"dropped must be a share below 1 for each layer, got {self.dropped!r}; "
                "calibrate again"
            )

    def dropped_in(self, layer: int) -> float:
        """The share that maps of the layer may lose."""
        return self.dropped[layer] if self.dropped else 0.0

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of which at least one KV group is served, ascending."""
        return tuple(layer for layer, groups in enumerate(self.groups) if groups)


@dataclass(frozen=True)
class Plan:
    """What every source serves in a model.

    Attributes:
        feature_layer: layer whose input the feature is taken from, and at which the lookup starts;
            not after the first layer that a source serves.
        num_layers: layers of the model.
        sources: those that serve something.

    Raises:
        ValueError: no layers, a source that is unknown or of another number of layers, a layer
            that is aligned and served from a prefix, or a feature layer that does not exist or
            comes too late.
    """

    feature_layer: int
    num_layers: int
    sources: Mapping[Source, SourcePlan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_layers", "feature_layer"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be an integer, got {value!r}")
        if self.num_layers < 1:
            raise ValueError(f"a plan must have at least one layer, got {self.num_layers!r}")
        for source, part in self.sources.items():
            if source not in SOURCES:
                raise ValueError(
                    f"a source must be one of {SOURCES}, got {source!r}; "
                    "calibrate again or correct the plan"
                )
            if len(part.groups) != self.num_layers or not part.layers:
                raise ValueError(
                    f"source {source!r} must list the KV groups of each of {self.num_layers} "
                    f"layers and serve at least one, got {part.groups!r}; leave it out otherwise"
                )
        both = {"aligned", "prefix"} <= set(self.sources)
        if both and set(self.sources["aligned"].layers) & set(self.sources["prefix"].layers):
            raise ValueError(
                f"a layer must not be both aligned, {self.sources['aligned'].layers!r}, and served "
                f"from a prefix, got {self.sources['prefix'].layers!r}; what is aligned is served "
                "from a prefix too"
            )
        last = self.reused_layers[0] if self.reused_layers else self.num_layers - 1
        if not 0 <= self.feature_layer <= last:
            raise ValueError(
                f"feature_layer must be in 0..{last}, not after the first reused layer, "
                f"got {self.feature_layer!r}; take the feature earlier or reuse later layers"
            )

    @property
    def reused_layers(self) -> tuple[int, ...]:
        """Layers that any source serves, ascending."""
        return tuple(sorted({layer for part in self.sources.values() for layer in part.layers}))

    @classmethod
    def reusing(
        cls,
        num_layers: int,
        num_kv_heads: int,
        layers: Iterable[int],
        max_distance: float,
        feature_layer: int = 0,
    ) -> Plan:
        """The published rule: whole `layers` from the nearest entry, behind one gate.

        Raises:
            ValueError: a layer is not in `0..num_layers - 1`, or as for `Plan`.
        """
        reused = set(layers)
        if unknown := reused - set(range(num_layers)):
            raise ValueError(
                f"reused layers must be in 0..{num_layers - 1}, got {sorted(unknown)!r}; "
                "count the model's layers from 0"
            )
        every = tuple(range(num_kv_heads))
        groups = tuple(every if layer in reused else () for layer in range(num_layers))
        return cls(feature_layer, num_layers, {"neighbour": SourcePlan(groups, max_distance)})

    def to_dict(self) -> dict[str, Any]:
        """Plain ints, floats, strings, lists and dicts; `from_dict` reads it back."""
        sources = {}
        for source, part in self.sources.items():
            fields = asdict(part)
            fields["groups"] = [list(groups) for groups in part.groups]
            fields["corrected"] = list(part.corrected)
            fields["errors"] = [list(pair) for pair in part.errors]
            fields["dropped"] = list(part.dropped)
            sources[source] = fields
        return {
            "feature_layer": self.feature_layer,
            "num_layers": self.num_layers,
            "sources": sources,
        }

    @classmethod
    def from_dict(cls, data: object) -> Plan:
        """Read a plan from a store or a file; nothing about `data` is trusted.

        Raises:
            ValueError: a key is missing or unknown, or a value has the wrong type or range.
        """
        fields = _fields("a plan", data, {"feature_layer", "num_layers", "sources"})
        if not isinstance(fields["sources"], Mapping):
            raise ValueError(
                f"a plan's sources must be a mapping, got {fields['sources']!r}; "
                "give each source that serves something"
            )
        sources = {}
        for source, part in fields["sources"].items():
            given = _fields(
                f"source {source!r}", part, {"groups", "gate", "corrected", "errors", "dropped"}
            )
            sources[source] = SourcePlan(
                tuple(_numbers("KV groups", item) for item in _list("groups", given["groups"])),
                given["gate"],
                _numbers("corrected layers", given["corrected"]),
                tuple(tuple(_list("a layer's error", e)) for e in _list("errors", given["errors"])),
                tuple(_list("dropped", given["dropped"])),
            )
        return cls(fields["feature_layer"], fields["num_layers"], sources)


def last_third(num_layers: int) -> range:
    """The last third of the layers (at least one), the cheapest to lose."""
    return range(num_layers - max(1, num_layers // 3), num_layers)


def _is_measure(value: object) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and 0 <= value <= sys.float_info.max
    )


def _ascending(numbers: tuple[int, ...]) -> bool:
    return all(number >= 0 for number in numbers) and list(numbers) == sorted(set(numbers))


def _list(what: str, value: object) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{what} must be a list, got {value!r}; correct the plan")
    return value


def _numbers(what: str, value: object) -> tuple[int, ...]:
    numbers = _list(what, value)
    if any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        raise ValueError(f"{what} must be integers, got {value!r}; correct the plan")
    return tuple(numbers)


def _fields(what: str, data: object, names: set[str]) -> Mapping[str, Any]:
    if not isinstance(data, Mapping) or set(data) != names:
        raise ValueError(
            f"{what} must be a mapping with exactly the keys {sorted(names)}, got {data!r}; "
            "calibrate again or correct the plan"
        )
    return data
