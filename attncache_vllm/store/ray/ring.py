# SPDX-License-Identifier: Apache-2.0
"""Who an entry is and which shards keep it: consistent hashing (Karger et al., STOC 1997).

Every shard has many points on a circle, and an entry belongs to the shards whose points come next
after its own. A shard more takes its share of entries from all others and moves none between them.
"""

import bisect
import hashlib
from functools import lru_cache

VERSION = 1
"""Of the rule by which ``owners`` goes: servers and shards that disagree would look past each
other."""

_POINTS = 128  # of a shard; the shares of shards then differ by about a tenth
_MAX_SHARDS = 1 << 12


def entry_id(tenant: str, token_hash: bytes) -> int:
    """The id, 0 to 2**63 - 1, of the sequence ``token_hash`` of a tenant.

    It follows from the contents: on every shard, before and after a restart, it is the same, and
    two tenants' entries for one text have different ids.
    """
    return _place(tenant.encode() + b"\0" + token_hash)


def owners(entry_id: int, shards: int, replicas: int = 1) -> tuple[int, ...]:
    """The ``replicas`` different shards, of 0 to ``shards - 1``, that keep an entry, primary first.

    Raises:
        ValueError: there are fewer shards than replicas, or no shard at all.
    """
    if not 1 <= replicas <= shards <= _MAX_SHARDS:
        raise ValueError(
            f"replicas must be 1 to the number of shards, which is 1 to {_MAX_SHARDS}, "
            f"got {replicas!r} replicas on {shards!r} shards"
        )
    places, shard_at = _circle(shards)
    at = bisect.bisect_left(places, entry_id)
    found: list[int] = []
    while len(found) < replicas:
        shard = shard_at[at % len(places)]
        if shard not in found:
            found.append(shard)
        at += 1
    return tuple(found)


@lru_cache(maxsize=16)
def _circle(shards: int) -> tuple[list[int], list[int]]:
    """The places of all shards' points, ascending, and the shard that each is of."""
    points = sorted(
        (_place(f"{shard}/{number}".encode()), shard)
        for shard in range(shards)
        for number in range(_POINTS)
    )
    return [place for place, _ in points], [shard for _, shard in points]


def _place(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1
