# SPDX-License-Identifier: Apache-2.0
"""On which machine a shard lives: where its entries are, if folders are not shared by machines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_PREFIX = "shard-"


@dataclass(frozen=True)
class Machine:
    """A machine that shards can live on.

    Attributes:
        address: what Ray calls it, before and after it was restarted.
        cpus: cores that its nodes have.
        kept: the shards that have a folder there, and when it was written to last, in seconds.
    """

    address: str
    cpus: float
    kept: Mapping[int, float]


def folder_of(folder: Path, shard: int) -> Path:
    """Where a shard has its entries, below the folder of all shards of a machine."""
    return folder / f"{_PREFIX}{shard}"


def kept_in(folder: Path) -> dict[int, float]:
    """The shards that have a folder below ``folder``, and when it was written to last; see
    ``Machine``."""
    found = {}
    for own in folder.glob(f"{_PREFIX}*"):
        number = own.name.removeprefix(_PREFIX)
        if number.isdecimal() and own.is_dir():
            found[int(number)] = max(path.stat().st_mtime for path in (own, *own.iterdir()))
    return found


def homes(shards: Sequence[int], machines: Sequence[Machine], num_cpus: float) -> dict[int, str]:
    """The address of the machine that each shard is to live on, and to come back to.

    That is where its folder is, or was written to last if there are several. Of machines that are
    alike in this, for a shard without a folder of all, it is the one with most cores left.

    Args:
        shards: their numbers, all that the machines are to have room for.
        machines: at least one, with different addresses.
        num_cpus: cores that a shard takes.
    """

    def written(shard: int) -> float:
        return max(machine.kept.get(shard, -math.inf) for machine in machines)

    found: dict[int, str] = {}
    given: Counter[str] = Counter()
    # Those with a folder first: the others go where they leave room.
    for shard in sorted(shards, key=lambda shard: (written(shard) == -math.inf, shard)):
        alike = [m for m in machines if m.kept.get(shard, -math.inf) == written(shard)]
        best = min(
            alike,
            key=lambda m: (num_cpus * given[m.address] - m.cpus, given[m.address], m.address),
        )
        found[shard] = best.address
        given[best.address] += 1
    return found
