"""Several faces followed through frames, and directions smoothed."""

from itertools import permutations

import numpy as np
import pytest

from speechbrain_mpq.vision.face_track import choose_face
from speechbrain_mpq.vision.face_tracking import (
    _bend_penalty,
    _link_faces,
    _pair_boxes,
    smooth,
)


def box(x, y=100.0, width=30.0):
    """A face around a point."""
    return np.array([x - width / 2, y - width / 2, width, width])


def shuffled(frames, seed=0):
    """Boxes in random order, as detectors give them."""
    rng = np.random.default_rng(seed)
    return [
        np.array([f[i] for i in rng.permutation(len(f))]).reshape(-1, 4)
        for f in frames
    ]


def middle(faces):
    """Horizontal centres, [faces, frames]."""
    return faces[..., 0] + faces[..., 2] / 2


def test_pairing_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(20):
        expected, found = (
            np.array([box(*rng.uniform(0, 60, 2)) for _ in range(4)])
            for _ in range(2)
        )
        gap = np.linalg.norm(expected[:, None, :2] - found[None, :, :2], axis=2)
        best = min(permutations(range(4)), key=lambda p: gap[range(4), p].sum())
        pairs = _pair_boxes(expected, found, radius=np.full(4, 100.0))
        assert pairs == list(enumerate(best))


def test_faces_far_off_or_of_another_size_are_not_paired():
    expected = np.array([box(100)])
    for found in (box(140), box(100, width=60), box(100, width=15)):
        assert _pair_boxes(expected, found[None], radius=np.ones(1)) == []
    assert _pair_boxes(expected, box(110)[None], radius=np.ones(1)) == [(0, 0)]


def test_two_faces_keep_their_rows_through_noise_gaps_and_disorder():
    rng = np.random.default_rng(2)
    frames, found = [], rng.random((100, 2)) < 0.8
    for t in range(100):
        both = [box(80 + rng.normal()), box(220 + rng.normal(), width=40)]
        frames.append([b for b, seen in zip(both, found[t]) if seen])
    faces = _link_faces(shuffled(frames), fps=25)
    assert len(faces) == 2
    assert (np.isfinite(faces[:, :, 0]) == found.T).all()
    assert abs(np.nanmean(middle(faces), axis=1) - [80, 220]).max() < 1


def test_faces_that_pass_each_other_are_not_exchanged():
    right = np.linspace(50, 250, 60)
    frames = [[box(x), box(300 - x, 108)] for x in right]
    for t in range(28, 32):  # one hides the other
        frames[t] = frames[t][:1]
    faces = _link_faces(shuffled(frames), fps=25)
    assert len(faces) == 2
    starts = [row[np.isfinite(row)][0] for row in middle(faces)]
    ends = [row[np.isfinite(row)][-1] for row in middle(faces)]
    assert sorted(starts) == [50, 250]
    np.testing.assert_allclose(np.add(starts, ends), 300)


def test_a_face_that_was_lost_for_a_second_is_the_same_one():
    frames = [[box(100)]] * 20 + [[]] * 25 + [[box(120)]] * 20
    faces = _link_faces(shuffled(frames), fps=25)
    assert faces.shape == (1, 65, 4)
    assert np.isnan(faces[0, 20:45]).all()


def test_who_comes_to_a_place_that_was_left_long_ago_is_another_face():
    frames = [[box(100)]] * 30 + [[]] * 126 + [[box(105)]] * 30
    faces = _link_faces(shuffled(frames), fps=25)
    assert len(faces) == 2
    assert np.isnan(faces[0, 30:]).all() and np.isnan(faces[1, :156]).all()
    del frames[100]  # five seconds from the one sight to the other
    frames = frames[:30] + frames[31:]
    assert len(_link_faces(shuffled(frames), fps=25)) == 1
    assert len(_link_faces(shuffled(frames), fps=25, longest_gap=4)) == 2


def test_a_forgotten_face_takes_no_box_from_one_beside_it():
    """The nearest, but gone for long: the box is that of the other one."""
    both, one = [[box(100), box(118)]] * 20, [[box(118)]] * 150
    faces = _link_faces(shuffled(both + one + [[box(108)]]), fps=25)
    assert np.isfinite(middle(faces)[:, -1]).tolist() == [False, True]


def test_a_cut_to_elsewhere_is_another_face():
    frames = [[box(50)]] * 20 + [[box(250)]] * 20
    assert len(_link_faces(shuffled(frames), fps=25)) == 2


def test_false_detections_are_left_out():
    rng = np.random.default_rng(3)
    frames = [
        [box(100)] + ([box(*rng.uniform(0, 700, 2))] if t % 6 == 0 else [])
        for t in range(60)
    ]
    assert len(_link_faces(shuffled(frames), fps=25)) == 1


def test_no_faces_at_all():
    assert _link_faces([np.empty((0, 4))] * 5, fps=25).shape == (0, 5, 4)


def test_target_must_be_named_among_several():
    doas, widths = [20.0, 100.0], [40.0, 30.0]
    assert choose_face([33.0], [9.0]) == 0
    assert choose_face(doas, widths, target=2) == 1
    assert choose_face(doas, widths, target="largest") == 0
    assert choose_face(doas, widths, near=90.0) == 1
    with pytest.raises(ValueError, match="2 faces.*20, 100 degrees.*which"):
        choose_face(doas, widths)
    for wrong in (0, 3, "tallest", 1.0):
        with pytest.raises(ValueError, match="from 1 to 2"):
            choose_face(doas, widths, target=wrong)
    with pytest.raises(ValueError, match="not both"):
        choose_face(doas, widths, target=1, near=20.0)


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
    smoothed = smooth(90 + 10 * sway, _bend_penalty(1.0, fps)) - 90
    middle = slice(len(time) // 4, -len(time) // 4)
    np.testing.assert_allclose(smoothed[middle], 5 * sway[middle], atol=0.02)


def test_lines_stay_as_they_are():
    for line in (np.full(30, 42.0), np.linspace(20, 80, 30)):
        np.testing.assert_allclose(smooth(line, 1e4), line, rtol=1e-9)


def test_noise_gets_less_and_a_slow_walk_stays():
    rng = np.random.default_rng(1)
    time = np.arange(250) / 25
    walk = 90 + 40 * np.sin(2 * np.pi * 0.1 * time)
    smoothed = smooth(walk + rng.normal(0, 2, 250), _bend_penalty(1.0, 25))
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
            _bend_penalty(bandwidth, fps=25)
