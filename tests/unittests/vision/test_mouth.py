"""Mouths cut out of frames: place, frame rate, missing faces."""

from pathlib import Path

import numpy as np
import pytest

from speechbrain_mpq.vision.mouth import (
    _bridged,
    _crop_mouth,
    _frames_on_view,
    _mouth_boxes,
    _steady,
    mouth_pictures,
)

GRID = Path(__file__).parents[4] / "shared/data/grid"


LOST = [np.nan] * 4


def test_crop_shows_what_is_in_the_box():
    frame = np.zeros((100, 200), np.uint8)
    frame[40:55, 80:100] = 200  # exactly the box below
    box = np.array([80.0, 40, 20, 15])
    assert (_crop_mouth(frame, box, (15, 20)) == 200).all()
    shifted = _crop_mouth(frame, box + [10, 0, 0, 0], (15, 20))
    assert (shifted[:, :9] == 200).all() and (shifted[:, 11:] == 1).all()


def test_shrinking_averages():
    frame = np.tile(np.array([[0, 200]], np.uint8), (60, 40))
    picture = _crop_mouth(frame, np.array([0.0, 0, 80, 60]), (6, 8))
    assert np.abs(picture.astype(int) - 100).max() <= 6


def test_colours_become_grey():
    frame = np.zeros((10, 10, 3), np.uint8)
    frame[..., 1] = 100  # green
    assert (_crop_mouth(frame, np.array([1.0, 1, 4, 4]), (4, 4)) == 59).all()


def test_lost_faces_are_no_pictures_and_black_frames_are():
    frames = np.zeros((3, 60, 60), np.uint8)
    faces = np.array([[10.0, 5, 40, 40], LOST, [10.0, 5, 40, 40]])
    pictures = mouth_pictures(frames, faces, (6, 8), bridge=0)
    assert pictures[1].max() == 0 and pictures[[0, 2]].min() == 1


@pytest.mark.parametrize("gap", [1, 12, 25, 26])
def test_a_face_that_the_detector_missed_is_where_it_was(gap):
    frames = np.zeros((gap + 6, 60, 200), np.uint8)
    x = np.arange(len(frames), dtype=float)  # it moves, and the frames know
    for frame, left in zip(frames, x):
        frame[:, int(left) :] = 200
    faces = np.stack([x - 20, x * 0 + 5, x * 0 + 40, x * 0 + 40], axis=1)
    whole = mouth_pictures(frames, faces, (6, 8))
    faces[3 : 3 + gap] = np.nan
    pictures = mouth_pictures(frames, faces, (6, 8))
    if gap <= 25:  # a second
        apart = np.abs(pictures.astype(int) - whole)
        assert apart.max() <= 25  # less is averaged near a gap
    else:
        assert not pictures[3 : 3 + gap].any()
        assert pictures[[2, 3 + gap]].any()


def test_bridges_are_straight_and_have_two_ends():
    rng = np.random.default_rng(0)
    boxes = rng.normal(size=(60, 4))
    boxes[rng.random(60) < 0.5] = np.nan
    boxes[[19, 31]], boxes[20:31], boxes[:2] = 1.0, np.nan, np.nan
    found = np.flatnonzero(np.isfinite(boxes[:, 0]))
    line = np.stack(
        [np.interp(np.arange(60), found, b[found]) for b in boxes.T], axis=1
    )
    long = _bridged(boxes, 10)
    inside = np.r_[found[0] : 20, 31 : found[-1] + 1]
    np.testing.assert_allclose(long[inside], line[inside])
    assert np.isnan(long[: found[0]]).all() and np.isnan(long[20:31]).all()
    np.testing.assert_array_equal(_bridged(boxes, 0), boxes)


def test_outside_of_the_frame_its_edge_is_repeated():
    frame = np.full((60, 60), 70, np.uint8)
    box = _mouth_boxes([[40.0, 30, 60, 60]], (6, 8))[0]
    assert (_crop_mouth(frame, box, (6, 8)) == 70).all()


@pytest.mark.parametrize("fps", [12.5, 24, 25, 29.97, 30, 50])
def test_other_frame_rates(fps):
    frames = round(4 * fps)
    index = _frames_on_view(frames, fps)
    assert abs(len(index) - 100) <= 1
    clock = [int(v / 25 * fps + 1e-6) for v in range(len(index))]
    assert index.tolist() == [min(f, frames - 1) for f in clock]


@pytest.mark.parametrize("frames", [2, 4])
def test_boxes_of_another_video_are_refused(frames):
    video = (np.zeros((60, 60), np.uint8) for _ in range(frames))
    with pytest.raises(ValueError, match="3 face boxes"):
        mouth_pictures(video, np.ones((3, 4)), (6, 8))


def test_wrong_boxes_and_rates_are_refused():
    with pytest.raises(ValueError, match=r"\[frames, 4\]"):
        _mouth_boxes([1.0, 2.0, 3.0, 4.0], (6, 8))
    with pytest.raises(ValueError, match="above 0"):
        _frames_on_view(3, 0)


def test_trembling_boxes_are_steadied_and_lost_ones_stay_lost():
    rng = np.random.default_rng(0)
    boxes = np.full((50, 4), 20.0) + rng.normal(0, 1, (50, 4))
    boxes[20:23] = np.nan
    calm = _steady(boxes)
    assert np.isnan(calm[20:23]).all() and np.isfinite(calm[:20]).all()
    assert np.nanstd(calm) < 0.5 * np.nanstd(boxes)
    for i in (4, 19, 30):
        np.testing.assert_allclose(
            calm[i], np.nanmean(boxes[i - 4 : i + 5], axis=0)
        )


@pytest.mark.skipif(not GRID.is_dir(), reason="needs the GRID clips")
def test_real_mouths_move_and_stay_in_the_middle():
    pytest.importorskip("cv2")
    from speechbrain_mpq.vision.detector import CascadeDetector
    from speechbrain_mpq.vision.face_tracking import track_video
    from speechbrain_mpq.vision.video import Video

    video = Video(GRID / "lrwp9a.mpg")
    track = track_video(video, CascadeDetector(), target="largest")
    pictures = mouth_pictures(video, track.boxes, (24, 32), video.fps)
    assert (pictures.reshape(len(pictures), -1).max(1) > 0).mean() > 0.95
    motion = np.abs(np.diff(pictures.astype(float), axis=0)).mean(0)
    lips, cheeks = motion[6:18, 8:24].mean(), motion[:4].mean()
    assert lips > 1.5 * cheeks
