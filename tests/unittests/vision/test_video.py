"""Video files: what can be read, and what is wrong with the others."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechbrain_mpq.__main__ import main
from speechbrain_mpq.vision.face_tracking import FaceTrack, track_video
from speechbrain_mpq.vision.video import (
    CascadeDetector,
    Video,
    _bridged,
    _crop_mouth,
    _frames_on_view,
    _mouth_boxes,
    _steady,
    import_opencv,
    mouth_pictures,
)

cv2 = pytest.importorskip("cv2")


def write_video(path, frames, fps, codec="mp4v"):
    """A small film."""
    height, width = frames[0].shape[:2]
    code = cv2.VideoWriter_fourcc(*codec)
    writer = cv2.VideoWriter(str(path), code, fps, (width, height))
    for frame in frames:
        writer.write(frame)
    writer.release()
    return path


def noise(count, seed=0):
    """Frames that no codec can make small."""
    rng = np.random.default_rng(seed)
    return list(rng.integers(0, 255, (count, 48, 64, 3), dtype=np.uint8))


@pytest.fixture
def film(tmp_path):
    return write_video(tmp_path / "film.mp4", noise(30), 30)


@pytest.mark.parametrize(
    "name, codec, fps",
    [("a.mp4", "mp4v", 25), ("a.avi", "MJPG", 29.97), ("a.mkv", "FFV1", 12.5)],
)
def test_frames_arrive_in_order_at_their_rate(tmp_path, name, codec, fps):
    grey = [np.full((48, 64, 3), 20 * t, np.uint8) for t in range(12)]
    video = Video(write_video(tmp_path / name, grey, fps, codec))
    assert (video.width, video.height) == (64, 48)
    assert video.fps == pytest.approx(fps, rel=1e-3)
    for _ in range(2):  # as often as one likes
        levels = [frame.mean() for frame in video]
        np.testing.assert_allclose(levels, np.arange(12) * 20, atol=6)


def test_missing_file_and_missing_opencv(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no video"):
        Video(tmp_path / "none.mp4")
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"speechbrain_mpq\[video\]"):
        import_opencv()


def test_what_is_no_video_is_named(tmp_path):
    sound = tmp_path / "sound.wav"
    soundfile.write(sound, np.zeros(1600), 16000)
    (tmp_path / "text.mp4").write_text("no film\n" * 100)
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ("sound.wav", "text.mp4", "empty.mp4"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            Video(tmp_path / name)
    picture = tmp_path / "picture.png"
    cv2.imwrite(str(picture), noise(1)[0])
    with pytest.raises(ValueError, match="not a video"):
        list(Video(picture))


def test_files_cut_short_are_named(film):
    content = film.read_bytes()
    film.write_bytes(content[: len(content) // 2])  # the index is at the end
    with pytest.raises(ValueError, match="film.mp4 cannot be read"):
        Video(film)
    # As an interrupted copy of a file with its index in front
    third = len(content) // 3
    film.write_bytes(content[:third] + bytes(third) + content[2 * third :])
    with pytest.raises(ValueError, match="film.mp4.*(missing|damaged)"):
        list(Video(film))


class UnevenCapture:
    """A capture whose clock jumps by half a second at the tenth frame."""

    def __init__(self, capture):
        self.capture, self.frames = capture, 0
        self.release = capture.release

    def read(self):
        self.frames += 1
        return self.capture.read()

    def get(self, key):
        late = 500 if self.frames > 10 else 0
        return self.capture.get(key) + late * (key == cv2.CAP_PROP_POS_MSEC)


def test_frames_at_uneven_times_are_refused(film, monkeypatch):
    video = Video(film)
    assert len(list(video)) == 30
    opened = video._open
    monkeypatch.setattr(video, "_open", lambda: UnevenCapture(opened()))
    with pytest.raises(ValueError, match="frame 10 stands at 0.833 s.*0.333"):
        list(video)


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
    from speechbrain_mpq.vision.face_tracking import track_video
    from speechbrain_mpq.vision.video import CascadeDetector, Video

    video = Video(GRID / "lrwp9a.mpg")
    track = track_video(video, CascadeDetector(), target="largest")
    pictures = mouth_pictures(video, track.boxes, (24, 32), video.fps)
    assert (pictures.reshape(len(pictures), -1).max(1) > 0).mean() > 0.95
    motion = np.abs(np.diff(pictures.astype(float), axis=0)).mean(0)
    lips, cheeks = motion[6:18, 8:24].mean(), motion[:4].mean()
    assert lips > 1.5 * cheeks
