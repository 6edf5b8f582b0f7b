"""Draw mouths and faces that speak given phonemes.

A mouth's shape is five numbers: opening, width (-1 narrow to 1 spread),
rounding, teeth and tongue. Every phoneme pulls the mouth to its shape with a
strength that fades before and after it; the mouth is their weighted mean
(dominance functions, Cohen and Massaro, 1993). Places in mouth pictures are in
picture widths from the middle of the mouth, places in faces in face boxes from
the middle of the box; x to the right, y downwards.
"""

import dataclasses
import re

import numpy as np

SHAPE = ("opening", "width", "rounding", "teeth", "tongue")
REST = (0.02, 0.0, 0.0, 0.0, 0.0)
REST_STRENGTH = 0.02


# symbol: shape, strength, seconds in which the strength falls by e
VOWEL, LOOSE, FIRM = (1.0, 0.07), (0.5, 0.06), (8.0, 0.03)


SHAPES = {
    "a": ((0.85, 0.4, 0.0, 0.3, 0.3), *VOWEL),
    "A": ((1.0, 0.0, 0.0, 0.1, 0.2), *VOWEL),
    "E": ((0.6, 0.5, 0.0, 0.4, 0.4), *VOWEL),
    "e": ((0.5, 0.6, 0.0, 0.5, 0.4), *VOWEL),
    "I": ((0.35, 0.5, 0.0, 0.6, 0.4), *VOWEL),
    "i": ((0.25, 1.0, 0.0, 0.7, 0.4), *VOWEL),
    "@": ((0.35, 0.0, 0.0, 0.3, 0.3), *LOOSE),
    "3": ((0.35, -0.1, 0.3, 0.4, 0.3), *VOWEL),
    "V": ((0.65, 0.1, 0.0, 0.3, 0.3), *VOWEL),
    "0": ((0.75, -0.2, 0.5, 0.1, 0.2), *VOWEL),
    "O": ((0.65, -0.3, 0.7, 0.0, 0.2), *VOWEL),
    "o": ((0.45, -0.5, 0.9, 0.0, 0.1), *VOWEL),
    "U": ((0.25, -0.5, 0.8, 0.0, 0.1), *VOWEL),
    "u": ((0.15, -0.8, 1.0, 0.0, 0.0), *VOWEL),
    "p": ((-0.3, 0.0, 0.0, 0.0, 0.0), *FIRM),
    "b": ((-0.3, 0.0, 0.0, 0.0, 0.0), *FIRM),
    "m": ((-0.3, 0.0, 0.0, 0.0, 0.0), *FIRM),
    "f": ((0.12, 0.2, 0.0, 1.0, 0.0), *FIRM),
    "v": ((0.12, 0.2, 0.0, 1.0, 0.0), *FIRM),
    "w": ((0.1, -0.9, 1.0, 0.0, 0.0), 4.0, 0.05),
    "T": ((0.25, 0.1, 0.0, 0.7, 1.0), 2.0, 0.04),
    "D": ((0.25, 0.1, 0.0, 0.7, 1.0), 2.0, 0.04),
    "l": ((0.35, 0.1, 0.0, 0.4, 0.9), 1.0, 0.05),
    "r": ((0.25, -0.4, 0.5, 0.3, 0.2), 1.5, 0.06),
    "t": ((0.2, 0.2, 0.0, 0.8, 0.5), 1.0, 0.04),
    "d": ((0.2, 0.2, 0.0, 0.8, 0.5), 1.0, 0.04),
    "n": ((0.22, 0.2, 0.0, 0.6, 0.6), 1.0, 0.04),
    "s": ((0.12, 0.4, 0.0, 1.0, 0.0), 3.0, 0.04),
    "z": ((0.12, 0.4, 0.0, 1.0, 0.0), 3.0, 0.04),
    "S": ((0.2, -0.6, 0.8, 0.9, 0.0), 3.0, 0.05),
    "Z": ((0.2, -0.6, 0.8, 0.9, 0.0), 3.0, 0.05),
    "k": ((0.35, 0.1, 0.0, 0.3, 0.2), *LOOSE),
    "g": ((0.35, 0.1, 0.0, 0.3, 0.2), *LOOSE),
    "N": ((0.3, 0.1, 0.0, 0.3, 0.2), *LOOSE),
    "x": ((0.35, 0.1, 0.0, 0.3, 0.2), *LOOSE),
    "j": ((0.22, 0.8, 0.0, 0.6, 0.4), 1.0, 0.05),
    "h": ((0.4, 0.0, 0.0, 0.2, 0.2), 0.2, 0.05),
    "?": ((0.3, 0.0, 0.0, 0.2, 0.2), 0.2, 0.04),
    "_": (REST, 2.0, 0.06),
}


ALIKE = {"L": "l", "R": "r", "C": "x", "W": "w", "y": "u", "Y": "u", "B": "b"}
DIGRAPHS = {"tS": "S", "dZ": "Z"}
_MARKS = re.compile(r"[',%=:#;\-|~^\"`.!2]|(?<=[^@'])[45678]")


def _mouth_symbols(phoneme):
    """The mouth shapes that an espeak-ng phoneme passes through."""
    plain = _MARKS.sub("", phoneme)
    for pair, alike in DIGRAPHS.items():
        plain = plain.replace(pair, alike)
    symbols = ["_"] if set(plain) == {"_"} else list(plain.replace("_", ""))
    symbols = [ALIKE.get(symbol, symbol) for symbol in symbols]
    for symbol in symbols:
        if symbol not in SHAPES:
            raise ValueError(
                f"no mouth shape for the phoneme {phoneme!r} (symbol "
                f"{symbol!r}): add it to simulation.faces.SHAPES"
            )
    return symbols


def targets(phonemes):
    """Find what pulls the mouth where and when.

    Arguments
    ---------
    phonemes : sequence of (float, float, str)
        Start and end in seconds, and symbol.

    Returns
    -------
    centres : numpy.ndarray
        [targets], seconds.
    shapes : numpy.ndarray
        [targets, 5].
    strengths, widths : numpy.ndarray
        [targets].

    Example
    -------
    >>> centres, shapes, _, _ = targets([(0.0, 0.2, "'aI")])
    >>> centres, shapes[:, 0]
    (array([0.05, 0.15]), array([0.85, 0.35]))
    """
    rows = []
    for start, end, phoneme in phonemes:
        symbols = _mouth_symbols(phoneme)
        for i, symbol in enumerate(symbols):
            centre = start + (end - start) * (i + 0.5) / len(symbols)
            rows.append((centre, *SHAPES[symbol]))
    if not rows:
        rows = [(0.0, *SHAPES["_"])]
    centres, shapes, strengths, widths = zip(*rows)
    return tuple(map(np.array, (centres, shapes, strengths, widths)))


def mouth_shapes(phonemes, times):
    """Compute the mouth's shapes at given times.

    Arguments
    ---------
    phonemes : sequence of (float, float, str)
        Start and end in seconds, and symbol, in order.
    times : numpy.ndarray
        [pictures], seconds; long before and after it rests.

    Returns
    -------
    shapes : numpy.ndarray
        [pictures, 5], see `SHAPE`; opening and the last three 0 to 1.

    Example
    -------
    >>> phonemes = [(0.0, 0.2, "A"), (0.2, 0.3, "p"), (0.3, 0.5, "i:")]
    >>> shapes = mouth_shapes(phonemes, np.array([0.1, 0.25, 0.4, 9.0]))
    >>> shapes[:, 0].round(1)  # open, closed, nearly closed, at rest
    array([0.9, 0. , 0.2, 0. ])
    """
    centres, shapes, strengths, widths = targets(phonemes)
    distance = np.abs(times[:, None] - centres)  # [pictures, targets]
    pull = strengths * np.exp(-distance / widths)
    total = pull.sum(1, keepdims=True) + REST_STRENGTH
    mean = (pull @ shapes + REST_STRENGTH * np.array(REST)) / total
    lowest = np.array([0.0, -1.0, 0.0, 0.0, 0.0])
    return np.clip(mean, lowest, 1.0)


ASPECT = (24, 32)  # height to width that a picture of a mouth is meant for


@dataclasses.dataclass(frozen=True)
class Look:
    """A mouth's traits that do not change while someone speaks.

    Example
    -------
    >>> Look(0.7, 0.45, 0.9, 0.25, 0.05, 0.15, 1.0, (0.0, 0.0), 0.0).skin
    0.7
    """

    # skin, lips, teeth: brightness, 0 to 1
    skin: float
    lips: float
    teeth: float
    half_width: float  # of the mouth at rest, in picture widths
    thickness: float  # of a lip
    gape: float  # half of the widest opening
    energy: float  # how far the mouth follows the shapes
    light: tuple  # slope of the brightness to the right and downwards
    beard: float  # how much darker the skin around the mouth is


def draw_look(rng) -> Look:
    """Draw the traits of someone's mouth.

    Arguments
    ---------
    rng : numpy.random.Generator

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
    """Place, size and angle of the mouth in every picture.

    Example
    -------
    >>> still(2).scale
    array([1., 1.])
    """

    # x, y: [pictures], centre of the mouth in picture widths
    x: np.ndarray
    y: np.ndarray
    scale: np.ndarray  # [pictures], 1: as the look has it
    angle: np.ndarray  # [pictures], radians


def still(pictures) -> Pose:
    """Make the pose of a mouth in the middle of all pictures.

    Arguments
    ---------
    pictures : int

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
        [pictures, 5], from `mouth_shapes`.

    Returns
    -------
    pictures : numpy.ndarray
        [pictures, height, width], float32, 0 to 1.
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


CANVAS = 1.5  # width and height of a drawn face, in face boxes
MOUTH = (0.31, 0.45)  # middle and width of the picture of the mouth
MOUTH_ASPECT = 0.75  # its height to its width


def _draw_face(look, rng, size):
    """A face without a mouth, and its mask, each [pixels, pixels]."""
    pixels = round(CANVAS * size)
    axis = (np.arange(pixels) + 0.5) / size - CANVAS / 2
    x, y = axis[None, :], axis[:, None]
    skin, hair = look.skin, rng.uniform(0.03, 0.3) * look.skin
    head = _ellipse(x, y - 0.02, 0.42, 0.56, size)
    face = np.full((pixels, pixels), skin)
    face = face * (1 - 0.35 * _blob(np.abs(x) - 0.45, y, 0.12, 0.6))
    face = _drawn_eyes(face, x, y, rng, skin, hair, size)
    face = face * (1 + 0.1 * _blob(x, y - 0.02, 0.035, 0.14))  # nose
    face = face * (1 - 0.35 * _blob(np.abs(x) - 0.05, y - 0.14, 0.03, 0.02))
    face = face * (1 - 0.15 * _blob(x, y - 0.155, 0.09, 0.025))
    line = rng.uniform(-0.42, -0.34) - 0.5 * np.square(x)
    face = np.where(y < line - 0.5 * np.square(x), hair, face)
    neck = (np.abs(x) < 0.2) & (y > 0.3)
    cover = np.maximum(head, neck)
    face = np.where((head < 0.5) & neck, 0.75 * skin, face)
    return np.clip(face * (1 + look.light[0] * x), 0, 1), cover


def _drawn_eyes(face, x, y, rng, skin, hair, size):
    """Sockets, brows, eyes."""
    apart, height = rng.uniform(0.155, 0.18), rng.uniform(-0.135, -0.11)
    side, down = np.abs(x) - apart, y - height
    face = face * (1 - 0.3 * _blob(side, down + 0.02, 0.1, 0.06))
    brow = _ellipse(side, down + 0.085, 0.1, 0.016, size)
    face = face + (hair - face) * 0.8 * brow
    white = _ellipse(side, down, 0.065, 0.026, size)
    face = face + (min(1.0, skin + 0.15) - face) * white
    iris = _ellipse(side, down, 0.027, 0.027, size) * white
    face = face + (0.08 - face) * iris
    lid = _ellipse(side, down + 0.024, 0.07, 0.01, size)
    return face + (0.3 * skin - face) * 0.8 * lid


def draw_talker(shapes, look, rng, size):
    """Draw a talking face.

    Arguments
    ---------
    shapes : numpy.ndarray
        [pictures, 5], from `mouth_shapes`.
    look : Look
    rng : numpy.random.Generator
    size : int
        Pixels of the face box.

    Returns
    -------
    faces : numpy.ndarray
        [pictures, pixels, pixels], 0 to 1.
    cover : numpy.ndarray
        [pixels, pixels], see `_draw_face`.
    """
    face, cover = _draw_face(look, rng, size)
    middle, width = MOUTH
    across = round(width * size)
    down = round(across * MOUTH_ASPECT)
    mouths = draw_mouths(shapes, look, still(len(shapes)), (down, across))
    left = round(CANVAS * size / 2 - across / 2)
    top = round((CANVAS / 2 + middle) * size - down / 2)
    edge = np.minimum(_ramp(down)[:, None], _ramp(across))
    faces = np.repeat(face[None], len(shapes), axis=0)
    place = faces[:, top : top + down, left : left + across]
    place += (mouths - place) * edge
    return faces, cover


def _ramp(pixels):
    """0 at both ends of a side, 1 from a fifth inwards."""
    distance = np.minimum(np.arange(pixels), np.arange(pixels)[::-1])
    return np.clip(distance / (pixels / 5), 0, 1)


def _ellipse(x, y, across, down, size):
    """1 inside of an ellipse, 0 outside, an edge of about a pixel."""
    distance = (1 - np.hypot(x / across, y / down)) * min(across, down)
    return np.clip(distance * size + 0.5, 0, 1)


def _blob(x, y, across, down):
    """A soft spot."""
    return np.exp(-0.5 * (np.square(x / across) + np.square(y / down)))
