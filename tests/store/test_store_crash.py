# SPDX-License-Identifier: Apache-2.0
"""Damage and death at the worst moments: never a crash, never wrong data, never a lost commit."""

import contextlib
import hashlib
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_samples import (
    ARTIFACTS,
    NAMESPACE,
    SHARED,
    assert_same,
    build_store,
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

NEVER = math.inf
ENTRIES = 6


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published store of 6 entries in one segment. Copy it before harming it."""
    path = tmp_path_factory.mktemp("pristine") / "store"
    build_store(path, ENTRIES)
    return path


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    root = tmp_path_factory.mktemp("scratch")

    def copy(store: Path) -> Path:
        shutil.rmtree(root / "store", ignore_errors=True)
        return shutil.copytree(store, root / "store")

    return copy


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


# -- interrupted writes ------------------------------------------------------------------------


class Crash(BaseException):
    """Stands for the death of the process: nothing in the package may catch it."""


def crash_at(monkeypatch: pytest.MonkeyPatch, operation: int) -> None:
    """Let the process die before the given one of the operations that change the disk."""
    count = 0

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > operation:
                raise Crash
            return original(*args, **kwargs)

        return run

    for name in ("pwrite", "fsync", "replace", "ftruncate", "unlink"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))


@pytest.mark.parametrize("publishing", [False, True])
def test_a_crash_before_any_disk_operation_leaves_the_old_or_the_new_state(
    pristine: Path,
    scratch: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
    publishing: bool,
) -> None:
    outcomes = []
    for operation in range(100):
        path = scratch(pristine)
        try:
            with monkeypatch.context() as dying:
                crash_at(dying, operation)
                with LocalStore.open(path, writable=True, roll_bytes=1) as store:
                    store.put(make_record(ENTRIES))
                    if publishing:
                        features = make_features(ENTRIES + 1)
                        store.publish({}, b"new", {}, features, artifacts={"new": b"new"})
                    else:
                        store.commit()
            finished = True
        except Crash:
            finished = False
        with LocalStore.open(path) as store:
            entries = store.stats().entries
            new = entries == ENTRIES + 1
            assert new or entries == ENTRIES
            published = new and publishing
            assert store.projector_bytes == (b"new" if published else b"projector")
            assert store.artifact("new") == (b"new" if published else None)
            assert store.artifact("templates") == (None if published else ARTIFACTS["templates"])
            found = store.overlaps(
                [make_sketch(ENTRIES)], tenants=SHARED, neighbours=1, deadline=NEVER
            )
            assert (found[0][0].entry_id == ENTRIES) == published
            for entry_id, record in store.records():
                assert_same(record, make_record(entry_id))
            assert store.verify().damaged == [] and store.stats().damaged == 0
        outcomes.append(new)
        if finished:
            break
    assert outcomes == sorted(outcomes) and set(outcomes) == {False, True}


def test_a_crash_while_a_plan_is_published_leaves_the_old_or_the_new_one_with_its_artifacts(
    pristine: Path, scratch: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    new = {"templates": b"new templates", "extra": b"extra"}
    outcomes = []
    for operation in range(100):
        path = scratch(pristine)
        try:
            with monkeypatch.context() as dying:
                crash_at(dying, operation)
                with LocalStore.open(path, writable=True) as store:
                    store.publish_plan({"layers": [0]}, {"calibration": 1}, new)
            finished = True
        except Crash:
            finished = False
        for writable in (False, True):
            with LocalStore.open(path, writable=writable) as store:
                assert store.verify().ok
                changed = store.plan == {"layers": [0]}
                assert changed or store.plan == {"layers": [1, 3]}
                published = store.manifest.published
                assert published is not None and ("calibration" in published.report) == changed
                artifacts = {name: store.artifact(name) for name in published.artifacts}
                assert artifacts == (new if changed else ARTIFACTS)
        # The writer cleared away what nothing refers to.
        names = {path.name for path in path.glob("artifact-*")}
        assert names == {file.name for file in published.artifacts.values()}
        outcomes.append(changed)
        if finished:
            break
    assert outcomes == sorted(outcomes) and set(outcomes) == {False, True}


def test_nothing_is_renamed_into_place_before_what_it_needs_is_durable(
    pristine: Path, scratch: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order a power cut would punish, which no killed process can show."""
    unsynced: set[int] = set()
    original = {name: getattr(os, name) for name in ("pwrite", "fsync", "replace")}

    def pwrite(file: int, data: Any, offset: int) -> int:
        unsynced.add(os.fstat(file).st_ino)
        return int(original["pwrite"](file, data, offset))

    def fsync(file: int) -> None:
        unsynced.discard(os.fstat(file).st_ino)
        synced.add(os.fstat(file).st_ino)
        original["fsync"](file)

    def replace(source: Path, target: Path) -> None:
        assert source.stat().st_ino in synced
        if target.name == "manifest":
            assert not unsynced and target.parent.stat().st_ino in synced
        original["replace"](source, target)
        synced.discard(target.parent.stat().st_ino)

    path = scratch(pristine)
    synced: set[int] = set()
    with LocalStore.open(path, writable=True, roll_bytes=1) as store:
        for function in (pwrite, fsync, replace):
            monkeypatch.setattr(os, function.__name__, function)
        for number in range(ENTRIES, ENTRIES + 3):
            store.put(make_record(number))
        store.publish({}, b"new", {}, make_features(ENTRIES + 3), artifacts={"new": b"new"})
        assert path.stat().st_ino in synced
        store.publish_plan({}, {}, {"new": b"newer"})
        assert path.stat().st_ino in synced


def test_a_full_disk_is_an_error_and_the_next_record_takes_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store"
    original = os.pwrite

    def half_then_full(file: int, data: Any, offset: int) -> int:
        if len(data) < 2:
            raise OSError(28, "No space left on device")
        return original(file, data[: len(data) // 2], offset)

    with LocalStore.create(path, NAMESPACE, {}) as store:
        store.put(make_record(0))
        with monkeypatch.context() as full:
            full.setattr(os, "pwrite", half_then_full)
            with pytest.raises(Exception, match="No space left"):
                store.put(make_record(1))
        assert not store.has(make_record(1).token_hash)
        assert store.put(make_record(2)) == 1
        store.commit()
    with LocalStore.open(path) as store:
        assert store.verify().ok
        assert_same(store.load([1], deadline=NEVER)[0], make_record(2))


def test_a_killed_creation_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store"
    with monkeypatch.context() as dying:
        crash_at(dying, 1)
        with pytest.raises(Crash):
            LocalStore.create(path, NAMESPACE, {})
    LocalStore.create(path, NAMESPACE, {}).close()
    LocalStore.open(path).close()


def test_a_killed_writer_loses_no_commit_and_resumes(tmp_path: Path) -> None:
    path = tmp_path / "store"
    script = Path(__file__).with_name("crash_writer.py")
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    print(f"seed {seed}")
    acknowledged = 0
    for _ in range(8):
        with subprocess.Popen(
            [sys.executable, str(script), str(path)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline().strip(), "the writer could not start"
            time.sleep(chance.uniform(0, 0.15))
            writer.send_signal(signal.SIGKILL)
            rest = writer.stdout.read().split("\n")
        # The last line may be cut short by the kill; every whole one is a promise.
        acknowledged = max([acknowledged, *(int(line) for line in rest[:-1])])
        with LocalStore.open(path) as store:
            assert store.stats().entries >= acknowledged
            report = store.verify()
            assert report.damaged == []
            for entry_id, record in store.records():
                assert_same(record, make_record(entry_id, map_bytes=700))
            if (published := store.manifest.published) is not None:
                assert store.projector_bytes == b"%d" % store.plan["entries"]
                assert store.artifact("templates") == store.projector_bytes
                assert published.rows == store.plan["entries"]
            assert store.stats().damaged == 0
    assert acknowledged > 8
