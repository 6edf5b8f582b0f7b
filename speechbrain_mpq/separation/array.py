"""The microphone array: where the microphones are and what a plane wave does.

Microphones are numbered from 1 as in the paper; everything in metres along
the array's axis, measured from microphone 1, the reference. A direction of
arrival (DOA) is the angle between that axis (from microphone 1 towards the
last one) and the talker: at 0 degrees the last microphone hears the talker
first, at 90 degrees all hear it together, at 180 degrees microphone 1 does.
"""

import math

import torch

SPEED_OF_SOUND = 343.0  # metres per second, air at 20 degrees Celsius

LINEAR_15_SPACINGS = (7, 6, 5, 4, 3, 2, 1, 1, 2, 3, 4, 5, 6, 7)  # cm


def linear_array(spacings_cm=LINEAR_15_SPACINGS):
    """Positions of a linear array from the gaps between its microphones.

    Arguments
    ---------
    spacings_cm : sequence of float
        Gaps between neighbours in centimetres.

    Returns
    -------
    positions : torch.Tensor
        [mics], metres from microphone 1, float64.

    Example
    -------
    >>> positions = linear_array()
    >>> len(positions), round(positions[-1].item(), 2)
    (15, 0.56)
    """
    gaps = torch.tensor([0.0, *spacings_cm], dtype=torch.float64) / 100
    return gaps.cumsum(0)


def used_microphones(pairs, reference=1):
    """The microphones that pairs and reference need, in ascending order.

    Arguments
    ---------
    pairs : sequence of (int, int)
        Microphone numbers, from 1.
    reference : int
        Number of the reference microphone.

    Returns
    -------
    numbers : list of int
        Sorted microphone numbers, each once.

    Example
    -------
    >>> used_microphones([(1, 15), (12, 4)])
    [1, 4, 12, 15]
    """
    return sorted({reference, *(mic for pair in pairs for mic in pair)})


def pair_phase(doa, distances, frequencies, speed=SPEED_OF_SOUND):
    """Phase difference that a plane wave from `doa` causes (from Eq. 2).

    Arguments
    ---------
    doa : torch.Tensor
        [...], degrees, 0 to 180.
    distances : torch.Tensor
        [pairs], position of the pair's first microphone minus position of
        its second, metres.
    frequencies : torch.Tensor
        [bins], Hz.
    speed : float
        Speed of sound in metres per second.

    Returns
    -------
    phase : torch.Tensor
        [..., pairs, bins], radians, not wrapped: the expected
        angle(y_m / y_n).

    Example
    -------
    >>> distances, frequencies = torch.tensor([0.343]), torch.tensor([250.0])
    >>> phase = pair_phase(torch.tensor([0.0, 60.0]), distances, frequencies)
    >>> [round(value, 4) for value in phase.flatten().tolist()]
    [1.5708, 0.7854]
    """
    delay = torch.cos(torch.deg2rad(doa))[..., None] * distances / speed
    return 2 * math.pi * delay[..., None] * frequencies  # [..., pairs, bins]


def check_doa(doa):
    """Raise ValueError unless every direction lies in 0 to 180 degrees.

    Arguments
    ---------
    doa : torch.Tensor
        Directions of arrival in degrees.
    """
    bad = doa[~((doa >= 0) & (doa <= 180))]
    if bad.numel():
        raise ValueError(
            f"DOA must lie in 0 to 180 degrees, got {bad.flatten()[0]:.1f}: "
            "measure it from the array's axis (0 = towards the last "
            "microphone, 90 = straight ahead)"
        )
