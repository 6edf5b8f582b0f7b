"""The track of a talker's face: boxes, and the direction that they give.

A track file is JSON: {"version", "source", "fps", "width", "height",
"faces" (how many there were), "target" (which of them, from the left, from
1), "doa" (the utterance's, degrees), "doas" (a frame each), "visible" (a
frame each), "boxes" (a frame each: [x, y, width, height] as found, or null)}.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..whole_files import write_text

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
        """Write the track file, whole or not at all.

        Arguments
        ---------
        path : str | Path
            Where to.
        """
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
        """Read a track file.

        Arguments
        ---------
        path : str | Path
            Written by `save`.

        Returns
        -------
        track : FaceTrack
            As it was, directions to a thousandth of a degree.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
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
        """Raise ValueError unless a video may be what the track is from.

        Arguments
        ---------
        video : Video
            By its width, height and fps.
        """
        own = self.width, self.height, self.fps
        given = video.width, video.height, video.fps
        if own[:2] != given[:2] or abs(own[2] - given[2]) > 0.01 * own[2]:
            said = "{:g} x {:g} pixels at {:g} frames a second"
            raise ValueError(
                f"the track is from a video of {said.format(*own)}, "
                f"{video.path} has {said.format(*given)}: run "
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
