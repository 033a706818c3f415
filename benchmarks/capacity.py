# SPDX-License-Identifier: Apache-2.0
"""What a fleet of servers asks of its shards: ``python -m benchmarks.capacity --servers 1000``.

Arithmetic only; docs/scaling.md says what it rests on. Two figures have to be measured on the
machines in question, and without them the rows that need them say so: how long a shard works on a
call (``--lookup-call-ms``), and how fast one server gets the maps of a hit (``--load-mbps``).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

MB = 1e6
MIB = 1 << 20

# Of a shard's memory, in bytes. Features are kept to decide by, and in float16 by faiss; a sketch
# value as it came, sorted, and with the row it is of. The rest of a row is ids, lengths and ends.
_FEATURE_VALUE = 4 + 2
_SKETCH_VALUE = 3 * 8
_ROW = 80
# Python's objects of an entry: tracemalloc over 20,000 of them, with an age to expire at.
_OBJECTS = 700


@dataclass(frozen=True)
class Fleet:
    """Servers in cells, each with shards of its own; all figures of shards are those of one cell.

    Attributes:
        servers: of all cells together.
        cell: servers that share a set of shards.
        steps_per_s: of one server.
        sequences: in one step.
        hit_share: sequences that some entry serves.
        questions: searches in a step that go to every shard: by sketch and by feature.
        entries: in one cell, each counted once.
        popularity: exponent of Zipf's law by which entries are hit; 0 is all alike.
        layers: that are reused, with the heads and tokens of an entry.
        heads: of a layer.
        tokens: of an entry.
        tile_share: bytes of a stored map by those of its dense bfloat16 square.
        features: values of a feature.
        sketch: values of a sketch.
        shards: of one cell.
        replicas: shards that hold an entry.
        resident_mib: what a server keeps in memory.
        utilisation: share of its time that the part of a shard that answers may be busy.
        lookup_call_ms: what a shard works on one search of a step, measured.
        load_mbps: MB a second at which one server gets maps it does not have, measured.
    """

    servers: int = 1000
    cell: int = 50
    steps_per_s: float = 2.7
    sequences: float = 1.0
    hit_share: float = 0.3
    questions: int = 2
    entries: int = 10_000
    popularity: float = 1.0
    layers: int = 30
    heads: int = 9
    tokens: int = 512
    tile_share: float = 0.29
    features: int = 128
    sketch: int = 64
    shards: int = 4
    replicas: int = 2
    resident_mib: int = 4096
    utilisation: float = 0.5
    lookup_call_ms: float | None = None
    load_mbps: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a number >= 0, got {value!r}")
        for name in ("servers", "cell", "steps_per_s", "entries", "tokens", "shards", "replicas"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)!r}")
        for name in ("hit_share", "utilisation"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} must be at most 1, got {getattr(self, name)!r}")
        if self.replicas > self.shards:
            raise ValueError(
                f"replicas must be at most the {self.shards} shards, got {self.replicas!r}"
            )

    @property
    def cells(self) -> int:
        return math.ceil(self.servers / self.cell)

    # -- room ---------------------------------------------------------------------------------

    @property
    def entry_bytes(self) -> float:
        """Of a file, as of the maps in a server's memory: layers * heads * L^2 * 2 * share."""
        return self.layers * self.heads * self.tokens**2 * 2 * self.tile_share

    @property
    def shard_entries(self) -> float:
        return self.entries * self.replicas / self.shards

    @property
    def shard_disk(self) -> float:
        return self.shard_entries * self.entry_bytes

    @property
    def entry_memory(self) -> float:
        """What a shard has in memory of an entry, wherever its maps are."""
        return _FEATURE_VALUE * self.features + _SKETCH_VALUE * self.sketch + _ROW + _OBJECTS

    @property
    def shard_memory(self) -> float:
        return self.shard_entries * self.entry_memory

    # -- searches -----------------------------------------------------------------------------

    @property
    def shard_calls(self) -> float:
        """Searches a second that each shard hears. More shards make no fewer: all hear all."""
        return min(self.cell, self.servers) * self.steps_per_s * self.questions

    @property
    def shard_cores(self) -> float | None:
        """Cores of a shard that searching takes."""
        return None if self.lookup_call_ms is None else self.shard_calls * self.lookup_call_ms / 1e3

    @property
    def largest_cell(self) -> int | None:
        """Servers that shards of this many entries can hear out, one search after the other."""
        if not self.lookup_call_ms or not self.questions:
            return None
        return int(
            self.utilisation * 1e3 / (self.lookup_call_ms * self.questions * self.steps_per_s)
        )

    # -- loads --------------------------------------------------------------------------------

    @property
    def resident_entries(self) -> int:
        return min(self.entries, int(self.resident_mib * MIB / self.entry_bytes))

    @property
    def resident_share(self) -> float:
        """Hits whose maps a server has, if it has those of the entries that are hit most."""
        return _zipf(self.resident_entries, self.popularity) / _zipf(self.entries, self.popularity)

    @property
    def cold_loads(self) -> float:
        """Of one server, a second."""
        return self.steps_per_s * self.sequences * self.hit_share * (1 - self.resident_share)

    @property
    def server_load(self) -> float:
        """Bytes a second that come into one server."""
        return self.cold_loads * self.entry_bytes

    @property
    def shard_load(self) -> float:
        """Bytes a second that leave one shard."""
        return self.cell_load / self.shards

    @property
    def cell_load(self) -> float:
        """Bytes a second of all servers of a cell; by Ray Client all pass the head, in and out."""
        return min(self.cell, self.servers) * self.server_load

    @property
    def load_ms(self) -> float | None:
        """From asking for one entry to having it."""
        return None if not self.load_mbps else self.entry_bytes / MB / self.load_mbps * 1e3

    def rows(self) -> Iterator[tuple[str, str]]:
        """What to print: a quantity and its value."""
        no_call, no_load = "needs --lookup-call-ms", "needs --load-mbps"
        cores, largest, load_ms = self.shard_cores, self.largest_cell, self.load_ms
        yield "an entry", f"{self.entry_bytes / MB:.1f} MB"
        yield "an entry in a shard's memory", f"{self.entry_memory / 1e3:.1f} kB"
        yield "cells", f"{self.cells}"
        yield "files of a shard", f"{self.shard_disk / 1e9:.1f} GB"
        yield "memory of a shard", f"{self.shard_memory / 1e9:.3f} GB"
        yield "files of all cells", f"{self.cells * self.shards * self.shard_disk / 1e12:.2f} TB"
        yield "searches a second, each shard", f"{self.shard_calls:.0f}"
        yield "cores for them, each shard", no_call if cores is None else f"{cores:.2f}"
        yield "largest cell", no_call if largest is None else f"{largest} servers"
        yield "entries resident in a server", f"{self.resident_entries}"
        yield "hits that are resident", f"{self.resident_share:.0%}"
        yield "cold loads a second, each server", f"{self.cold_loads:.2f}"
        yield "a cold load", no_load if load_ms is None else f"{load_ms:.0f} ms"
        yield "into a server", f"{self.server_load / MB:.1f} MB/s"
        yield "out of a shard", f"{self.shard_load / MB:.0f} MB/s"
        yield "through the head, by Ray Client", f"{2 * self.cell_load / MB:.0f} MB/s"


def _zipf(most: int, exponent: float) -> float:
    """Weight of the entries of rank 1 to ``most`` under Zipf's law, up to a factor."""
    return math.fsum(rank**-exponent for rank in range(1, most + 1))


def parser() -> argparse.ArgumentParser:
    """One option for each attribute of ``Fleet``."""
    options = argparse.ArgumentParser(description=__doc__)
    for field in dataclasses.fields(Fleet):
        options.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=int if isinstance(field.default, int) else float,
            default=field.default,
            help=f"default: {field.default}",
        )
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parser()
    try:
        fleet = Fleet(**vars(options.parse_args(arguments)))
    except ValueError as error:
        options.error(str(error))
    table = Table("quantity", "value")
    for row in fleet.rows():
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
