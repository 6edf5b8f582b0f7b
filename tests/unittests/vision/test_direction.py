"""From boxes to directions, with what may be wrong about them."""

import json

import numpy as np
import pytest

from speechbrain_mpq.__main__ import main
from speechbrain_mpq.vision.camera import PinholeCamera
from speechbrain_mpq.vision.direction import (
    _doa_at,
    check_agreement,
    check_length,
    frame_doas,
)
from speechbrain_mpq.vision.face_track import FaceTrack, read_boxes
from speechbrain_mpq.vision.face_tracking import track_boxes

SIZE = 720, 288


def boxes_at(doas, width=40.0):
    """The boxes of a face in the paper's camera."""
    x = np.asarray(doas) / 180 * SIZE[0]
    return [np.array([[c - width / 2, 100, width, width]]) for c in x]


def walk(fps, seconds=3.0):
    """A talker who walks: times and directions."""
    time = np.arange(0, seconds, 1 / fps)
    return time, 60 + 20 * time


@pytest.fixture
def track():
    return track_boxes(boxes_at(walk(25)[1]), 25, SIZE)


@pytest.mark.parametrize("fps", [10.0, 25.0, 29.97, 60.0])
def test_any_frame_rate_gives_the_direction_at_its_time(fps):
    track = track_boxes(boxes_at(walk(fps)[1]), fps, SIZE)
    doas = frame_doas(track, frames=48000 // 256 + 1)
    time = np.arange(188) / 62.5
    inside = time <= (len(track.doas) - 1) / fps
    np.testing.assert_allclose(doas[inside], 60 + 20 * time[inside], atol=1e-3)
    assert doas.dtype == np.float32
    np.testing.assert_allclose(doas[~inside], track.doas[-1], rtol=1e-6)


def test_noise_and_lost_frames_are_smoothed_and_flagged():
    rng = np.random.default_rng(0)
    _, doas = walk(25)
    boxes = boxes_at(doas + rng.normal(0, 0.5, 75))
    lost = [*range(30, 40), 74]
    for t in lost:
        boxes[t] = np.empty((0, 4))
    track = track_boxes(boxes, 25, SIZE)
    assert np.flatnonzero(~track.visible).tolist() == lost
    assert abs(track.doas - doas)[:74].max() < 1.0
    assert track.doas[74] == track.doas[73]
    seen = np.median(doas[track.visible])
    assert track.doa == pytest.approx(seen, abs=1.0)


def test_utterance_direction_forgets_a_few_wild_frames():
    doas = np.full(75, 50.0)
    doas[[10, 40]] += 6  # within reach of the face
    track = track_boxes(boxes_at(doas), 25, SIZE, bandwidth=12.5)
    assert track.doa == pytest.approx(50, abs=0.1)


def test_camera_and_target_are_used():
    two = [
        np.vstack([left, right])
        for left, right in zip(boxes_at([45.0] * 9), boxes_at([120.0] * 9, 30))
    ]
    with pytest.raises(ValueError, match="clip: 2 faces.*45, 120 degrees"):
        track_boxes(two, 25, SIZE, source="clip")
    assert track_boxes(two, 25, SIZE, target=2).doa == pytest.approx(120)
    assert track_boxes(two, 25, SIZE, target="largest").target == 1
    near = track_boxes(two, 25, SIZE, near=110.0)
    assert near.target == 2 and near.faces == 2
    camera = PinholeCamera(focal=180.0, center=(360, 120))
    seen = track_boxes(two, 25, SIZE, camera=camera, target=1)
    assert seen.doa == pytest.approx(45.0)  # 180 pixels left of the middle


@pytest.mark.parametrize("frames", [[], [np.empty((0, 4))] * 20])
def test_no_face_is_an_error(frames):
    with pytest.raises(ValueError, match="clip.mp4: no face in any"):
        track_boxes(frames, 25, SIZE, source="clip.mp4")


def test_boxes_of_another_picture_are_refused():
    boxes = boxes_at([150.0] * 9)  # at 600 pixels
    with pytest.raises(ValueError, match="not in a picture of 360 x 288"):
        track_boxes(boxes, 25, (360, 288))
    for fps in (0, -25, float("nan")):
        with pytest.raises(ValueError, match="frames per second"):
            track_boxes(boxes, fps, SIZE)


def test_sound_and_picture_of_other_lengths(track):
    check_length(track, 3.4)
    check_length(track, 2.6)
    assert _doa_at(track, np.array([3.4])) == track.doas[-1]
    for seconds in (2.4, 3.6):
        with pytest.raises(ValueError, match="sound lasts .* track 3.00 s"):
            check_length(track, seconds)
    with pytest.raises(ValueError, match="sound lasts 9.60 s"):
        frame_doas(track, frames=601)


def test_direction_and_track_that_disagree(track):
    check_agreement(track, track.doa + 14)
    for doa in (track.doa - 16, float("nan")):
        with pytest.raises(ValueError, match="reverse.*yaw"):
            check_agreement(track, doa)


def test_track_file_holds_everything(track, tmp_path):
    track.boxes[5] = np.nan
    track.save(tmp_path / "track.json")
    assert [p.name for p in tmp_path.iterdir()] == ["track.json"]
    loaded = FaceTrack.load(tmp_path / "track.json")
    np.testing.assert_allclose(loaded.doas, track.doas, atol=6e-4)
    np.testing.assert_allclose(loaded.boxes, track.boxes, atol=6e-3)
    assert (loaded.visible == track.visible).all()
    assert (loaded.fps, loaded.width, loaded.target) == (25, 720, 1)
    content = json.loads((tmp_path / "track.json").read_text())
    assert content["boxes"][5] is None and content["visible"][5] is False


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 2}, "version 2"),
        ({"doas": [10.0]}, "1 directions for 75 frames"),
        ({"doas": [190.0] * 75}, "0 to 180"),
        ({"doas": "far"}, "is not a track"),
        ({"boxes": [None] * 75}, "visible in no frame"),
        ({"boxes": [[1, 2]] * 75}, "is not a track"),
        ({"fps": 0}, "0 frames per second"),
        (None, "is not a track"),
    ],
)
def test_broken_track_files_are_named(track, tmp_path, change, message):
    path = tmp_path / "track.json"
    track.save(path)
    content = json.loads(path.read_text())
    if change is None:
        del content["doas"]
    path.write_text(json.dumps(content | (change or {})))
    with pytest.raises(ValueError, match=message) as caught:
        FaceTrack.load(path)
    assert str(path) in str(caught.value)


def test_given_boxes_by_the_command(tmp_path, capsys):
    path, out = tmp_path / "boxes.json", tmp_path / "track.json"
    frames = [b.tolist() for b in boxes_at(walk(30)[1])]
    frames[7] = []
    about = {"fps": 30, "width": SIZE[0], "height": SIZE[1]}
    path.write_text(json.dumps({**about, "frames": frames}))
    assert main(["track", str(path), "-o", str(out)]) == 0
    assert "visible in 89 of 90 frames" in capsys.readouterr().out
    assert FaceTrack.load(out).doa == pytest.approx(89.5, abs=0.5)
    np.save(tmp_path / "boxes.npy", np.concatenate(boxes_at([30.0] * 9)))
    array = [str(tmp_path / "boxes.npy")]
    assert main(["track", *array]) == 1
    assert "--fps 25 --size 640 360" in capsys.readouterr().err
    size = [str(side) for side in SIZE]
    assert main(["track", *array, "--fps", "25", "--size", *size]) == 0
    assert capsys.readouterr().out.startswith("30.0 degrees")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"fps": 25}',
        '{"frames": []}',
        '{"frames": [[[1, 2, 3]]]}',
    ]
    + ['{"frames": [[[1, 2, 3, -4]]]}', '{"frames": [[["a", 2, 3, 4]]]}']
    + ['{"frames": [[]], "fps": NaN}', '{"frames": [[]], "width": 0}']
    + ['{"frames": 3}', '{"frames": [[[1, 2, 3, 1e999]]]}'],
)
def test_broken_boxes_are_named(tmp_path, text):
    for name in ("boxes.json", "boxes.npy"):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(ValueError) as caught:
            read_boxes(path)
        assert str(path) in str(caught.value)
