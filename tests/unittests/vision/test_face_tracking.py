"""From boxes to directions: faces followed, smoothed, and what may be wrong."""

import json
import os
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from speechbrain_mpq.__main__ import main
from speechbrain_mpq.vision.camera import PinholeCamera
from speechbrain_mpq.vision.face_tracking import (
    FaceTrack,
    _bend_penalty,
    _doa_at,
    _link_faces,
    _pair_boxes,
    check_agreement,
    check_length,
    choose_face,
    frame_doas,
    read_boxes,
    smooth,
    track_boxes,
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


def test_a_source_whose_name_is_no_text_is_kept_readable(track, tmp_path):
    replace(track, source="caf\udce9.mp4").save(tmp_path / "track.json")
    assert FaceTrack.load(tmp_path / "track.json").source == "caf\\xe9.mp4"


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
        ({"fps": True}, "fps is True"),
        ({"width": "720"}, "width is '720'"),
        ({"target": [1]}, r"target is \[1\]"),
        ({"source": None}, "source is None"),
        ({"doas": ["90"] * 75}, "doas has '90'"),
        ({"boxes": [[True, 2, 3, 4]] * 75}, "a box has True"),
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
    + ['{"frames": [true]}', '{"frames": [[["1", 2, 3, 4]]]}']
    + ['{"frames": [[[true, 2, 3, 4]]]}', '{"frames": [[]], "fps": true}']
    + ['{"frames": 3}', '{"frames": [[[1, 2, 3, 1e999]]]}'],
)
def test_broken_boxes_are_named(tmp_path, text):
    for name in ("boxes.json", "boxes.npy"):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(ValueError) as caught:
            read_boxes(path)
        assert str(path) in str(caught.value)


def test_boxes_that_tell_of_more_than_there_is(tmp_path):
    path = tmp_path / "boxes.npy"
    np.save(path, np.zeros((3, 4)))
    shape = b"(1000000000000, 4), }"
    content = path.read_bytes()
    start = content.index(b"(3, 4)")
    path.write_bytes(content[:start] + shape + content[start + len(shape) :])
    with pytest.raises(ValueError, match="holds no face boxes"):
        read_boxes(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_boxes(path)
