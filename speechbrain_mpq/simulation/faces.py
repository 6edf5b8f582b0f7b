"""Drawn faces around drawn mouths, plain enough to be made in no time and
lifelike enough for a detector of real ones.

Places are measured in face boxes (what a detector would return) from the
middle of the box, x to the right and y downwards.
"""

import numpy as np

from .mouths import draw_mouths, still

CANVAS = 1.5  # width and height of a drawn face, in face boxes
MOUTH = (0.31, 0.45)  # middle and width of the picture of the mouth
MOUTH_ASPECT = 0.75  # its height to its width


def draw_face(look, rng, size):
    """A face without a mouth, and what of the canvas it covers.

    Arguments
    ---------
    look : Look
        The mouth that belongs to it: skin and light.
    rng : numpy.random.Generator
        Draws the rest.
    size : int
        Pixels of the face box, from about 24.

    Returns
    -------
    face : numpy.ndarray
        [pixels, pixels], the canvas of 1.5 face boxes, 0 to 1.
    cover : numpy.ndarray
        Same shape, 0 to 1.

    Example
    -------
    >>> from .mouths import draw_look
    >>> rng = np.random.default_rng(0)
    >>> face, cover = draw_face(draw_look(rng), rng, 64)
    >>> face.shape, cover[0, 0].item(), cover[48, 48].item()
    ((96, 96), 0.0, 1.0)
    """
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
    """A talking face.

    Arguments
    ---------
    shapes : numpy.ndarray
        [pictures, 5], from `visemes.mouth_shapes`.
    look : Look
    rng : numpy.random.Generator
    size : int
        Pixels of the face box.

    Returns
    -------
    faces : numpy.ndarray
        [pictures, pixels, pixels], 0 to 1.
    cover : numpy.ndarray
        [pixels, pixels], see `draw_face`.
    """
    face, cover = draw_face(look, rng, size)
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
