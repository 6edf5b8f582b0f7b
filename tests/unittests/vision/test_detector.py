"""Faces in drawn and in real pictures, and the way to a direction."""

import time
from pathlib import Path

import numpy as np
import pytest
from test_video import write_video

from speechbrain_mpq.__main__ import main
from speechbrain_mpq.vision.detector import CascadeDetector
from speechbrain_mpq.vision.face_tracking import FaceTrack, track_video
from speechbrain_mpq.vision.video import Video

cv2 = pytest.importorskip("cv2")


GRID = Path(__file__).parents[4] / "shared" / "data" / "grid"


# Features of a face a hundred wide: centre, half axes, grey level
FEATURES = [
    ((50, 40), (52, 62), 60),  # hair
    ((50, 55), (42, 58), 200),
    *(((x, 28), (14, 3), 70) for x in (29, 71)),  # brows
    *(((x, 40), (13, 8), 110) for x in (29, 71)),  # sockets
    *(((x, 42), (10, 5), 40) for x in (29, 71)),
    ((50, 60), (7, 14), 230),  # nose
    ((50, 72), (9, 3), 120),
    ((50, 90), (18, 6), 110),  # mouth
]


def draw_faces(places, width=60, size=(240, 720)):
    """A picture with faces centred on x in pixels."""
    picture = np.full((*size, 3), 120, np.uint8)
    for place in places:
        for center, axes, level in FEATURES:
            x = place + (center[0] - 50) * width / 100
            y = 60 + center[1] * width / 100
            half = [max(1, round(a * width / 100)) for a in axes]
            cv2.ellipse(
                picture, (round(x), round(y)), half, 0, 0, 360, [level] * 3, -1
            )
    return cv2.GaussianBlur(picture, (0, 0), 1)


@pytest.fixture(scope="module")
def detector():
    return CascadeDetector()


@pytest.mark.parametrize("width", [32, 60, 120])
def test_faces_of_all_sizes_are_found_where_they_are(detector, width):
    boxes = detector(draw_faces([120, 400, 600], width))
    found = np.sort(boxes[:, 0] + boxes[:, 2] / 2)
    np.testing.assert_allclose(found, [120, 400, 600], atol=0.05 * width)
    grey = detector(draw_faces([120, 400, 600], width)[..., 0])
    np.testing.assert_array_equal(grey, boxes)


def test_pictures_without_a_face_give_no_box(detector):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (240, 320, 3), dtype=np.uint8)
    for picture in (noise, np.zeros_like(noise)):
        assert detector(picture).shape == (0, 4)


def test_larger_pictures_take_no_longer(detector):
    small = draw_faces([100, 300], 60)
    large = cv2.resize(small, None, fx=3, fy=3)
    np.testing.assert_allclose(detector(large), 3 * detector(small), atol=15)
    assert CascadeDetector(smallest=0.3)(draw_faces([100], 32)).size == 0


def test_smallest_must_be_a_part_of_the_height():
    for smallest in (0, 1.5, 30):
        with pytest.raises(ValueError, match="part of the picture's height"):
            CascadeDetector(smallest=smallest)


def test_opencv_without_the_cascade_is_named(monkeypatch):
    monkeypatch.delattr(cv2, "CascadeClassifier")
    with pytest.raises(ImportError, match="without the face cascade"):
        CascadeDetector()


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """One and two faces that walk, and none: 15 frames at 15 a second."""
    folder = tmp_path_factory.mktemp("films")
    for name, starts in (("one", [160]), ("two", [160, 320]), ("none", [])):
        frames = [
            draw_faces([start + 4 * t for start in starts], 50, (160, 480))
            for t in range(15)
        ]
        write_video(folder / f"{name}.mp4", frames, 15)
    return folder


def test_a_walking_face_by_the_command(films, tmp_path, capsys):
    out = tmp_path / "track.json"
    film = str(films / "one.mp4")
    assert main(["track", film, "-o", str(out)]) == 0
    assert "visible in 15 of 15 frames" in capsys.readouterr().out
    track = FaceTrack.load(out)
    walked = (160 + 4 * np.arange(15)) / 480 * 180
    np.testing.assert_allclose(track.doas, walked, atol=1.5)
    reverse = ["--reverse", "--yaw", "10", "-o", str(out)]
    assert main(["track", film, *reverse]) == 0
    turned = FaceTrack.load(out).doas
    np.testing.assert_allclose(turned, 170 - walked, atol=1.5)


def test_bad_input_to_the_command_writes_nothing(films, tmp_path, capsys):
    out = tmp_path / "track.json"
    sound = Path(__file__).with_suffix(".py")  # no sound at all
    cases = [
        (["none.mp4"], "no face in any of its 15 frames"),
        (["two.mp4"], "2 faces, from left to right at"),
        (["two.mp4", "--target", "3"], "number from 1 to 2"),
        (["two.mp4", "--near", "100"], "more than 15 apart"),
        (["other.mp4"], "no video"),
        (["one.mp4", "--audio", str(sound)], "cannot be read as sound"),
        (["one.mp4", "--focal", "100"], "--camera pinhole or fisheye"),
        (["one.mp4", "--camera", "fisheye"], "--focal"),
        (["one.mp4", "--bandwidth", "9"], "7.5 Hz"),
    ]
    for (name, *options), message in cases:
        film = str(films / name)
        assert main(["track", film, *options, "-o", str(out)]) == 1
        assert message in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
    nowhere = str(tmp_path / "none" / "track.json")
    assert main(["track", str(films / "one.mp4"), "-o", nowhere]) == 1
    assert "no folder" in capsys.readouterr().err
    assert main(["track", str(films / "two.mp4"), "--near", "130"]) == 0
    assert "face 2 of 2" in capsys.readouterr().out


@pytest.mark.skipif(not GRID.is_dir(), reason="needs the GRID clips")
def test_real_faces_are_found_faster_than_they_move(detector):
    """GRID: a face in 95 % of the frames of each clip, in real time."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    start = time.process_time()
    tracks = [
        track_video(Video(p), detector) for p in sorted(GRID.glob("*.mpg"))
    ]
    frames = sum(len(track.doas) for track in tracks)
    speed = frames / (time.process_time() - start)
    cv2.setNumThreads(threads)
    for track in tracks:
        assert track.faces == 1 and track.visible.mean() >= 0.95
        assert 70 < track.doa < 110  # they sit before the camera
    assert speed > 25
