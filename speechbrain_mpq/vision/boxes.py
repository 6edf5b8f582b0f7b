"""Face boxes that some other detector has found, from a file.

JSON: {"fps": 25, "width": 360, "height": 288, "frames": [[[x, y, w, h], ...],
[], ...]}, a list of boxes for each frame, in pixels. Or a NumPy file `.npy`,
[frames, 4] or [frames, faces, 4], NaN for a box that is not there.
"""

import json
from pathlib import Path

import numpy as np


def read_boxes(path):
    """Boxes of all frames, with frame rate and size where the file says.

    Arguments
    ---------
    path : str | Path
        `.json` or `.npy`, see the module.

    Returns
    -------
    detections : list of np.ndarray
        For each frame [boxes, 4].
    about : dict
        "fps", "width" and "height", as far as the file says.

    Example
    -------
    >>> path = Path(getfixture("tmpdir")) / "boxes.npy"
    >>> np.save(path, [[1.0, 2, 3, 4], [np.nan] * 4])
    >>> read_boxes(path)
    ([array([[1., 2., 3., 4.]]), array([], shape=(0, 4), dtype=float64)], {})
    """
    path, about = Path(path), {}
    try:
        if path.suffix == ".npy":
            frames = list(np.load(path, allow_pickle=False))
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
            frames = content["frames"]
            about = _about(content)
        detections = [check_boxes(boxes) for boxes in frames]
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
            about[name] = float(content[name])
            if not 0 < about[name] < float("inf"):
                raise ValueError(f"{name} is {content[name]}")
    return about


def check_boxes(boxes):
    """The boxes of one frame as an array, without those of NaN.

    Arguments
    ---------
    boxes : np.ndarray | list
        [4] or [boxes, 4]: x, y, width, height.

    Returns
    -------
    boxes : np.ndarray
        [boxes, 4].

    Example
    -------
    >>> check_boxes([[1, 2, 3, 0]])
    Traceback (most recent call last):
    ValueError: a box is 3 x 0 pixels
    """
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
