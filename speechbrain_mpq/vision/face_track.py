"""Read face boxes, choose the target's face, and store its track.

Boxes come as JSON, {"fps": 25, "width": 360, "height": 288, "frames":
[[[x, y, w, h], ...], [], ...]}, in pixels, or as .npy, [frames, 4] or [frames,
faces, 4], NaN for a box that is not there. A track file is JSON: "version",
"source", "fps", "width", "height", "faces" (how many there were), "target"
(which of them, from the left, from 1), "doa" (the utterance's, degrees), and a
frame each "doas", "visible" and "boxes" ([x, y, width, height] or null).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..utils import read_text, strict_json, write_text


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
            frames = list(np.load(path, allow_pickle=False))
        else:
            content = strict_json(read_text(path))
            frames = content["frames"]
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
            about[name] = float(content[name])
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


VERSION = 1


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
            "source": self.source,
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
        given = video.width, video.height, video.fps
        if own[:2] != given[:2] or abs(own[2] - given[2]) > 0.01 * own[2]:
            video_text = "{:g} x {:g} pixels at {:g} frames a second"
            raise ValueError(
                f"the track is from a video of {video_text.format(*own)}, "
                f"{video.path} has {video_text.format(*given)}: run "
                "`speechbrain-mpq track` on this one"
            )

    def check(self):
        """Raise ValueError on a track that contradicts itself."""
        if self.boxes.shape != (len(self.doas), 4):
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
