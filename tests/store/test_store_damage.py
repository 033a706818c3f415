# SPDX-License-Identifier: Apache-2.0
"""A store whose files were cut, changed or mixed up: no damage gives a wrong record."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_store_samples import (
    ENTRIES,
    NEVER,
)
from store_samples import (
    ARTIFACTS,
    NAMESPACE,
    SHARED,
    assert_same,
    make_features,
    make_record,
    make_sketch,
    near,
)

from attncache_vllm.errors import StoreDamaged
from attncache_vllm.store import LocalStore
from attncache_vllm.store.manifest import FORMAT_VERSION, Manifest, Segment
from attncache_vllm.store.records import read_layout
from attncache_vllm.store.segments import SegmentReader


def file_of(path: Path, kind: str) -> Path:
    (file,) = path.glob(f"{kind}*")
    return file


def sound_entries(path: Path) -> set[int]:
    """Open, use and close a harmed store; the entries it still has, all of them checked."""
    with LocalStore.open(path) as store:
        found = near(store, make_features(ENTRIES))
        assert [neighbours[0].entry_id for neighbours in found] == list(range(ENTRIES))
        sketches = [make_sketch(number) for number in range(ENTRIES)]
        overlaps = store.overlaps(sketches, tenants=SHARED * ENTRIES, neighbours=1, deadline=NEVER)
        assert [overlap[0].entry_id for overlap in overlaps] == list(range(ENTRIES))
        assert (store.plan, store.projector_bytes) == ({"layers": [1, 3]}, b"projector")
        sound = set()
        token_ids = store.token_ids(range(ENTRIES), deadline=NEVER)
        for number, record in enumerate(store.load(range(ENTRIES), deadline=NEVER)):
            if (ids := token_ids[number]) is not None:
                np.testing.assert_array_equal(ids, make_record(number).token_ids)
            if record is not None:
                assert_same(record, make_record(number))
                assert ids is not None
                sound.add(number)
        for name, data in ARTIFACTS.items():
            with contextlib.suppress(StoreDamaged):
                assert store.artifact(name) == data
        report = store.verify()
        assert {entry_id for entry_id, _ in report.damaged} == set(range(ENTRIES)) - sound
        assert store.stats().damaged == ENTRIES - len(sound)
    return sound


# -- damage ------------------------------------------------------------------------------------


def interesting_cuts(path: Path) -> Iterator[int]:
    data = memoryview(file_of(path, "maps").read_bytes())
    for entry in Manifest.read(path).entries:
        layout = read_layout(data[entry.offset : entry.offset + entry.size])
        edges = {0, 28, *(e for s in layout.sections() for e in (s.start, s.stop, s.end))}
        for edge in edges:
            yield from (entry.offset + edge + shift for shift in (-1, 0, 1))


def test_a_truncated_segment_keeps_the_records_before_the_cut(
    pristine: Path, scratch: Callable[[Path], Path]
) -> None:
    ends = [entry.offset + entry.size for entry in Manifest.read(pristine).entries]
    path = scratch(pristine)
    segment = file_of(path, "maps")
    for cut in sorted({cut for cut in interesting_cuts(pristine) if 0 <= cut <= ends[-1]})[::-1]:
        os.truncate(segment, cut)
        assert sound_entries(path) == {number for number, end in enumerate(ends) if end <= cut}


@pytest.mark.parametrize("kind", ["manifest", "features", "projector", "sketches"])
def test_a_truncated_file_is_damage(
    pristine: Path, scratch: Callable[[Path], Path], kind: str
) -> None:
    path = scratch(pristine)
    file = file_of(path, kind)
    for size in reversed(range(file.stat().st_size)):
        os.truncate(file, size)
        with pytest.raises(StoreDamaged):
            LocalStore.open(path)


def test_a_truncated_artifact_is_damage_when_it_is_read(
    pristine: Path, scratch: Callable[[Path], Path]
) -> None:
    path = scratch(pristine)
    file = file_of(path, "artifact-corrections")
    with LocalStore.open(path) as store:
        for size in reversed(range(file.stat().st_size)):
            os.truncate(file, size)
            with pytest.raises(StoreDamaged):
                store.artifact("corrections")
    assert sound_entries(path) == set(range(ENTRIES))


def test_every_single_bit_flip_in_a_manifest_is_noticed(pristine: Path) -> None:
    data = bytearray(file_of(pristine, "manifest").read_bytes())
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(StoreDamaged):
            Manifest.from_bytes(data)
        data[bit // 8] ^= 1 << bit % 8
    assert Manifest.from_bytes(data) == Manifest.read(pristine)


def forge(path: Path, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The manifest of a store whose ``published`` was changed, with its right checksum."""
    body = msgpack.unpackb(Manifest.read(path).to_bytes()[44:])
    body["published"] = change(body["published"])
    checked = FORMAT_VERSION.to_bytes(4, "little") + msgpack.packb(body)
    return b"ATNCSTOR" + hashlib.sha256(checked).digest() + checked


def test_an_unchanged_forgery_is_accepted(pristine: Path) -> None:
    assert Manifest.from_bytes(forge(pristine, lambda published: published)) == Manifest.read(
        pristine
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda p: {name: value for name, value in p.items() if name != "artifacts"},
        lambda p: {name: value for name, value in p.items() if name != "sketches"},
        lambda p: {**p, "artifacts": [p["artifacts"]]},
        lambda p: {**p, "artifacts": {"../maps": p["artifacts"]["templates"]}},
        lambda p: {**p, "artifacts": {"": p["artifacts"]["templates"]}},
        lambda p: {**p, "artifacts": {"corrections": p["artifacts"]["templates"]}},
        lambda p: {**p, "artifacts": {"templates": ["../../x", *p["artifacts"]["templates"][1:]]}},
        lambda p: {**p, "artifacts": {"templates": p["artifacts"]["templates"][:2]}},
        lambda p: {**p, "artifacts": {"templates": [*p["artifacts"]["templates"][:2], b"short"]}},
        lambda p: {**p, "sketches": p["features"]},
        lambda p: {**p, "sketches": [p["sketches"][0], 8 * ENTRIES - 8, p["sketches"][2]]},
        lambda p: {**p, "sketches": [p["sketches"][0], 8 * ENTRIES * 257 + 8, p["sketches"][2]]},
        lambda p: {**p, "sketches": [p["sketches"][0], 1 << 62, p["sketches"][2]]},
    ],
)
def test_forged_manifests_with_right_checksums_are_refused(
    pristine: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    with pytest.raises(StoreDamaged):
        Manifest.from_bytes(forge(pristine, change))


KINDS = ["maps", "manifest", "features", "projector", "sketches", "artifact-templates"]


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(["maps", *KINDS]),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
def test_a_bit_flip_anywhere_is_skipped_cured_or_clearly_refused(
    pristine: Path, scratch: Callable[[Path], Path], kind: str, place: float, bit: int
) -> None:
    path = scratch(pristine)
    file = file_of(path, kind)
    data = bytearray(file.read_bytes())
    offset = int(place * len(data))
    data[offset] ^= 1 << bit
    file.write_bytes(data)
    if kind == "maps":
        hit = {
            number
            for number, entry in enumerate(Manifest.read(path).entries)
            if entry.offset <= offset < entry.offset + entry.size
        }
        assert len(hit) == 1
        assert sound_entries(path) == set(range(ENTRIES)) - hit
    elif kind == "artifact-templates":
        with LocalStore.open(path) as store:
            problems = store.verify().problems
        assert [problem.startswith(file.name) for problem in problems] == [True]
        assert sound_entries(path) == set(range(ENTRIES))
    else:
        with pytest.raises(StoreDamaged):
            LocalStore.open(path)


def test_swapped_records_are_not_taken_for_each_other(
    tmp_path: Path,
) -> None:
    """Both records are sound and of one size, but each lies where the other should."""
    path = tmp_path / "store"
    with LocalStore.create(path, NAMESPACE, {}) as store:
        for number in (0, 300):  # of the same length, 1 token
            store.put(make_record(number, map_bytes=64))
        store.commit()
        first, second = store.manifest.entries
    assert (first.size, first.length) == (second.size, second.length)
    segment = file_of(path, "maps")
    data = segment.read_bytes()
    segment.write_bytes(data[second.offset :] + data[: second.offset])
    with LocalStore.open(path) as store:
        assert store.load([0, 1], deadline=NEVER) == [None, None]


def test_a_segment_cut_off_while_mapped_is_noticed(tmp_path: Path) -> None:
    """Touching the lost pages would kill the process with SIGBUS."""
    path = tmp_path / "store"
    with LocalStore.create(path, NAMESPACE, {}) as store:
        for number in range(4):
            store.put(make_record(number, map_bytes=20_000))
        store.commit()
    with LocalStore.open(path) as store:
        assert store.load([0], deadline=NEVER)[0] is not None
        os.truncate(file_of(path, "maps"), store.manifest.entries[2].offset)
        records = store.load(range(4), deadline=NEVER)
        assert [record is not None for record in records] == [True, True, False, False]


def test_bytes_behind_the_committed_ones_are_never_mapped(tmp_path: Path) -> None:
    """The next writer cuts them off, and a mapped page behind the end of its file is fatal."""
    (tmp_path / "maps-000000").write_bytes(bytes(256))
    reader = SegmentReader(tmp_path)
    assert len(reader.view(Segment("maps-000000", 64), 0, 64)) == 64
    with pytest.raises(StoreDamaged, match="must reach byte 128"):
        reader.view(Segment("maps-000000", 64), 0, 128)


def test_a_writer_continues_behind_what_a_cut_off_segment_lost(
    pristine: Path, scratch: Callable[[Path], Path]
) -> None:
    path = scratch(pristine)
    os.truncate(file_of(path, "maps"), Manifest.read(path).entries[3].offset)
    with LocalStore.open(path, writable=True) as store:
        new = store.put(make_record(50))
        store.commit()
    with LocalStore.open(path) as store:
        records = store.load([*range(ENTRIES), new], deadline=NEVER)
    assert [record is not None for record in records] == [True] * 3 + [False] * 3 + [True]
