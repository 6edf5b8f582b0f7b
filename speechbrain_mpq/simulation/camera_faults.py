"""What a camera and its cable do to pictures of a talker.

Everything is drawn from one generator per clip: the same seed gives the same
clip.
"""

import dataclasses

import numpy as np

from .mouths import Pose


@dataclasses.dataclass(frozen=True)
class Faults:
    """How often and how badly things go wrong. The default: an ordinary call.

    Arguments
    ---------
    lag : (float, float)
        Seconds by which the video comes late; negative: early.
    jitter : float
        Deviation of the mouth's place, in picture widths.
    noise : float
        Deviation of the pixels' noise; drawn up to this.
    flicker : float
        Deviation of the brightness from picture to picture.
    occluded, dropped, frozen : float
        Share of clips in which a hand covers the mouth for a while, pictures
        are missing, the picture stands still.
    absent : float
        Share of clips without any picture (video dropout of training).
    swapped : float
        Share of clips that show someone else's speech.

    Example
    -------
    >>> Faults().absent, TRAINING.absent, PERFECT.noise
    (0.0, 0.15, 0.0)
    """

    lag: tuple = (-0.04, 0.1)
    jitter: float = 0.02
    noise: float = 0.06
    flicker: float = 0.03
    occluded: float = 0.15
    dropped: float = 0.15
    frozen: float = 0.1
    absent: float = 0.0
    swapped: float = 0.0


TRAINING = Faults(
    dropped=0.25, frozen=0.15, occluded=0.2, absent=0.15, swapped=0.05
)
PERFECT = Faults((0.0, 0.0), *[0.0] * 8)


def draw_pose(rng, pictures, jitter):
    """A mouth that is framed somehow and moves a little.

    Arguments
    ---------
    rng : numpy.random.Generator
    pictures : int
    jitter : float
        Deviation of the mouth's place, in picture widths; 0: in the middle.

    Returns
    -------
    pose : Pose

    Example
    -------
    >>> draw_pose(np.random.default_rng(0), 3, 0.0).x
    array([0., 0., 0.])
    """
    place = rng.normal(0, jitter, (4, 1))
    sway = _smooth(rng.normal(0, jitter / 2, (4, pictures)))
    x, y, scale, angle = place + sway
    return Pose(x, y, np.exp(4 * scale), 3 * angle)


def _smooth(values, width=9):
    """Moving average over the last axis, of the same deviation."""
    taps = np.ones(width) / np.sqrt(width)
    padded = np.pad(values, [(0, 0), (width // 2, width // 2)], mode="wrap")
    rows = [np.convolve(row, taps, mode="valid") for row in padded]
    return np.stack(rows)


def spoil(pictures, rng, faults):
    """Noise, flicker, a hand, missing and standing pictures.

    Arguments
    ---------
    pictures : numpy.ndarray
        [pictures, height, width], 0 to 1.
    rng : numpy.random.Generator
    faults : Faults

    Returns
    -------
    pictures : numpy.ndarray
        Same shape, uint8. A missing picture is 0, any other is above it.

    Example
    -------
    >>> grey = np.full((4, 2, 2), 0.5, np.float32)
    >>> spoil(grey, np.random.default_rng(0), PERFECT)[0]
    array([[128, 128],
           [128, 128]], dtype=uint8)
    """
    count, height, width = pictures.shape
    # Drawn whether used or not: one fault does not change the others
    chance = rng.uniform(size=4)
    spans = [draw_span(rng, count) for _ in range(3)]
    noise = rng.standard_normal(pictures.shape, np.float32)
    light = 1 + faults.flicker * rng.standard_normal((count, 1, 1), np.float32)
    cover = rng.uniform(size=4)
    pictures = pictures * light + noise * np.float32(faults.noise * cover[3])
    if chance[0] < faults.occluded:
        _cover_(pictures[spans[0]], cover)
    pictures = np.clip(np.rint(pictures * 255), 1, 255).astype(np.uint8)
    if chance[1] < faults.frozen:
        pictures[spans[1]] = pictures[spans[1].start]
    if chance[2] < faults.dropped:
        pictures[spans[2]] = 0
    if chance[3] < faults.absent:
        pictures[:] = 0
    return pictures


def draw_span(rng, pictures, shortest=2, longest=30):
    """A stretch of pictures during which something lasts.

    Arguments
    ---------
    rng : numpy.random.Generator
    pictures : int
        In the clip.
    shortest, longest : int
        Pictures that it may last.

    Returns
    -------
    span : slice

    Example
    -------
    >>> span = draw_span(np.random.default_rng(0), 75)
    >>> 2 <= span.stop - span.start <= 30
    True
    """
    length = min(int(rng.integers(shortest, longest + 1)), pictures)
    start = int(rng.integers(pictures - length + 1))
    return slice(start, start + length)


def _cover_(pictures, drawn):
    """Something grey before the lower or upper part, in place."""
    height = pictures.shape[1]
    edge = max(1, round(height * (0.3 + 0.5 * drawn[0])))
    rows = slice(edge - height, None) if drawn[1] < 0.5 else slice(0, edge)
    pictures[:, rows] = 0.2 + 0.7 * drawn[2]
