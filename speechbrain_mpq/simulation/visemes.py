"""Mouth shapes from phoneme times, with co-articulation.

A shape is five numbers: opening, width (-1 narrow to 1 spread), rounding,
teeth and tongue (how much of them shows). Every phoneme pulls the mouth to
its shape with a strength that fades before and after it; the mouth is their
weighted mean (dominance functions, Cohen and Massaro, 1993). Lips that must
close do, vowels between them give way, rounding begins early.
"""

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


def mouth_symbols(phoneme):
    """The mouth shapes that an espeak-ng phoneme passes through.

    Arguments
    ---------
    phoneme : str
        In espeak-ng's alphabet, with its stress and length marks.

    Returns
    -------
    symbols : list of str
        Keys of `SHAPES`, in order; none for a mere mark.

    Example
    -------
    >>> mouth_symbols("'aI"), mouth_symbols("tS"), mouth_symbols("@2")
    (['a', 'I'], ['S'], ['@'])
    """
    plain = _MARKS.sub("", phoneme)
    for pair, alike in DIGRAPHS.items():
        plain = plain.replace(pair, alike)
    symbols = ["_"] if set(plain) == {"_"} else list(plain.replace("_", ""))
    symbols = [ALIKE.get(symbol, symbol) for symbol in symbols]
    for symbol in symbols:
        if symbol not in SHAPES:
            raise ValueError(
                f"no mouth shape for the phoneme {phoneme!r} (symbol "
                f"{symbol!r}): add it to simulation.visemes.SHAPES"
            )
    return symbols


def targets(phonemes):
    """What pulls the mouth where and when.

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
        symbols = mouth_symbols(phoneme)
        for i, symbol in enumerate(symbols):
            centre = start + (end - start) * (i + 0.5) / len(symbols)
            rows.append((centre, *SHAPES[symbol]))
    if not rows:
        rows = [(0.0, *SHAPES["_"])]
    centres, shapes, strengths, widths = zip(*rows)
    return tuple(map(np.array, (centres, shapes, strengths, widths)))


def mouth_shapes(phonemes, times):
    """The mouth at given times.

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
