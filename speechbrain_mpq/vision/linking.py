"""Which box of a frame is the same face as which box of the frame before.

A face goes on where it is expected: at its last box, moved on by its speed.
Faces and boxes are paired so that the distances add up to the least
(Hungarian algorithm); pairs that are too far apart, or of too different a
size, are none. Faces have no identity beyond that: two that hide each other
for long may come out exchanged, and one that comes back after long is another
one.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

REACH = 0.7  # face widths between the expected and the found centre
GROWTH = 1.0  # what a second of absence adds to it
FURTHEST = 2.0  # and where that ends
RATIO = 1.7  # between the widths of two boxes of one face
MEMORY = 0.8  # of the speed, a frame
LONGEST_GAP = 5.0  # seconds: a look aside, not the next person on the chair


def centers(boxes):
    """Centres of boxes.

    Arguments
    ---------
    boxes : np.ndarray
        [..., 4], x, y, width, height.

    Returns
    -------
    centers : np.ndarray
        [..., 2].

    Example
    -------
    >>> centers(np.array([10.0, 20.0, 4.0, 6.0]))
    array([12., 23.])
    """
    return boxes[..., :2] + boxes[..., 2:] / 2


def pair_boxes(expected, found, reach):
    """Pair the expected boxes of faces with those that were found.

    Arguments
    ---------
    expected : np.ndarray
        [faces, 4].
    found : np.ndarray
        [boxes, 4].
    reach : np.ndarray
        [faces], how far each may be from where it was expected, in its
        widths.

    Returns
    -------
    pairs : list of (int, int)
        Index of the face, index of the box.

    Example
    -------
    >>> expected = np.array([[0.0, 0, 10, 10], [50, 0, 10, 10]])
    >>> found = np.array([[52.0, 0, 10, 10], [90, 0, 10, 10]])
    >>> pair_boxes(expected, found, reach=np.ones(2))
    [(1, 0)]
    """
    if not len(expected) or not len(found):
        return []
    gap = centers(expected)[:, None] - centers(found)[None]  # [faces, boxes, 2]
    widths = expected[:, None, 2], found[None, :, 2]
    distance = np.linalg.norm(gap, axis=-1) / ((widths[0] + widths[1]) / 2)
    ratio = np.maximum(widths[0] / widths[1], widths[1] / widths[0])
    allowed = (distance < reach[:, None]) & (ratio < RATIO)
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

    def reach(self, frame, fps):
        """How far from there it may be, in its widths."""
        return min(REACH + GROWTH * (frame - self.last) / fps, FURTHEST)

    def add(self, frame, box):
        """Found again."""
        step = centers(box) - centers(self.boxes[self.last])
        step = step / (frame - self.last)
        self.speed = MEMORY * self.speed + (1 - MEMORY) * step
        self.boxes[frame] = box
        self.last = frame


def link_faces(detections, fps, persistence=0.1, longest_gap=LONGEST_GAP):
    """Follow all faces through the frames.

    Arguments
    ---------
    detections : sequence of np.ndarray
        For each frame [boxes, 4], in any order.
    fps : float
        Frames per second.
    persistence : float
        Faces in fewer than this part of the frames are taken for false
        detections and left out.
    longest_gap : float
        Seconds after which a face that was lost is not waited for any more: a
        box at its place is a new face then.

    Returns
    -------
    faces : np.ndarray
        [faces, frames, 4], from left to right (by their median position);
        NaN where a face was not found.

    Example
    -------
    >>> left, right = [0.0, 0, 10, 10], [80.0, 0, 10, 10]
    >>> frames = [[left, right], [right], [right, left]]
    >>> link_faces([np.array(f) for f in frames], fps=25)[:, :, 0]
    array([[ 0., nan,  0.],
           [80., 80., 80.]])
    """
    faces = []
    for frame, boxes in enumerate(detections):
        boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
        awaited = [f for f in faces if frame - f.last <= longest_gap * fps]
        expected = np.array([face.expected(frame) for face in awaited])
        reach = np.array([face.reach(frame, fps) for face in awaited])
        pairs = pair_boxes(expected, boxes, reach)
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
