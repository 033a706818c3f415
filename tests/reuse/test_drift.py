# SPDX-License-Identifier: Apache-2.0
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attncache_vllm.reuse.drift import MIN_CANARIES, WINDOW, Band, RunningError

BAND = Band(mean=0.1, deviation=0.05)


def running(*errors: float) -> RunningError:
    found = RunningError()
    for error in errors:
        found.add(error)
    return found


def test_the_band_ends_two_deviations_above_the_mean() -> None:
    assert BAND.upper == pytest.approx(0.2)
    assert Band(0.3, 0.0).upper == 0.3


@given(st.lists(st.floats(0, 10), min_size=2, max_size=WINDOW))
def test_mean_and_interval_are_those_of_the_errors(errors: list[float]) -> None:
    found = running(*errors)
    low, high = found.interval()
    half = 1.96 * statistics.stdev(errors) / math.sqrt(len(errors))
    assert found.mean == pytest.approx(statistics.fmean(errors), abs=1e-9)
    assert (low, high) == pytest.approx((found.mean - half, found.mean + half), abs=1e-6)


def test_little_is_known_of_few() -> None:
    assert math.isnan(running().mean)
    assert running().interval() == running(0.5).interval() == (-math.inf, math.inf)


def test_only_the_latest_errors_count() -> None:
    found = running(*[5.0] * 10, *[0.1] * WINDOW)
    assert (len(found), found.mean) == (WINDOW, pytest.approx(0.1))
    found.clear()
    assert len(found) == 0


def test_the_band_is_left_when_the_whole_interval_is_above_it() -> None:
    # Mean 0.25: with a small spread surely above 0.2, with a large one not so surely.
    sure = [0.24, 0.26] * 8
    unsure = [0.05, 0.45] * 8
    assert running(*sure).mean == pytest.approx(running(*unsure).mean)
    assert running(*sure).has_left(BAND)
    assert not running(*unsure).has_left(BAND)


def test_an_error_within_the_band_never_leaves_it() -> None:
    assert not running(*[0.2] * WINDOW).has_left(BAND)
    assert not running(*[0.0] * WINDOW).has_left(BAND)


def test_a_handful_decides_nothing() -> None:
    assert not running(*[9.0] * (MIN_CANARIES - 1)).has_left(BAND)
    assert running(*[9.0] * MIN_CANARIES).has_left(BAND)


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_one_error_that_is_not_finite_is_enough(error: float) -> None:
    assert running(error).has_left(BAND)
    assert running(*[0.1] * 30, error).has_left(BAND)
    assert not running(*[0.1] * 30).has_left(BAND)


def test_traffic_like_that_of_the_calibration_rarely_leaves_the_band() -> None:
    draw, left = random.Random(0), 0
    for _ in range(200):
        found = RunningError()
        for _ in range(WINDOW):
            found.add(max(0.0, draw.gauss(BAND.mean, BAND.deviation)))
            left += found.has_left(BAND)
    assert left == 0
