# SPDX-License-Identifier: Apache-2.0
"""A writer that is killed or fails at any point: what was committed stays."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
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
)

from attncache_vllm.store import LocalStore


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
