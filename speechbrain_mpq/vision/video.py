"""Read video files frame by frame, and name what is broken in them."""

import os
from pathlib import Path

HINT = 'pip install "speechbrain_mpq[video]"'


def import_opencv():
    """Import OpenCV, or say how to get it.

    Returns
    -------
    cv2 : module
        OpenCV.

    Example
    -------
    >>> hasattr(import_opencv(), "VideoCapture")
    True
    """
    # Their own complaints on standard error would bury ours
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            f"videos and faces need OpenCV, which is not installed: {HINT}"
        ) from error
    return cv2


class Video:
    """Read a video file: its size, its frame rate, its frames in order.

    Arguments
    ---------
    path : str | Path
        Any container and codec that OpenCV's FFmpeg reads.

    Example
    -------
    >>> Video("no/such/film.mp4")
    Traceback (most recent call last):
    FileNotFoundError: no video no/such/film.mp4
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no video {path}")
        cv2 = import_opencv()
        capture = self._open()
        self.width = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH))
        self.height = int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        self.fps = float(capture.get(cv2.CAP_PROP_FPS))
        self.declared = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        capture.release()
        if not 1 <= self.fps <= 1000:
            raise ValueError(
                f"{path} says that it has {self.fps:g} frames per second: "
                f"{_reencode()}"
            )

    def __iter__(self):
        """Frames as [height, width, 3] arrays of bytes: blue, green, red."""
        cv2 = import_opencv()
        capture = self._open()
        count = start = 0
        try:
            while True:
                found, frame = capture.read()
                if not found:
                    break
                time = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000  # seconds
                start = time if count == 0 else start
                self._check_time(count, time - start)
                yield frame
                count += 1
        finally:
            capture.release()
        self._check_count(count)

    def _open(self):
        """A capture at the first frame."""
        cv2 = import_opencv()
        # Never the reader of numbered pictures, nor a camera: files only
        capture = cv2.VideoCapture(str(self.path), cv2.CAP_FFMPEG)
        if not capture.isOpened():
            raise ValueError(
                f"{self.path} cannot be read as a video: it holds none, or "
                "the file is damaged or cut short"
            )
        return capture

    def _check_time(self, count, time):
        """A frame more than one frame from its place: some are missing."""
        expected = count / self.fps
        # Containers round to a millisecond; backends without times say 0
        if time and abs(time - expected) > 1 / self.fps + 0.002:
            raise ValueError(
                f"{self.path}: frame {count} stands at {time:.3f} s instead "
                f"of {expected:.3f} s: frames are missing or their rate "
                f"varies: {_reencode()}"
            )

    def _check_count(self, count):
        """Fewer frames than declared: the file is damaged."""
        if count < 2:
            raise ValueError(f"{self.path} holds {count} frames: not a video")
        # Some containers declare duration times rate, which may be off by
        # a frame or two
        if count < self.declared - max(2, 0.02 * self.declared):
            raise ValueError(
                f"{self.path} declares {self.declared:.0f} frames, but only "
                f"{count} can be read: the file is damaged or cut short"
            )


def _reencode():
    """What to do about frames at uneven times."""
    return "re-encode it, as by `ffmpeg -i in.mp4 -r 25 out.mp4`"
