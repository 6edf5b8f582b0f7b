"""Videos of talkers: frames are read, faces found, mouths cropped.

Faces are found by the detector of Viola and Jones (2001) with OpenCV's trained
file `haarcascade_frontalface_alt2`, which needs no download. It finds upright
faces that look at the camera to about 30 degrees; it is no neural network,
and faces in profile or behind a hand are lost. Whoever has a better detector
gives its boxes, or any function from a frame to boxes, instead.

In the boxes of a frontal-face detector the mouth is a little below three
quarters of the height and a quarter of the width wide (measured on GRID).
A picture shows twice that.
"""

import os
from pathlib import Path

import numpy as np

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
                more, frame = capture.read()
                if not more:
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


CASCADE = "haarcascade_frontalface_alt2.xml"
FACE = 24  # pixels: pictures are shrunk until the smallest face is this wide


class CascadeDetector:
    """Find faces by OpenCV's bundled frontal-face cascade.

    Arguments
    ---------
    smallest : float
        Width of the smallest face, as a part of the picture's height. The
        time for a picture grows with its inverse square, and does not depend
        on the picture's size.
    neighbours : int
        Hits that must overlap for a face: more misses more faces and finds
        fewer false ones.

    Example
    -------
    >>> detector = CascadeDetector()
    >>> detector(np.zeros((288, 360, 3), np.uint8)).shape  # no face
    (0, 4)
    """

    def __init__(self, smallest=0.1, neighbours=5):
        if not 0 < smallest <= 1:
            raise ValueError(
                "smallest is a part of the picture's height, 0 to 1, got "
                f"{smallest}"
            )
        self.smallest = smallest
        self.neighbours = neighbours
        self.cascade = _load_cascade()

    def __call__(self, frame):
        """Find the faces.

        Arguments
        ---------
        frame : np.ndarray
            [height, width, 3] or [height, width], bytes.

        Returns
        -------
        boxes : np.ndarray
            [faces, 4], x, y, width and height in pixels of the frame, from
            left to right.
        """
        cv2 = import_opencv()
        if frame.ndim == 3:
            frame = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)
        scale = min(1.0, FACE / (self.smallest * frame.shape[0]))
        if scale < 1:
            frame = cv2.resize(
                frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA
            )
        boxes = self.cascade.detectMultiScale(
            frame,
            scaleFactor=1.1,
            minNeighbors=self.neighbours,
            minSize=(FACE - 4, FACE - 4),  # steps of 10 % may jump over it
        )
        boxes = np.asarray(boxes, dtype=float).reshape(-1, 4) / scale
        return boxes[np.argsort(boxes[:, 0])]


def _load_cascade():
    """The classifier; OpenCV 5 has moved it out of its main package."""
    cv2 = import_opencv()
    path = Path(cv2.data.haarcascades) / CASCADE
    if not hasattr(cv2, "CascadeClassifier") or not path.is_file():
        raise ImportError(
            f"OpenCV {cv2.__version__} comes without the face cascade: {HINT}"
        )
    return cv2.CascadeClassifier(str(path))


STEADY = 9  # frames over which a box is averaged: detectors tremble
BRIDGE = 1.0  # seconds over which a lost face is taken to be where it was
FPS = 25.0  # pictures a second that lip streams take
HEIGHT_OF_MOUTH = 0.81  # its middle, in face boxes
WIDTH_OF_PICTURE = 0.45  # in face boxes


def _mouth_boxes(faces, size):
    """Boxes of the mouth's pictures, from those of the face."""
    faces = np.asarray(faces, dtype=float)
    if faces.ndim != 2 or faces.shape[1] != 4:
        raise ValueError(
            f"expected face boxes [frames, 4], got {list(faces.shape)}"
        )
    x, y, across, down = faces.T
    width = WIDTH_OF_PICTURE * across
    height = width * size[0] / size[1]
    left = x + across / 2 - width / 2
    top = y + HEIGHT_OF_MOUTH * down - height / 2
    return np.stack([left, top, width, height], axis=1)


def _steady(boxes, frames=STEADY):
    """Boxes averaged over the frames around, where there are any."""
    seen = np.isfinite(boxes).all(axis=1)
    margin = [(frames // 2, frames // 2), (0, 0)]
    values = np.pad(np.where(seen[:, None], boxes, 0), margin)
    counts = np.pad(seen[:, None].astype(float), margin)
    windows = np.lib.stride_tricks.sliding_window_view
    total = windows(values, frames, axis=0).sum(-1)
    count = windows(counts, frames, axis=0).sum(-1)
    return np.where(seen[:, None], total / np.maximum(count, 1), np.nan)


def _bridged(boxes, longest):
    """Fill short gaps on a line between the boxes around them."""
    boxes = np.array(boxes, dtype=float)
    seen = np.flatnonzero(np.isfinite(boxes).all(axis=1))
    for before, after in zip(seen[:-1], seen[1:]):
        if 1 < after - before <= longest + 1:
            gap = np.arange(before + 1, after)
            share = ((gap - before) / (after - before))[:, None]
            boxes[gap] = (1 - share) * boxes[before] + share * boxes[after]
    return boxes


def _frames_on_view(frames, fps):
    """Index of the frame that is on view at each picture's time."""
    if not fps > 0:
        raise ValueError(f"a frame rate must be above 0, got {fps}")
    pictures = max(1, int(frames * FPS / fps + 1e-6))
    index = (np.arange(pictures) * fps / FPS + 1e-6).astype(int)
    return np.minimum(index, frames - 1)


def _crop_mouth(frame, box, size):
    """One picture of a mouth, 1 to 255; zeros where there is no face."""
    if np.isnan(box).any():
        return np.zeros(size, np.uint8)
    left, top = np.floor(box[:2]).astype(int)
    right, bottom = np.ceil(box[:2] + box[2:]).astype(int)
    rows = np.clip(np.arange(top, bottom), 0, frame.shape[0] - 1)
    columns = np.clip(np.arange(left, right), 0, frame.shape[1] - 1)
    cut = frame[rows[:, None], columns].astype(np.float32)
    if cut.ndim == 3:
        cut = cut @ np.array([0.114, 0.587, 0.299], np.float32)
    return np.clip(np.rint(_resized(cut, size)), 1, 255).astype(np.uint8)


def mouth_pictures(frames, faces, size, fps=FPS, bridge=BRIDGE):
    """Crop pictures of a mouth at 25 a second, as a lip stream takes them.

    Arguments
    ---------
    frames : iterable of np.ndarray
        A video's frames, see `_crop_mouth`.
    faces : np.ndarray
        [frames, 4], the face's boxes in pixels; NaN: not found.
    size : (int, int)
        Height and width of a picture.
    fps : float
        Frames a second.
    bridge : float
        Seconds: shorter gaps are filled in, see `_bridged`.

    Returns
    -------
    pictures : np.ndarray
        [pictures, height, width], bytes; zeros where there is no face.

    Example
    -------
    >>> frames = np.full((4, 90, 120), 100, np.uint8)
    >>> faces = np.array([[10.0, 10, 60, 60]] * 3 + [[np.nan] * 4])
    >>> mouth_pictures(frames, faces, (24, 32), fps=50).shape
    (2, 24, 32)
    """
    boxes = _steady(_bridged(_mouth_boxes(faces, size), bridge * fps))
    pictures = []
    for frame in frames:
        if len(pictures) == len(boxes):
            raise _wrong_count(len(boxes), "more")
        pictures.append(_crop_mouth(frame, boxes[len(pictures)], size))
    if len(pictures) < len(boxes):
        raise _wrong_count(len(boxes), f"only {len(pictures)}")
    return np.stack(pictures)[_frames_on_view(len(pictures), fps)]


def _wrong_count(boxes, frames):
    """An error for boxes of another video."""
    return ValueError(
        f"{boxes} face boxes, but {frames} frames: give the boxes that were "
        "found in this video"
    )


def _resized(picture, size):
    """Shrunk by averaging, or enlarged by interpolation, as float32."""
    import torch
    import torch.nn.functional as F

    image = torch.from_numpy(picture)[None, None]
    return F.interpolate(
        image, size, mode="bilinear", antialias=True, align_corners=False
    )[0, 0].numpy()
