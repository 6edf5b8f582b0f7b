"""Track a face through a video and smooth the direction that it gives.

Faces are expected at their last box, moved on by their speed, and paired with
the boxes of a frame so that distances add up to the least (Hungarian
algorithm); they have no identity beyond that. The direction z keeps near the
measurements y where there are any (w = 1) and bends little (Whittaker 1923):
minimise sum_t w_t (z_t - y_t)^2 + penalty * sum_t (z_t'')^2. It takes the whole
track: nothing is delayed, and it is not for live use.
"""

import math

import numpy as np
from scipy.linalg import solveh_banded
from scipy.optimize import linear_sum_assignment

from .camera import PanoramaCamera
from .face_track import FaceTrack, choose_face


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


MAX_DISTANCE = 0.7  # face widths between the expected and the found centre
GROWTH = 1.0  # what a second of absence adds to it
FURTHEST = 2.0  # and where that ends
RATIO = 1.7  # between the widths of two boxes of one face
MEMORY = 0.8  # of the speed, a frame
LONGEST_GAP = 5.0  # seconds: a look aside, not the next person on the chair


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


def _pair_boxes(expected, found, radius):
    """Pair the expected boxes of faces with those that were found."""
    if not len(expected) or not len(found):
        return []
    gap = centers(expected)[:, None] - centers(found)[None]  # [faces, boxes, 2]
    widths = expected[:, None, 2], found[None, :, 2]
    distance = np.linalg.norm(gap, axis=-1) / ((widths[0] + widths[1]) / 2)
    ratio = np.maximum(widths[0] / widths[1], widths[1] / widths[0])
    allowed = (distance < radius[:, None]) & (ratio < RATIO)
    # Pairs that are not allowed cost more than all others together
    cost = np.where(allowed, distance, 1 + FURTHEST * len(found))
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
