# SPDX-License-Identifier: Apache-2.0
"""Moving entries to another placement, while servers go on looking them up."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attncache_vllm.errors import StoreError
from attncache_vllm.store.index import Ids
from attncache_vllm.store.ray.fanout import Fanout
from attncache_vllm.store.ray.placement import Placement

# Servers look at the placement every five seconds, and a look takes two at most.
ADOPTION_SECONDS = 8.0

_PAGE = 65_536
# Entries of one call: a few hundred MiB at the worst, in the memory of three processes.
_BATCH = 16
_SECONDS = 120.0


@dataclass(frozen=True)
class Moved:
    """Entries copied to shards that lacked them, and removed where they have no business any more.

    ``stranded`` are those that no owner took; they stay where they are.
    """

    copied: int
    removed: int
    stranded: int


def move(
    fanout: Fanout,
    target: Placement,
    *,
    report: Callable[[str], None] = lambda step: None,
    adoption_seconds: float = ADOPTION_SECONDS,
) -> Moved:
    """Copy every entry to the shards that hold it by ``target``, change over, and only then remove
    what nobody looks for. Cut off at any point, it goes on when called again.

    Args:
        fanout: to all shards of both placements, which must run.
        target: a later generation than that of the shards.
        report: told what is being done.
        adoption_seconds: what servers take to notice.

    Raises:
        StoreError: a shard does not answer, or has no room; then nothing was removed.
    """
    shards = range(max(fanout.placement.shards, target.shards))
    share_editions(fanout, shards)
    report("copying entries")
    copied, stranded = _copy(fanout, target, shards)
    if stranded:
        raise StoreError(
            f"every entry must find room in its new shards, got {stranded} that did not; nothing "
            "was removed. Raise shard_mib, or add shards"
        )
    report("changing over")
    fanout.every("place", target.to_dict(), shards=shards, deadline=_soon())
    time.sleep(adoption_seconds)
    # What servers have put meanwhile, by the placement that they knew.
    report("copying what came meanwhile")
    more, stranded = _copy(fanout, target, shards)
    report("removing")
    return Moved(copied + more, _remove(fanout, target, shards), stranded)


def share_editions(fanout: Fanout, shards: Sequence[int]) -> None:
    """Publish in every shard what any of them has, so that each can keep entries of it."""
    listed = fanout.every("editions", deadline=_soon(), shards=shards)
    homes: dict[str, int] = {}
    current = set()
    for shard, editions in listed.items():
        for digest, about in editions.items():
            homes.setdefault(digest, shard)
            if about["current"]:
                current.add(digest)
    # Those that are current last: publishing makes them so.
    for digest in sorted(homes, key=lambda digest: (digest in current, digest)):
        lacking = [shard for shard, editions in listed.items() if digest not in editions]
        if lacking:
            home = homes[digest]
            data = fanout.every("edition", digest, deadline=_soon(), shards=[home])[home]
            fanout.every("publish", data, deadline=_soon(), shards=lacking)


def entries(fanout: Fanout, shard: int, edition: str, tenant: str | None = None) -> Ids:
    """The ids of all entries that a shard has of an edition (and tenant), ascending."""
    pages = [np.empty(0, dtype=np.int64)]
    while True:
        after = int(pages[-1][-1]) if len(pages[-1]) else -1
        page = fanout.every("ids", edition, tenant, after, _PAGE, deadline=_soon(), shards=[shard])[
            shard
        ]
        pages.append(page)
        if len(page) < _PAGE:
            return np.concatenate(pages)


def exported(
    fanout: Fanout, shard: int, edition: str, ids: Sequence[int]
) -> Iterator[tuple[int, Any]]:
    """Id and ``Exported`` of each entry that a shard still has and that is sound."""
    for start in range(0, len(ids), _BATCH):
        batch = [int(entry_id) for entry_id in ids[start : start + _BATCH]]
        answer = fanout.every("export", edition, batch, deadline=_soon(), shards=[shard])[shard]
        yield from ((i, entry) for i, entry in zip(batch, answer, strict=True) if entry is not None)


def _editions(fanout: Fanout, shards: Sequence[int]) -> list[str]:
    listed = fanout.every("editions", deadline=_soon(), shards=shards)
    return sorted({digest for editions in listed.values() for digest in editions})


def _copy(fanout: Fanout, target: Placement, shards: Sequence[int]) -> tuple[int, int]:
    """Give owners what they lack; how many copies were made, and how many refused."""
    copied = refused = 0
    for edition in _editions(fanout, shards):
        has = {shard: set(entries(fanout, shard, edition).tolist()) for shard in shards}
        # From one of those who have it, to all who lack it.
        lacking: dict[int, dict[int, list[int]]] = defaultdict(dict)
        for home, ids in has.items():
            for entry_id in ids:
                owners = [s for s in target.owners(entry_id) if entry_id not in has[s]]
                if owners and home == min(s for s in shards if entry_id in has[s]):
                    lacking[home][entry_id] = owners
        for home, wanted in lacking.items():
            for batch in _batches(exported(fanout, home, edition, sorted(wanted))):
                for shard in sorted({s for entry_id, _ in batch for s in wanted[entry_id]}):
                    own = [(i, entry) for i, entry in batch if shard in wanted[i]]
                    said = _put(fanout, shard, edition, own)
                    kept = sum(not outcome.startswith("refused") for outcome in said)
                    copied += kept
                    refused += len(said) - kept
    return copied, refused


def _put(fanout: Fanout, shard: int, edition: str, batch: Sequence[tuple[int, Any]]) -> list[str]:
    said: list[str] = []
    for tenant in sorted({entry.tenant for _, entry in batch}):
        own = [entry for _, entry in batch if entry.tenant == tenant]
        said += fanout.every(
            "put",
            edition,
            tenant,
            np.stack([entry.feature for entry in own]),
            [entry.record for entry in own],
            [entry.age_s for entry in own],
            deadline=_soon(),
            shards=[shard],
        )[shard]
    return said


def _remove(fanout: Fanout, target: Placement, shards: Sequence[int]) -> int:
    """Have shards forget what they do not own and all owners have; how many that were."""
    removed = 0
    for edition in _editions(fanout, shards):
        has = {shard: set(entries(fanout, shard, edition).tolist()) for shard in shards}
        for shard, ids in has.items():
            foreign = [
                entry_id
                for entry_id in sorted(ids)
                if shard not in (owners := target.owners(entry_id))
                and all(entry_id in has[owner] for owner in owners)
            ]
            if foreign:
                answer = fanout.every("remove", edition, foreign, deadline=_soon(), shards=[shard])
                removed += answer[shard]
    return removed


def _batches(items: Iterator[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _soon() -> float:
    return time.monotonic() + _SECONDS
