"""Video files: what can be read, and what is wrong with the others."""

import sys

import numpy as np
import pytest
import soundfile

from speechbrain_mpq.vision.video import Video, import_opencv

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
