"""Track the target's face through a video, to the directions of the separator.

Boxes come as JSON, {"fps": 25, "width": 360, "height": 288, "frames":
[[[x, y, w, h], ...], [], ...]}, in pixels, or as .npy, [frames, 4] or [frames,
faces, 4], NaN for a box that is not there. A track file is JSON: "version",
"source", "fps", "width", "height", "faces" (how many there were), "target"
(which of them, from the left, from 1), "doa" (the utterance's, degrees), and a
frame each "doas", "visible" and "boxes" ([x, y, width, height] or null).

Faces are expected at their last box, moved on by their speed, and paired with
the boxes of a frame so that distances add up to the least (Hungarian
algorithm); they have no identity beyond that. The direction z keeps near the
measurements y where there are any (w = 1) and bends little (Whittaker 1923):
minimise sum_t w_t (z_t - y_t)^2 + penalty * sum_t (z_t'')^2. It takes the whole
track: nothing is delayed, and it is not for live use.

A video frame stands at its number divided by the frame rate; the frame t of
the spectrogram has its middle at t hops. Tracks of any frame rate fit.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.linalg import solveh_banded
from scipy.optimize import linear_sum_assignment

from ..utils import (
    check_numbers,
    is_number,
    plain_name,
    read_text,
    strict_json,
    write_text,
)
from .camera import PanoramaCamera

VERSION = 1
MAX_DISTANCE = 0.7  # face widths between the expected and the found centre
GROWTH = 1.0  # what a second of absence adds to it
FURTHEST = 2.0  # and where that ends
RATIO = 1.7  # between the widths of two boxes of one face
MEMORY = 0.8  # of the speed, a frame
LONGEST_GAP = 5.0  # seconds: a look aside, not the next person on the chair
FRAME_RATE = 62.5  # spectrogram frames per second: hop of 256 at 16 kHz
SLACK = 0.5  # seconds that sound and picture may differ in length
TOLERANCE = 15.0  # degrees: the width of the paper's nearest angle bucket


def read_boxes(path):
    """Read the boxes of all frames, with frame rate and size if given.

    Returns
    -------
    detections : list of np.ndarray
        For each frame [boxes, 4].
    """
    path, about = Path(path), {}
    try:
        if path.suffix == ".npy":
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file")
            # Mapped: a header may tell of more than there is memory for
            frames = list(np.load(path, mmap_mode="r", allow_pickle=False))
        else:
            content = strict_json(read_text(path))
            frames = content["frames"]
            for boxes in frames:
                if not isinstance(boxes, list):
                    raise ValueError(f"{boxes!r} stands for a frame's boxes")
                check_numbers(boxes, "a box", null=True)
            about = _about(content)
        detections = [_check_boxes(boxes) for boxes in frames]
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise ValueError(f"{path} holds no face boxes: {error}") from error
    if not detections:
        raise ValueError(f"{path} holds no frames")
    return detections, about


def _about(content):
    """Frame rate and size, as far as they are there."""
    about = {}
    for name in ("fps", "width", "height"):
        if name in content:
            about[name] = float(check_numbers(content[name], name))
            if not 0 < about[name] < float("inf"):
                raise ValueError(f"{name} is {content[name]}")
    return about


def _check_boxes(boxes):
    """The boxes of one frame as an array, without those of NaN."""
    boxes = np.asarray(boxes, dtype=float)
    if boxes.size == 0:
        return np.empty((0, 4))
    if boxes.shape[-1] != 4 or boxes.ndim > 2:
        raise ValueError(
            f"expected boxes [x, y, width, height], got {list(boxes.shape)}"
        )
    boxes = boxes.reshape(-1, 4)
    boxes = boxes[~np.isnan(boxes).any(axis=1)]
    if not np.isfinite(boxes).all():
        raise ValueError("a box is infinite")
    for width, height in boxes[:, 2:]:
        if width <= 0 or height <= 0:
            raise ValueError(f"a box is {width:g} x {height:g} pixels")
    return boxes


def choose_face(doas, widths, target=None, near=None):
    """Choose the target's face.

    Arguments
    ---------
    doas : sequence of float
        Direction of each face in degrees, faces from left to right.
    near : float | None
        Instead of `target`: the face nearest to this direction, in degrees.
    """
    if target is not None and near is not None:
        raise ValueError("give a target or a direction near it, not both")
    if near is not None:
        return int(np.argmin(np.abs(np.asarray(doas) - near)))
    if target == "largest":
        return int(np.argmax(widths))
    listed = ", ".join(f"{doa:.0f}" for doa in doas)
    if target is None:
        if len(doas) > 1:
            raise ValueError(
                f"{len(doas)} faces, from left to right at {listed} degrees: "
                'say which one is the target, by its number, "largest", or '
                "the direction that it is near to"
            )
        return 0
    if not isinstance(target, int) or not 1 <= target <= len(doas):
        raise ValueError(
            f'target must be "largest" or a number from 1 to {len(doas)} '
            f"(faces from left to right at {listed} degrees), got {target!r}"
        )
    return target - 1


@dataclass
class FaceTrack:
    """A face through the frames of a video.

    Arguments
    ---------
    doas : np.ndarray
        [frames], smoothed direction of arrival in degrees; held and bridged
        where the face is lost.
    boxes : np.ndarray
        [frames, 4], x, y, width, height in pixels as found, NaN where lost.
    fps : float
        Frames per second.
    width, height : int
        Of the picture, pixels.
    faces, target : int
        How many faces there were, and the number of this one from the left.
    source : str
        Where it comes from.

    Example
    -------
    >>> boxes = np.array([[170.0, 90, 20, 20], [np.nan] * 4])
    >>> track = FaceTrack(np.array([90.0, 90.0]), boxes, 25, 360, 288)
    >>> track.visible
    array([ True, False])
    >>> track.doa, track.seconds
    (90.0, 0.08)
    """

    doas: np.ndarray
    boxes: np.ndarray
    fps: float
    width: int
    height: int
    faces: int = 1
    target: int = 1
    source: str = ""

    @property
    def visible(self):
        """Frames in which the face was found, [frames] of bool."""
        return np.isfinite(self.boxes[:, 0])

    @property
    def doa(self):
        """One direction for all: the median where the face is visible."""
        return float(np.median(self.doas[self.visible]))

    @property
    def seconds(self):
        """Duration."""
        return len(self.doas) / self.fps

    def save(self, path):
        """Write the track file atomically."""
        boxes = self.boxes.round(2).tolist()
        content = {
            "version": VERSION,
            "source": self.source and plain_name(self.source),
            "fps": self.fps,
            "width": self.width,
            "height": self.height,
            "faces": self.faces,
            "target": self.target,
            "doa": round(self.doa, 3),
            "doas": self.doas.round(3).tolist(),
            "visible": self.visible.tolist(),
            "boxes": [b if v else None for b, v in zip(boxes, self.visible)],
        }
        write_text(Path(path), json.dumps(content, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path):
        """Read a track file."""
        try:
            content = strict_json(read_text(path))
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']}")
            lost = [np.nan] * 4
            _check_content(content)
            track = cls(
                np.array(content["doas"], dtype=float),
                np.array([box or lost for box in content["boxes"]], float),
                *(content[name] for name in ("fps", "width", "height")),
                *(content[name] for name in ("faces", "target", "source")),
            )
            track.check()
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a track: {error}") from error
        return track

    def check_video(self, video):
        """Raise ValueError unless a video may be what the track is from."""
        own = self.width, self.height, self.fps
        size = video.width, video.height, video.fps
        if own[:2] != size[:2] or abs(own[2] - size[2]) > 0.01 * own[2]:
            video_text = "{:g} x {:g} pixels at {:g} frames a second"
            raise ValueError(
                f"the track is from a video of {video_text.format(*own)}, "
                f"{video.path} has {video_text.format(*size)}: run "
                "`speechbrain-mpq track` on this one"
            )

    def check(self):
        """Raise ValueError on a track that contradicts itself."""
        if self.doas.ndim != 1 or self.boxes.shape != (len(self.doas), 4):
            raise ValueError(
                f"{len(self.doas)} directions for {len(self.boxes)} frames"
            )
        if (self.boxes[:, 2:] <= 0).any():
            raise ValueError("a box has no size")
        if not self.visible.any():
            raise ValueError("the face is visible in no frame")
        if not ((self.doas >= 0) & (self.doas <= 180)).all():
            raise ValueError("a direction is not in 0 to 180 degrees")
        if not 1 <= self.fps <= 1000:
            raise ValueError(f"{self.fps} frames per second")


def _check_content(content):
    """Raise ValueError where a track file has no number where one is meant."""
    for name in ("version", "fps", "width", "height", "faces", "target"):
        if not is_number(content[name]):
            raise ValueError(f"{name} is {content[name]!r}")
    check_numbers(content["doas"], "doas")
    check_numbers(content["boxes"], "a box", null=True)
    if not isinstance(content["source"], str):
        raise ValueError(f"source is {content['source']!r}")


def _bend_penalty(bandwidth, fps):
    """Penalty that halves a sway of `bandwidth` Hz."""
    if not 0 < bandwidth <= fps / 2:
        raise ValueError(
            f"bandwidth must lie in 0 to {fps / 2:g} Hz, half the frame rate, "
            f"got {bandwidth}"
        )
    return (2 - 2 * math.cos(2 * math.pi * bandwidth / fps)) ** -2


def smooth(values, penalty):
    """Smooth a track; gaps are bridged and the ends held.

    Arguments
    ---------
    values : np.ndarray
        [frames], NaN where nothing was measured.

    Returns
    -------
    smooth : np.ndarray
        [frames]. Across a gap it goes straight from the last to the next
        smoothed value; before the first and after the last measurement it
        stays.
    """
    seen = np.flatnonzero(np.isfinite(values))
    if not len(seen):
        raise ValueError("nothing was measured: all values are NaN")
    if len(seen) < 3:  # a straight line goes through them
        smoothed = values
    else:
        inside = slice(seen[0], seen[-1] + 1)
        smoothed = np.full(len(values), np.nan)
        smoothed[inside] = _whittaker(values[inside], penalty)
    return np.interp(np.arange(len(values)), seen, smoothed[seen])


def _whittaker(values, penalty):
    """Solve (W + penalty D'D) z = W y, D the second differences."""
    weights = np.isfinite(values).astype(float)
    frames = len(values)
    bands = np.zeros((3, frames))  # upper form: diagonal k is row 2 - k
    for shift, weight in enumerate((1, 4, 1)):
        bands[2, shift : frames - 2 + shift] += weight
    bands[1, 1:-1] -= 2
    bands[1, 2:] -= 2
    bands[0, 2:] = 1
    bands *= penalty
    bands[2] += weights
    return solveh_banded(bands, np.where(weights > 0, values, 0.0))


def centers(boxes):
    """Compute the centres of boxes.

    Arguments
    ---------
    boxes : np.ndarray
        [..., 4], x, y, width, height.

    Returns
    -------
    centers : np.ndarray
        [..., 2].
    """
    return boxes[..., :2] + boxes[..., 2:] / 2


def _pair_boxes(expected, boxes, radius):
    """Pair the expected boxes of faces with those that were found."""
    if not len(expected) or not len(boxes):
        return []
    gap = centers(expected)[:, None] - centers(boxes)[None]  # [faces, boxes, 2]
    widths = expected[:, None, 2], boxes[None, :, 2]
    distance = np.linalg.norm(gap, axis=-1) / ((widths[0] + widths[1]) / 2)
    ratio = np.maximum(widths[0] / widths[1], widths[1] / widths[0])
    allowed = (distance < radius[:, None]) & (ratio < RATIO)
    # Pairs that are not allowed cost more than all others together
    cost = np.where(allowed, distance, 1 + FURTHEST * len(boxes))
    rows, columns = linear_sum_assignment(cost)
    pairs = zip(rows.tolist(), columns.tolist())
    return [(i, j) for i, j in pairs if allowed[i, j]]


class _Face:
    """A face on its way through the frames."""

    def __init__(self, frame, box):
        self.boxes = {frame: box}
        self.last = frame
        self.speed = np.zeros(2)  # pixels a frame

    def expected(self, frame):
        """Where it should be; it is not expected to go on for long."""
        box = self.boxes[self.last].copy()
        box[:2] += self.speed * min(frame - self.last, 5)
        return box

    def radius(self, frame, fps):
        """How far from there it may be, in its widths."""
        return min(MAX_DISTANCE + GROWTH * (frame - self.last) / fps, FURTHEST)

    def add(self, frame, box):
        """Found again."""
        step = centers(box) - centers(self.boxes[self.last])
        step = step / (frame - self.last)
        self.speed = MEMORY * self.speed + (1 - MEMORY) * step
        self.boxes[frame] = box
        self.last = frame


def _link_faces(detections, fps, persistence=0.1, longest_gap=LONGEST_GAP):
    """Follow faces through the frames: [faces, frames, 4], NaN: not found."""
    faces = []
    for frame, boxes in enumerate(detections):
        boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
        awaited = [f for f in faces if frame - f.last <= longest_gap * fps]
        expected = np.array([face.expected(frame) for face in awaited])
        radius = np.array([face.radius(frame, fps) for face in awaited])
        pairs = _pair_boxes(expected, boxes, radius)
        for face, box in pairs:
            awaited[face].add(frame, boxes[box])
        taken = {box for _, box in pairs}
        new = [box for i, box in enumerate(boxes) if i not in taken]
        faces.extend(_Face(frame, box) for box in new)
    least = max(1, persistence * len(detections))
    kept = [face for face in faces if len(face.boxes) >= least]
    return _as_array(kept, len(detections))


def _as_array(faces, frames):
    """[faces, frames, 4] with NaN for the gaps, from left to right."""
    array = np.full((len(faces), frames, 4), np.nan)
    for row, face in zip(array, faces):
        row[list(face.boxes)] = list(face.boxes.values())
    middle = [np.nanmedian(centers(row)[:, 0]) for row in array]
    return array[np.argsort(middle, kind="stable")]


def track_boxes(
    detections,
    fps,
    size,
    camera=None,
    target=None,
    near=None,
    bandwidth=1.0,
    source="boxes",
):
    """Track the target's face through the boxes of all frames.

    Arguments
    ---------
    detections : sequence of np.ndarray
        For each frame [boxes, 4]: x, y, width, height in pixels.
    bandwidth : float
        Hz: sways of this frequency are halved, slower ones stay.
    """
    camera = PanoramaCamera(size[0]) if camera is None else camera
    penalty = _penalty(bandwidth, fps, source)
    faces = _link_faces(detections, fps)  # [faces, frames, 4]
    if not len(faces):
        raise ValueError(
            f"{source}: no face in any of its {len(detections)} frames (or "
            "in too few of them to be one)"
        )
    points = centers(faces)  # [faces, frames, 2]
    _check_inside(points, size, source)
    doas = camera.doa(points[..., 0], points[..., 1])  # [faces, frames]
    try:
        chosen = choose_face(
            np.nanmedian(doas, axis=1),
            np.nanmedian(faces[:, :, 2], axis=1),
            target,
            near,
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return FaceTrack(
        doas=np.clip(smooth(doas[chosen], penalty), 0, 180),
        boxes=faces[chosen],
        fps=fps,
        width=int(size[0]),
        height=int(size[1]),
        faces=len(faces),
        target=chosen + 1,
        source=source,
    )


def track_video(video, detector, bandwidth=1.0, **kwargs):
    """Find the faces in a video and follow the target's.

    Arguments
    ---------
    video : Video
        The file.
    detector : callable
        From a frame [height, width, 3] to boxes [faces, 4].
    bandwidth : float
        See `track_boxes`.
    **kwargs
        See `track_boxes`.

    Returns
    -------
    track : FaceTrack
        Of the target.
    """
    source = str(video.path)
    _penalty(bandwidth, video.fps, source)  # complain before the long part
    return track_boxes(
        [detector(frame) for frame in video],
        video.fps,
        size=(video.width, video.height),
        bandwidth=bandwidth,
        source=source,
        **kwargs,
    )


def _penalty(bandwidth, fps, source):
    """The smoother's penalty, errors with the video's name."""
    if not 1 <= fps <= 1000:
        raise ValueError(f"{source}: {fps} is no number of frames per second")
    try:
        return _bend_penalty(bandwidth, fps)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _check_inside(points, size, source):
    """Faces outside of the picture: boxes and size are of two videos."""
    if (points < 0).any() or (points > size).any():
        x, y = np.nanmax(np.abs(points), axis=(0, 1))
        raise ValueError(
            f"{source}: a face is centred at ({x:.0f}, {y:.0f}) or so, which "
            f"is not in a picture of {size[0]:g} x {size[1]:g} pixels: give "
            "the size of the video that the boxes are from"
        )


def _doa_at(track, times):
    """Direction at any time; before and after the track its ends."""
    return np.interp(times, np.arange(len(track.doas)) / track.fps, track.doas)


def frame_doas(track, frames, frame_rate=FRAME_RATE, slack=SLACK):
    """Interpolate a direction for every frame of the spectrogram.

    Arguments
    ---------
    track : FaceTrack
        Of the target.
    frames : int
        Frames of the spectrogram: samples // hop + 1.
    frame_rate : float
        Of the spectrogram, Hz.
    slack : float
        Seconds that sound and picture may differ in length.

    Returns
    -------
    doa : np.ndarray
        [frames], degrees, float32.

    Example
    -------
    >>> from speechbrain_mpq.vision.face_tracking import FaceTrack
    >>> track = FaceTrack(np.full(25, 70.0), np.ones((25, 4)), 25, 360, 288)
    >>> frame_doas(track, frames=63).shape
    (63,)
    """
    check_length(track, (frames - 1) / frame_rate, slack)
    return _doa_at(track, np.arange(frames) / frame_rate).astype(np.float32)


def check_length(track, seconds, slack=SLACK):
    """Raise ValueError unless sound and picture are about equally long.

    Arguments
    ---------
    seconds : float
        Duration of the sound.
    """
    if abs(track.seconds - seconds) > slack:
        raise ValueError(
            f"the sound lasts {seconds:.2f} s, the face's track "
            f"{track.seconds:.2f} s: give the video that belongs to the "
            f"sound, or cut one of them (up to {slack:g} s may be missing)"
        )


def check_agreement(track, doa, tolerance=TOLERANCE):
    """Raise ValueError where a known direction is not the face's.

    Arguments
    ---------
    track : FaceTrack
        Of the target.
    doa : float
        Direction from elsewhere, degrees.
    tolerance : float
        Degrees by which they may differ.

    Example
    -------
    >>> from speechbrain_mpq.vision.face_tracking import FaceTrack
    >>> track = FaceTrack(np.full(25, 70.0), np.ones((25, 4)), 25, 360, 288)
    >>> check_agreement(track, 75.0)
    >>> check_agreement(track, 110.0)
    Traceback (most recent call last):
    ValueError: the face is at 70 degrees, the given direction is 110: ...
    """
    if not abs(track.doa - doa) <= tolerance:
        raise ValueError(
            f"the face is at {track.doa:.0f} degrees, the given direction is "
            f"{doa:.0f}: more than {tolerance:g} apart. Is it another face, "
            "is the array the other way round (reverse), or is the camera "
            "turned (yaw) or of another kind?"
        )
