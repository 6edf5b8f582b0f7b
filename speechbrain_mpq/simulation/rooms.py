"""Rooms with an array and talkers in them, and their impulse responses.

Image-source simulation by pyroomacoustics of the paper's rooms (4 x 4 x 2.5
to 10 x 8 x 6 metres, T60 0.05 to 0.7 s, talkers 1 to 5 metres away).
"""

import math

import numpy as np

from ..separation.array import SPEED_OF_SOUND, linear_array

SAMPLE_RATE = 16000  # Hz
SMALLEST_ROOM = (4.0, 4.0, 2.5)  # metres
LARGEST_ROOM = (10.0, 8.0, 6.0)  # metres
T60 = (0.05, 0.7)  # seconds
DISTANCE = (1.0, 5.0)  # metres from the array's centre to a talker
TALKERS = 4  # positions simulated in each room


def eyring_absorption(dimensions, t60):
    """Energy absorption of the walls for a reverberation time (Eyring).

    Arguments
    ---------
    dimensions : sequence of float
        Length, width, height in metres.
    t60 : float
        Reverberation time in seconds.

    Returns
    -------
    absorption : float
        0 to 1, the same for all walls.

    Example
    -------
    >>> round(eyring_absorption((6, 5, 3), 0.4), 3)
    0.25
    """
    x, y, z = dimensions
    surface = 2 * (x * y + y * z + z * x)
    return 1 - math.exp(-0.161 * x * y * z / (surface * t60))


def image_order(dimensions, t60):
    """Reflection order that covers the first ~33 dB of the decay.

    Full order costs an order of magnitude more; what is cut lies under the
    direct sound of the next phoneme.

    Arguments
    ---------
    dimensions : sequence of float
        Length, width, height in metres.
    t60 : float
        Reverberation time in seconds.

    Returns
    -------
    order : int

    Example
    -------
    >>> image_order((6, 5, 3), 0.4)
    26
    """
    return int(math.ceil(0.55 * SPEED_OF_SOUND * t60 / min(dimensions)))


def draw_room(rng):
    """Draw room, array and talkers.

    Arguments
    ---------
    rng : numpy.random.Generator

    Returns
    -------
    room : dict
        "dimensions", "t60", "centre" and "axis" of the array, "talkers"
        (positions), "doa" (degrees) and "distance" (metres) of each talker.
    """
    dimensions = rng.uniform(SMALLEST_ROOM, LARGEST_ROOM)
    t60 = rng.uniform(*T60)
    while True:  # an array and talkers that fit into the room
        centre = rng.uniform((0.6, 0.6, 1.0), (*(dimensions[:2] - 0.6), 1.8))
        yaw = rng.uniform(0, 2 * np.pi)
        axis = np.array([np.cos(yaw), np.sin(yaw), 0.0])
        front = np.array([-axis[1], axis[0], 0.0])
        talkers = _draw_talkers(rng, dimensions, centre, axis, front)
        if talkers is not None:
            break
    offsets = talkers - centre
    distance = np.linalg.norm(offsets, axis=1)
    doa = np.degrees(np.arccos(offsets @ axis / distance))
    return {
        "dimensions": dimensions,
        "t60": t60,
        "centre": centre,
        "axis": axis,
        "talkers": talkers,
        "doa": doa,
        "distance": distance,
    }


def _draw_talkers(rng, dimensions, centre, axis, front, tries=60):
    """Positions in front of the array, or None if they do not fit."""
    talkers = []
    for _ in range(tries):
        angle = rng.uniform(0, np.pi)
        distance = rng.uniform(*DISTANCE)
        ray = np.cos(angle) * axis + np.sin(angle) * front
        position = centre + distance * ray
        position[2] += rng.uniform(-0.2, 0.2)
        inside = (position > 0.3) & (position < dimensions - 0.3)
        if inside.all():
            talkers.append(position)
        if len(talkers) == TALKERS:
            return np.stack(talkers)
    return None


def simulate(room, microphones):
    """Impulse responses from every talker to every microphone.

    Arguments
    ---------
    room : dict
        From `draw_room`.
    microphones : sequence of int
        Microphone numbers of the 15-microphone array, from 1.

    Returns
    -------
    rirs : numpy.ndarray
        [talkers, mics, samples], float32, T60 + 50 ms long.
    """
    import pyroomacoustics

    positions = linear_array().numpy()
    along = positions[np.array(microphones) - 1] - positions[-1] / 2
    mics = room["centre"][:, None] + room["axis"][:, None] * along
    absorption = eyring_absorption(room["dimensions"], room["t60"])
    shoebox = pyroomacoustics.ShoeBox(
        room["dimensions"],
        fs=SAMPLE_RATE,
        materials=pyroomacoustics.Material(absorption),
        max_order=image_order(room["dimensions"], room["t60"]),
    )
    for talker in room["talkers"]:
        shoebox.add_source(talker)
    shoebox.add_microphone_array(mics)
    shoebox.compute_rir()
    samples = int((room["t60"] + 0.05) * SAMPLE_RATE)
    rirs = np.zeros((len(room["talkers"]), mics.shape[1], samples), np.float32)
    for mic, row in enumerate(shoebox.rir):
        for talker, rir in enumerate(row):
            rir = rir[:samples]
            rirs[talker, mic, : len(rir)] = rir
    return rirs


def measured_t60(rir):
    """Reverberation time of a response: a 20 dB fit to the Schroeder curve.

    Arguments
    ---------
    rir : numpy.ndarray
        [samples].

    Returns
    -------
    t60 : float
        Seconds.

    Example
    -------
    >>> decay = 10 ** (-3 * np.arange(8000) / 16000 / 0.4)  # T60 = 0.4 s
    >>> round(measured_t60(decay), 2)
    0.4
    """
    energy = np.cumsum(rir[::-1].astype(np.float64) ** 2)[::-1]
    level = 10 * np.log10(energy / energy[0] + 1e-12)
    start, end = np.argmax(level < -5), np.argmax(level < -25)
    if end <= start + 1:  # decays within a few samples: nearly anechoic
        return 3 * (end - start) / SAMPLE_RATE
    slope = np.polyfit(np.arange(start, end), level[start:end], 1)[0]
    return float(-60 / slope / SAMPLE_RATE)
