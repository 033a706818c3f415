# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of docs/scaling.md."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.capacity import MIB, Fleet, main, parser

PAGE = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text()
FLEET = Fleet(lookup_call_ms=2.0, load_mbps=1000.0)


def test_an_entry_has_the_bytes_of_its_squares() -> None:
    assert FLEET.entry_bytes == pytest.approx(30 * 9 * 512 * 512 * 2 * 0.29)
    assert replace(FLEET, tokens=1024).entry_bytes == pytest.approx(4 * FLEET.entry_bytes)


def test_every_shard_hears_every_search_however_many_there_are() -> None:
    assert FLEET.shard_calls == pytest.approx(50 * 2.7 * 2)
    assert replace(FLEET, shards=16).shard_calls == FLEET.shard_calls
    assert replace(FLEET, cell=25).shard_calls == pytest.approx(FLEET.shard_calls / 2)


def test_a_cell_of_the_largest_size_takes_the_share_of_a_core_it_may() -> None:
    largest = FLEET.largest_cell
    assert largest == int(500 / (2 * 2 * 2.7))
    at_most, beyond = (replace(FLEET, cell=cell).shard_cores for cell in (largest, largest + 1))
    assert at_most is not None and beyond is not None
    assert at_most <= FLEET.utilisation < beyond


def test_more_shards_share_files_memory_and_loads() -> None:
    more = replace(FLEET, shards=2 * FLEET.shards)
    for name in ("shard_disk", "shard_memory", "shard_load"):
        assert getattr(more, name) == pytest.approx(getattr(FLEET, name) / 2)
    assert more.cell_load == FLEET.cell_load


def test_replicas_take_room_and_nothing_else() -> None:
    one = replace(FLEET, replicas=1)
    assert FLEET.shard_disk == pytest.approx(2 * one.shard_disk)
    assert FLEET.shard_memory == pytest.approx(2 * one.shard_memory)
    assert (FLEET.shard_calls, FLEET.cell_load) == (one.shard_calls, one.cell_load)


def test_what_is_resident_is_not_loaded() -> None:
    all_of_it = replace(FLEET, entries=50, resident_mib=int(50 * FLEET.entry_bytes / MIB) + 1)
    assert (all_of_it.resident_share, all_of_it.cold_loads) == (1, 0)
    none = replace(FLEET, resident_mib=1)
    assert (none.resident_share, none.cold_loads) == (0, pytest.approx(2.7 * 0.3))
    alike = replace(FLEET, popularity=0)
    assert alike.resident_share == pytest.approx(FLEET.resident_entries / FLEET.entries)
    assert FLEET.resident_share > alike.resident_share


def test_a_cold_load_takes_as_long_as_its_bytes() -> None:
    assert FLEET.load_ms == pytest.approx(FLEET.entry_bytes / 1e6)
    assert FLEET.server_load == pytest.approx(FLEET.cold_loads * FLEET.entry_bytes)


def test_cells_cover_the_fleet_and_none_is_larger_than_it() -> None:
    assert replace(FLEET, servers=1001, cell=50).cells == 21
    small = replace(FLEET, servers=3)
    assert (small.cells, small.shard_calls) == (1, pytest.approx(3 * 2.7 * 2))


def test_what_was_not_measured_is_said_and_not_guessed() -> None:
    rows = dict(Fleet().rows())
    assert rows["largest cell"] == rows["cores for them, each shard"] == "needs --lookup-call-ms"
    assert rows["a cold load"] == "needs --load-mbps"
    assert not any("needs" in value for value in dict(FLEET.rows()).values())


@pytest.mark.parametrize(
    ("name", "value"),
    [("servers", 0), ("hit_share", 1.1), ("entries", -1), ("replicas", 5), ("load_mbps", -1.0)],
)
def test_what_cannot_be_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        replace(FLEET, **{name: value})


def test_the_script_prints_all_rows(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--servers", "20", "--cell", "10", "--lookup-call-ms", "2", "--load-mbps", "500"])
    printed = capsys.readouterr().out
    assert all(name in printed for name, _ in FLEET.rows())
    with pytest.raises(SystemExit):
        main(["--hit-share", "2"])


def test_the_page_has_what_the_script_prints() -> None:
    commands = re.findall(r"^    python -m benchmarks\.capacity ?(.*)$", PAGE, re.MULTILINE)
    fleets = [Fleet(**vars(parser().parse_args(command.split()))) for command in commands]
    columns = [dict(fleet.rows()) for fleet in fleets]
    assert len(columns) == 3
    shown = {
        name.strip(): [value.strip() for value in values.split("|")]
        for name, values in re.findall(r"^\| ([^|]+) \| (.+ \| .+ \| .+) \|$", PAGE, re.MULTILINE)
    }
    for name in columns[0]:
        assert shown[name] == [column[name] for column in columns]
