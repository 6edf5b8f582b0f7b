"""Crop pictures of a talker's mouth from a video, by the boxes of the face.

In the boxes of a frontal-face detector the mouth is a little below three
quarters of the height and a quarter of the width wide (measured on GRID).
A picture shows twice that.
"""

import numpy as np

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
    found = np.isfinite(boxes).all(axis=1)
    margin = [(frames // 2, frames // 2), (0, 0)]
    values = np.pad(np.where(found[:, None], boxes, 0), margin)
    counts = np.pad(found[:, None].astype(float), margin)
    windows = np.lib.stride_tricks.sliding_window_view
    total = windows(values, frames, axis=0).sum(-1)
    count = windows(counts, frames, axis=0).sum(-1)
    return np.where(found[:, None], total / np.maximum(count, 1), np.nan)


def _bridged(boxes, longest):
    """Fill short gaps on a line between the boxes around them."""
    boxes = np.array(boxes, dtype=float)
    found = np.flatnonzero(np.isfinite(boxes).all(axis=1))
    for before, after in zip(found[:-1], found[1:]):
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
    found = []
    for frame in frames:
        if len(found) == len(boxes):
            raise _wrong_count(len(boxes), "more")
        found.append(_crop_mouth(frame, boxes[len(found)], size))
    if len(found) < len(boxes):
        raise _wrong_count(len(boxes), f"only {len(found)}")
    return np.stack(found)[_frames_on_view(len(found), fps)]


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
