"""Smoothing against dense least squares and its own promise."""

import numpy as np
import pytest

from speechbrain_mpq.vision.smoothing import bend_penalty, smooth


def test_it_is_the_least_squares_solution():
    rng = np.random.default_rng(0)
    values = rng.normal(90, 5, 40)
    values[[3, 4, 5, 20, 21]] = np.nan
    seen = np.isfinite(values)
    fit = np.eye(40)[seen]
    bend = np.sqrt(7.0) * np.diff(np.eye(40), 2, axis=0)
    aim = np.concatenate([values[seen], np.zeros(38)])
    expected = np.linalg.lstsq(np.vstack([fit, bend]), aim, rcond=None)[0]
    smoothed = smooth(values, penalty=7.0)
    np.testing.assert_allclose(smoothed[seen], expected[seen], rtol=1e-9)


@pytest.mark.parametrize("fps", [10.0, 25.0, 60.0])
def test_a_sway_of_the_bandwidth_is_halved_and_not_delayed(fps):
    time = np.arange(0, 40, 1 / fps)
    sway = np.sin(2 * np.pi * 1.0 * time)
    smoothed = smooth(90 + 10 * sway, bend_penalty(1.0, fps)) - 90
    middle = slice(len(time) // 4, -len(time) // 4)
    np.testing.assert_allclose(smoothed[middle], 5 * sway[middle], atol=0.02)


def test_lines_stay_as_they_are():
    for line in (np.full(30, 42.0), np.linspace(20, 80, 30)):
        np.testing.assert_allclose(smooth(line, 1e4), line, rtol=1e-9)


def test_noise_gets_less_and_a_slow_walk_stays():
    rng = np.random.default_rng(1)
    time = np.arange(250) / 25
    walk = 90 + 40 * np.sin(2 * np.pi * 0.1 * time)
    smoothed = smooth(walk + rng.normal(0, 2, 250), bend_penalty(1.0, 25))
    assert np.sqrt(np.mean((smoothed - walk) ** 2)) < 0.8


def test_lost_frames_are_bridged_and_the_ends_held():
    values = np.linspace(10, 60, 51)  # one degree a frame
    values[[0, 1, 2, 50]] = np.nan
    values[20:30] = np.nan
    smoothed = smooth(values, penalty=100.0)
    np.testing.assert_allclose(smoothed[3:50], np.arange(13, 60), rtol=1e-9)
    assert smoothed[0] == smoothed[3] and smoothed[50] == smoothed[49]


def test_one_or_two_measurements_are_enough():
    values = np.array([np.nan, 70.0, np.nan])
    assert smooth(values, 100.0).tolist() == [70, 70, 70]
    values[2] = 80
    assert smooth(values, 100.0).tolist() == [70, 70, 80]


def test_nothing_measured_and_impossible_bandwidths_are_refused():
    with pytest.raises(ValueError, match="nothing was measured"):
        smooth(np.full(3, np.nan), 1.0)
    for bandwidth in (0.0, 13.0, float("nan")):
        with pytest.raises(ValueError, match="12.5 Hz"):
            bend_penalty(bandwidth, fps=25)
