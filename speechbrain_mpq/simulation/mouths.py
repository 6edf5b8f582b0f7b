"""Drawn mouths: grey pictures of the lower face from mouth shapes.

Places are measured in picture widths from the middle of the mouth, x to the
right and y downwards; edges are as soft as a pixel, whatever the size.
"""

import dataclasses

import numpy as np

ASPECT = (24, 32)  # height to width that a picture of a mouth is meant for


@dataclasses.dataclass(frozen=True)
class Look:
    """What does not change while someone speaks.

    Arguments
    ---------
    skin, lips, teeth : float
        Brightness, 0 to 1.
    half_width : float
        Of the mouth at rest, in picture widths.
    thickness : float
        Of a lip.
    gape : float
        Half of the widest opening.
    energy : float
        How far the mouth follows the shapes.
    light : (float, float)
        Slope of the brightness to the right and downwards.
    beard : float
        How much darker the skin around the mouth is.

    Example
    -------
    >>> Look(0.7, 0.45, 0.9, 0.25, 0.05, 0.15, 1.0, (0.0, 0.0), 0.0).skin
    0.7
    """

    skin: float
    lips: float
    teeth: float
    half_width: float
    thickness: float
    gape: float
    energy: float
    light: tuple
    beard: float


def draw_look(rng):
    """Someone's mouth.

    Arguments
    ---------
    rng : numpy.random.Generator

    Returns
    -------
    look : Look

    Example
    -------
    >>> 0.3 < draw_look(np.random.default_rng(0)).skin < 0.9
    True
    """
    skin = rng.uniform(0.3, 0.9)
    return Look(
        skin=skin,
        lips=skin * rng.uniform(0.55, 0.85),
        teeth=min(1.0, skin + rng.uniform(0.1, 0.4)),
        half_width=rng.uniform(0.24, 0.34),
        thickness=rng.uniform(0.04, 0.085),
        gape=rng.uniform(0.13, 0.21),
        energy=rng.uniform(0.7, 1.15),
        light=tuple(rng.uniform(-0.15, 0.15, 2)),
        beard=rng.uniform(0.1, 0.35) if rng.uniform() < 0.15 else 0.0,
    )


@dataclasses.dataclass(frozen=True)
class Pose:
    """Where the mouth is in every picture.

    Arguments
    ---------
    x, y : numpy.ndarray
        [pictures], centre of the mouth in picture widths.
    scale : numpy.ndarray
        [pictures], 1: as the look has it.
    angle : numpy.ndarray
        [pictures], radians.

    Example
    -------
    >>> still(2).scale
    array([1., 1.])
    """

    x: np.ndarray
    y: np.ndarray
    scale: np.ndarray
    angle: np.ndarray


def still(pictures):
    """A mouth in the middle of all pictures.

    Arguments
    ---------
    pictures : int

    Returns
    -------
    pose : Pose

    Example
    -------
    >>> still(1).x
    array([0.])
    """
    zero = np.zeros(pictures)
    return Pose(zero, zero, zero + 1, zero)


def draw_mouths(shapes, look, pose, size):
    """Draw one picture for each shape.

    Arguments
    ---------
    shapes : numpy.ndarray
        [pictures, 5], from `visemes.mouth_shapes`.
    look : Look
    pose : Pose
    size : (int, int)
        Height and width in pixels.

    Returns
    -------
    pictures : numpy.ndarray
        [pictures, height, width], float32, 0 to 1.

    Example
    -------
    >>> look = draw_look(np.random.default_rng(0))
    >>> shapes = np.array([[0.0, 0, 0, 0, 0], [1.0, 0, 0, 0, 0]])
    >>> closed, open_ = draw_mouths(shapes, look, still(2), (24, 32))
    >>> bool(closed[12, 16] > open_[12, 16])  # it is dark in there
    True
    """
    x, y = _places(pose, size)
    pixel = 1 / size[1]
    opening, width, rounding, teeth, tongue = (
        column.astype(np.float32)[:, None, None]
        for column in (shapes * [look.energy, look.energy, 1, 1, 1]).T
    )
    half = look.half_width * (1 + 0.2 * width - 0.25 * rounding)
    gape = look.gape * opening
    lip = look.thickness * (1 + 0.5 * rounding)
    y = y - 0.4 * gape  # the jaw falls, the upper lip hardly moves
    arch = np.maximum(1 - np.square(x / half), 0)
    inside = _soft(gape * arch - np.abs(y), pixel)
    inside = inside * ((arch > 0) & (gape > pixel / 4))
    around = np.maximum(1 - np.square(x / (half + lip)), 0)
    mouth = _soft((gape + lip) * np.sqrt(around) - np.abs(y), pixel)
    mouth = mouth * (around > 0)
    upper = inside * _soft(0.8 * teeth * look.gape - (y + gape * arch), pixel)
    lower = inside * _soft(0.6 * tongue * gape - (gape * arch - y), pixel)
    seam = _soft(pixel / 2 - np.abs(y), pixel) * _soft(half - np.abs(x), pixel)
    picture = look.skin * (1 - look.beard * _soft(np.abs(y) - lip, pixel))
    picture = _over(picture, look.lips, mouth)
    picture = _over(picture, 0.6 * look.lips, seam * (gape <= pixel))
    picture = _over(picture, 0.08, inside)
    picture = _over(picture, 0.8 * look.lips, lower)
    picture = _over(picture, look.teeth, upper * (teeth > 0.05))
    picture = picture * (1 + look.light[0] * x + look.light[1] * y)
    return np.clip(picture, 0, 1, dtype=np.float32)


def _places(pose, size):
    """x and y of every pixel, turned and scaled with the mouth."""
    height, width = size
    x = ((np.arange(width) + 0.5) / width - 0.5).astype(np.float32)
    y = ((np.arange(height) + 0.5 - height / 2) / width).astype(np.float32)
    columns = (pose.x, pose.y, pose.scale, pose.angle)
    left, down, scale, angle = (
        column.astype(np.float32)[:, None, None] for column in columns
    )
    x, y = x - left, y[:, None] - down
    cosine, sine = np.cos(angle) / scale, np.sin(angle) / scale
    return x * cosine + y * sine, y * cosine - x * sine


def _soft(distance, pixel):
    """1 inside (positive distance), 0 outside, a ramp of a pixel between."""
    return np.clip(distance / pixel + 0.5, 0, 1)


def _over(picture, brightness, mask):
    """Lay something over a picture."""
    return picture + (brightness - picture) * mask
