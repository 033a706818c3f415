# SPDX-License-Identifier: Apache-2.0
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from attncache_vllm.calibrate.fidelity import Fidelity
from attncache_vllm.calibrate.trials import Trials

FIRST, SECOND = Fidelity(0.1, 0.25, 1 / 3), Fidelity(0.4, 0.5, 0.6)


def never() -> Fidelity:
    raise AssertionError("it is known")


def known(result: Fidelity) -> Callable[[], Fidelity]:
    return lambda: result


def test_a_trial_runs_once_and_its_result_outlives_the_process(tmp_path: Path) -> None:
    path = tmp_path / "trials.json"
    trials = Trials(path, "a")
    assert trials.get("first", known(FIRST)) == FIRST
    assert trials.get("second", known(SECOND)) == SECOND
    assert trials.get("first", never) == FIRST
    again = Trials(path, "a")
    assert len(again) == 2
    assert (again.get("first", never), again.get("second", never)) == (FIRST, SECOND)


def test_a_trial_that_is_cut_off_leaves_those_before_it(tmp_path: Path) -> None:
    path = tmp_path / "trials.json"

    def interrupted() -> Fidelity:
        # What was found out before is on disk by now.
        assert Trials(path, "a").get("first", never) == FIRST
        raise KeyboardInterrupt

    trials = Trials(path, "a")
    trials.get("first", known(FIRST))
    with pytest.raises(KeyboardInterrupt):
        trials.get("second", interrupted)
    again = Trials(path, "a")
    assert len(again) == 1
    assert again.get("second", known(SECOND)) == SECOND


def test_another_calibration_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "trials.json"
    Trials(path, "a").get("first", known(FIRST))
    other = Trials(path, "b")
    assert other.get("first", known(SECOND)) == SECOND
    assert len(Trials(path, "b")) == 1
    assert len(Trials(path, "a")) == 0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"{}",
        json.dumps({"fingerprint": "a"}).encode(),
        json.dumps({"fingerprint": "a", "results": [1]}).encode(),
        json.dumps({"fingerprint": "a", "results": {"first": {"cosine": 1}}}).encode(),
        json.dumps({"fingerprint": "a", "results": {"first": 1}}).encode(),
    ],
)
def test_a_file_that_cannot_be_read_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trials.json"
    path.write_bytes(content)
    trials = Trials(path, "a")
    assert len(trials) == 0
    assert trials.get("first", known(FIRST)) == FIRST


def test_nothing_is_left_when_the_calibration_is_done(tmp_path: Path) -> None:
    trials = Trials(tmp_path / "trials.json", "a")
    trials.discard()  # nothing was tried
    trials.get("first", known(FIRST))
    trials.discard()
    assert list(tmp_path.iterdir()) == []
