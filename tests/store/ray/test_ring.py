# SPDX-License-Identifier: Apache-2.0
"""Which shards keep an entry, and what moves when there are more or fewer of them."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attncache_vllm.store.ray.ring import entry_id, owners

IDS = st.integers(0, (1 << 63) - 1)
SAMPLE = [entry_id("", bytes([number >> 8, number & 255] * 16)) for number in range(4000)]


@given(IDS, st.integers(1, 12), st.data())
def test_owners_are_different_shards_and_more_replicas_come_after_fewer(
    number: int, shards: int, data: st.DataObject
) -> None:
    replicas = data.draw(st.integers(1, shards))
    found = owners(number, shards, replicas)
    assert len(set(found)) == replicas
    assert set(found) <= set(range(shards))
    assert found == owners(number, shards, shards)[:replicas]


@given(IDS, st.integers(1, 12), st.data())
def test_another_shard_takes_entries_and_moves_none_between_the_others(
    number: int, shards: int, data: st.DataObject
) -> None:
    replicas = data.draw(st.integers(1, shards))
    before, after = owners(number, shards, replicas), owners(number, shards + 1, replicas)
    if shards in after:
        assert set(after) - {shards} <= set(before)
    else:
        assert after == before


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_a_new_shard_gets_about_its_share(shards: int) -> None:
    moved = sum(owners(number, shards) != owners(number, shards + 1) for number in SAMPLE)
    assert moved / len(SAMPLE) == pytest.approx(1 / (shards + 1), rel=0.35)


def test_shards_get_about_the_same() -> None:
    counts = Counter(owners(number, 4)[0] for number in SAMPLE)
    assert set(counts) == {0, 1, 2, 3}
    assert max(counts.values()) < 1.35 * len(SAMPLE) / 4


def test_places_never_change() -> None:
    """Entries lie where they lie: a change of the rule is a new ``ring.VERSION``."""
    ids = entry_id("", bytes(32)), entry_id("a11ce0", bytes(32))
    assert ids == (4597699237684259685, 5502747568213080826)
    sample = [owners(entry_id("", bytes([number] * 32)), 5, 2) for number in range(4)]
    assert sample == [(1, 4), (0, 2), (1, 0), (0, 2)]


@pytest.mark.parametrize(("shards", "replicas"), [(0, 1), (2, 3), (2, 0), (1 << 20, 1)])
def test_impossible_numbers_are_refused(shards: int, replicas: int) -> None:
    with pytest.raises(ValueError, match="replicas must be 1 to the number of shards"):
        owners(7, shards, replicas)


def test_an_id_is_of_tenant_and_sequence() -> None:
    ids = {entry_id(tenant, digest) for tenant in ("", "aa", "bb") for digest in (b"x", b"y")}
    assert len(ids) == 6
    assert all(0 <= number < 1 << 63 for number in ids)
