# SPDX-License-Identifier: Apache-2.0
"""Shards live where their entries are, and else where there is room."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attncache_vllm.store.ray.machines import Machine, folder_of, homes, kept_in

FOUR = range(4)


def machine(address: str, cpus: float = 4.0, **kept: float) -> Machine:
    return Machine(address, cpus, {int(name[1:]): written for name, written in kept.items()})


def test_new_shards_are_spread_over_the_cores() -> None:
    alike = [machine("a"), machine("b")]
    assert Counter(homes(FOUR, alike, 1.0).values()) == {"a": 2, "b": 2}
    unlike = [machine("a", 2.0), machine("b", 8.0)]
    assert Counter(homes(range(5), unlike, 2.0).values()) == {"a": 1, "b": 4}
    assert Counter(homes(FOUR, alike, 0.0).values()) == {"a": 2, "b": 2}, "they may take none"


def test_a_shard_comes_back_to_its_folder_however_many_are_there() -> None:
    machines = [machine("a", s0=5.0, s1=5.0, s2=5.0), machine("b"), machine("c")]
    found = homes(FOUR, machines, 2.0)
    assert [found[shard] for shard in range(3)] == ["a"] * 3
    assert found[3] != "a"


def test_of_several_folders_the_one_that_was_written_to_last_counts() -> None:
    machines = [machine("a", s0=5.0, s1=9.0), machine("b", s0=6.0, s1=8.0)]
    assert homes([0, 1], machines, 1.0) == {0: "b", 1: "a"}


def test_shards_in_a_folder_that_machines_share_are_spread() -> None:
    kept = {f"s{shard}": 7.0 for shard in FOUR}
    found = homes(FOUR, [machine("a", **kept), machine("b", **kept)], 1.0)
    assert Counter(found.values()) == {"a": 2, "b": 2}


@given(
    st.lists(
        st.builds(
            Machine,
            st.uuids().map(str),
            st.floats(0, 64),
            st.dictionaries(st.integers(0, 9), st.floats(0, 1e9)),
        ),
        min_size=1,
        max_size=5,
    ),
    st.sets(st.integers(0, 9)),
    st.floats(0, 8),
)
def test_every_shard_has_one_home_and_an_only_folder_is_it(
    machines: list[Machine], shards: set[int], num_cpus: float
) -> None:
    found = homes(sorted(shards), machines, num_cpus)
    assert found.keys() == shards
    assert found == homes(sorted(shards), machines[::-1], num_cpus)
    for shard, address in found.items():
        keeping = {machine.address for machine in machines if shard in machine.kept}
        assert address in (keeping or {machine.address for machine in machines})


def test_folders_of_shards_are_found_with_the_time_of_the_last_change(tmp_path: Path) -> None:
    for shard, written in ((0, 100.0), (12, 300.0)):
        own = folder_of(tmp_path, shard)
        (own / "edition").mkdir(parents=True)
        os.utime(own / "edition", (written, written))
        os.utime(own, (50.0, 50.0))
    (tmp_path / "shard-x").mkdir()
    (tmp_path / "shard-3").write_text("no folder")
    assert kept_in(tmp_path) == pytest.approx({0: 100.0, 12: 300.0})
    assert kept_in(tmp_path / "absent") == {}
