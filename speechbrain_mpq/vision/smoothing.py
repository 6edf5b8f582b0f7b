"""Smoothing of a direction that was measured frame by frame.

The smooth track z keeps near the measurements y where there are any (w = 1)
and bends little (Whittaker 1923; the batch form of a Kalman smoother that
expects constant velocity):

    minimise  sum_t w_t (z_t - y_t)^2 + penalty * sum_t (z_t'')^2

It looks at the whole track, so that nothing is delayed, and needs the whole
track, so that it is not for live use.
"""

import math

import numpy as np
from scipy.linalg import solveh_banded


def bend_penalty(bandwidth, fps):
    """Penalty that halves a sway of `bandwidth`.

    On a long track without gaps the gain is 1 / (1 + penalty * d^2) with
    d = 2 - 2 cos(2 pi f / fps).

    Arguments
    ---------
    bandwidth : float
        Frequency in Hz.
    fps : float
        Frames per second.

    Returns
    -------
    penalty : float
        Weight of the squared second differences.

    Example
    -------
    >>> round(bend_penalty(bandwidth=1.0, fps=25), 1)
    253.3
    """
    if not 0 < bandwidth <= fps / 2:
        raise ValueError(
            f"bandwidth must lie in 0 to {fps / 2:g} Hz, half the frame rate, "
            f"got {bandwidth}"
        )
    return (2 - 2 * math.cos(2 * math.pi * bandwidth / fps)) ** -2


def smooth(values, penalty):
    """Smooth a track; gaps are bridged and the ends held.

    Arguments
    ---------
    values : np.ndarray
        [frames], NaN where nothing was measured.
    penalty : float
        From `bend_penalty`; 0 leaves the measurements as they are.

    Returns
    -------
    smooth : np.ndarray
        [frames]. Across a gap it goes straight from the last to the next
        smoothed value; before the first and after the last measurement it
        stays.

    Example
    -------
    >>> values = np.array([np.nan, 10.0, np.nan, 30.0, np.nan])
    >>> smooth(values, penalty=100.0).round(6)
    array([10., 10., 20., 30., 30.])
    """
    seen = np.flatnonzero(np.isfinite(values))
    if not len(seen):
        raise ValueError("nothing was measured: all values are NaN")
    if len(seen) < 3:  # a straight line goes through them
        smoothed = values
    else:
        inside = slice(seen[0], seen[-1] + 1)
        smoothed = np.full(len(values), np.nan)
        smoothed[inside] = _whittaker(values[inside], penalty)
    return np.interp(np.arange(len(values)), seen, smoothed[seen])


def _whittaker(values, penalty):
    """Solve (W + penalty D'D) z = W y, D the second differences."""
    weights = np.isfinite(values).astype(float)
    frames = len(values)
    bands = np.zeros((3, frames))  # upper form: diagonal k is row 2 - k
    for shift, weight in enumerate((1, 4, 1)):
        bands[2, shift : frames - 2 + shift] += weight
    bands[1, 1:-1] -= 2
    bands[1, 2:] -= 2
    bands[0, 2:] = 1
    bands *= penalty
    bands[2] += weights
    return solveh_banded(bands, np.where(weights > 0, values, 0.0))
