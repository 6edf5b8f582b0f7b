"""Simulate rooms with an array and talkers, and keep a bank of responses.

Image-source simulation by pyroomacoustics of the paper's rooms (4 x 4 x 2.5
to 10 x 8 x 6 metres, T60 0.05 to 0.7 s, talkers 1 to 5 metres away). Only the
microphones that a separator uses are simulated, of the paper's linear array or
any other. Talkers stand in front of a linear array and all around a planar one.
Room i of a split depends on
(seed, split, i) alone, so that a larger bank extends a smaller one. They are
stored by the ROOMS_PER_SHARD; only the last file of a bank may hold fewer.
"""

import json
import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..lobes.models.spatial_features import SPEED_OF_SOUND, linear_array
from ..locks import one_at_a_time
from ..signals import worker_pool
from ..utils import (
    SAMPLE_RATE,
    atomic_write,
    read_json,
    remove_partial,
    write_text,
)

SMALLEST_ROOM = (4.0, 4.0, 2.5)  # metres
LARGEST_ROOM = (10.0, 8.0, 6.0)  # metres
T60 = (0.05, 0.7)  # seconds
DISTANCE = (1.0, 5.0)  # metres from the array's centre to a talker
TALKERS = 4  # positions simulated in each room
WIDEST = 1.1  # metres of an array that is turned as it likes in any room


def _eyring_absorption(dimensions, t60):
    """Energy absorption of the walls for a T60 in seconds (Eyring)."""
    x, y, z = dimensions
    surface = 2 * (x * y + y * z + z * x)
    return 1 - math.exp(-0.161 * x * y * z / (surface * t60))


def _image_order(dimensions, t60):
    """Reflection order that covers the first ~33 dB of the decay."""
    return int(math.ceil(0.55 * SPEED_OF_SOUND * t60 / min(dimensions)))


def _draw_room(rng, planar=False):
    """Draw a room, its array and talkers with their DOAs."""
    dimensions = rng.uniform(SMALLEST_ROOM, LARGEST_ROOM)
    t60 = rng.uniform(*T60)
    while True:  # an array and talkers that fit into the room
        centre = rng.uniform((0.6, 0.6, 1.0), (*(dimensions[:2] - 0.6), 1.8))
        yaw = rng.uniform(0, 2 * np.pi)
        axis = np.array([np.cos(yaw), np.sin(yaw), 0.0])
        front = np.array([-axis[1], axis[0], 0.0])
        place = rng, dimensions, centre, axis, front
        talkers = _draw_talkers(*place, around=2 * np.pi if planar else np.pi)
        if talkers is not None:
            break
    offsets = talkers - centre
    distance = np.linalg.norm(offsets, axis=1)
    doa = np.degrees(np.arccos(offsets @ axis / distance))
    if planar:
        doa = np.degrees(np.arctan2(offsets @ front, offsets @ axis)) % 360
    return {
        "dimensions": dimensions,
        "t60": t60,
        "centre": centre,
        "axis": axis,
        "front": front,
        "talkers": talkers,
        "doa": doa,
        "distance": distance,
    }


def _draw_talkers(rng, dimensions, centre, axis, front, around, tries=60):
    """Positions before or around the array, or None if they do not fit."""
    talkers = []
    for _ in range(tries):
        angle = rng.uniform(0, around)
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


def simulate(room, microphones, positions=None):
    """Simulate the responses from every talker to every microphone.

    Arguments
    ---------
    room : dict
        From `_draw_room`.
    microphones : sequence of int
        Microphone numbers of the array, from 1.
    positions : numpy.ndarray or None
        Of all its microphones, [mics] or [mics, 2], metres; None: the paper's
        15 microphones.

    Returns
    -------
    rirs : numpy.ndarray
        [talkers, mics, samples], float32, T60 + 50 ms long.
    """
    import pyroomacoustics

    positions = linear_array().numpy() if positions is None else positions
    used = positions[np.array(microphones) - 1]
    if positions.ndim == 1:
        along = used - positions[-1] / 2
        mics = room["centre"][:, None] + room["axis"][:, None] * along
    else:
        middle = (positions.min(0) + positions.max(0)) / 2
        plane = np.stack([room["axis"], room["front"]], axis=1)  # [3, 2]
        mics = room["centre"][:, None] + plane @ (used - middle).T
    absorption = _eyring_absorption(room["dimensions"], room["t60"])
    shoebox = pyroomacoustics.ShoeBox(
        room["dimensions"],
        fs=SAMPLE_RATE,
        materials=pyroomacoustics.Material(absorption),
        max_order=_image_order(room["dimensions"], room["t60"]),
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


def _measured_t60(rir):
    """Reverberation time of a response: a 20 dB fit to the Schroeder curve."""
    energy = np.cumsum(rir[::-1].astype(np.float64) ** 2)[::-1]
    level = 10 * np.log10(energy / energy[0] + 1e-12)
    start, end = np.argmax(level < -5), np.argmax(level < -25)
    if end <= start + 1:  # decays within a few samples: nearly anechoic
        return 3 * (end - start) / SAMPLE_RATE
    slope = np.polyfit(np.arange(start, end), level[start:end], 1)[0]
    return float(-60 / slope / SAMPLE_RATE)


ROOMS_PER_SHARD = 25
SPLITS = ("train", "valid", "test")


@one_at_a_time
def prepare_rooms(
    data_folder,
    counts,
    microphones,
    seed=1234,
    workers=2,
    progress=True,
    positions=None,
):
    """Simulate the bank; what is there already is kept.

    Arguments
    ---------
    data_folder : str
        The bank goes to `data_folder/rooms`.
    counts : dict
        Split ("train", "valid", "test") -> number of rooms.
    microphones : sequence of int
        Microphone numbers, from 1.
    seed : int
    workers : int
        Processes.
    progress : bool
        Show a progress bar.
    positions : array or None
        Of all microphones of the array, [mics] or [mics, 2], metres (see
        `SpatialFeatures.array_positions`); None: the paper's 15 microphones.
    """
    folder = Path(data_folder) / "rooms"
    settings = {"seed": seed, "microphones": list(microphones)}
    positions = _unusual(positions)
    if positions is not None:
        centimetres = (100 * positions).round(6).tolist()
        settings["positions_cm"] = centimetres
        _check_width(positions)
    _check_settings(folder, settings)
    array = tuple(microphones), positions
    jobs = [
        (_shard(folder, split, shard), split, rooms, array, seed)
        for split, count in counts.items()
        for shard, rooms in enumerate(_shards(count))
        if _stored(_shard(folder, split, shard)) < len(rooms)
    ]
    if not jobs:
        return
    remove_partial(folder)
    with worker_pool(workers) as pool:
        done = pool.imap_unordered(_simulate_shard, jobs)
        total = sum(len(rooms) for _, _, rooms, _, _ in jobs)
        with tqdm(
            total=total, desc="rooms", unit="room", disable=not progress
        ) as bar:
            for rooms in done:
                bar.update(rooms)


def _unusual(positions):
    """Positions as a numpy array; None for the paper's, as older banks say."""
    if positions is None:
        return None
    positions = np.asarray(positions, dtype=np.float64)
    usual = linear_array().numpy()
    same = positions.shape == usual.shape and np.allclose(positions, usual)
    return None if same else positions


def _check_width(positions):
    """Raise ValueError for arrays that the smallest room has no place for."""
    places = positions.reshape(len(positions), -1)
    width = float(np.linalg.norm(places.max(0) - places.min(0)))
    if width > WIDEST:
        raise ValueError(
            f"an array {width:.2f} m wide: the simulated rooms have place for "
            f"{WIDEST} m; give positions and spacings in centimetres"
        )


def _check_settings(folder, settings):
    """Refuse to mix two banks in one folder."""
    path = folder / "settings.json"
    if path.exists():
        present = read_json(path)
        if present != settings:
            raise ValueError(
                f"{folder} holds rooms of {present}, asked for {settings}: "
                "choose another data_folder or delete that one"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(settings))


def _shard(folder, split, shard):
    """File of one shard."""
    return folder / split / f"{shard:05d}.npz"


def _shards(count):
    """Indices of the rooms in each of a bank's files."""
    return [
        range(start, min(start + ROOMS_PER_SHARD, count))
        for start in range(0, count, ROOMS_PER_SHARD)
    ]


def _stored(path):
    """How many rooms a shard holds, 0 where there is none."""
    if not path.exists():
        return 0
    with np.load(path) as arrays:
        return sum(name.startswith("rirs_") for name in arrays.files)


def _simulate_shard(job):
    """Simulate and store the rooms of a shard, atomically; their number."""
    path, split, rooms, (microphones, positions), seed = job
    planar = positions is not None and positions.ndim == 2
    arrays = {}
    for i, index in enumerate(rooms):
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        room = _draw_room(rng, planar)
        rirs = simulate(room, microphones, positions)
        arrays[f"rirs_{i}"] = rirs.astype(np.float16)
        arrays[f"doa_{i}"] = room["doa"]
        arrays[f"info_{i}"] = np.array(
            [
                room["t60"],
                _measured_t60(rirs[0, 0]),
                *room["dimensions"],
                *room["distance"],
            ]
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part, open(part, "wb") as out:
        np.savez(out, **arrays)
    return len(rooms)


def angle_between(one, other):
    """Compute the angle between directions in degrees, 0 to 180.

    Example
    -------
    >>> float(angle_between(350.0, 20.0)), float(angle_between(10.0, 170.0))
    (30.0, 160.0)
    """
    angle = np.abs(one - other)
    return np.minimum(angle, 360 - angle)


class RoomBank:
    """Hold the rooms of one split in memory.

    Arguments
    ---------
    data_folder : str
        Where `prepare_rooms` put them.
    split : str
        "train", "valid" or "test".
    count : int
        How many rooms to use.

    Example
    -------
    >>> bank = RoomBank("data/embedded", "test", 100)  # doctest: +SKIP
    >>> bank.rirs(0, (0, 1)).shape  # doctest: +SKIP
    (2, 7, 8321)
    """

    def __init__(self, data_folder, split, count):
        folder = Path(data_folder) / "rooms"
        self._rirs, self.doa, self.info = [], [], []
        for shard, rooms in enumerate(_shards(count)):
            path = _shard(folder, split, shard)
            if _stored(path) < len(rooms):
                raise FileNotFoundError(
                    f"{path} is missing or has too few rooms: run "
                    f"prepare_rooms for {count} {split} rooms first"
                )
            with np.load(path) as arrays:
                for i in range(len(rooms)):
                    self._rirs.append(arrays[f"rirs_{i}"])
                    self.doa.append(arrays[f"doa_{i}"])
                    self.info.append(arrays[f"info_{i}"])

    def __len__(self):
        return len(self._rirs)

    def rirs(self, room, talkers):
        """Get the responses of some talkers of a room.

        Arguments
        ---------
        room : int
            Index of the room.
        talkers : sequence of int
            Indices of the talkers.

        Returns
        -------
        rirs : numpy.ndarray
            [talkers, mics, samples], float32.
        """
        return self._rirs[room][list(talkers)].astype(np.float32)

    def first_microphone(self):
        """Responses of all talkers at the first microphone.

        Returns
        -------
        rirs : list of numpy.ndarray
            [samples] each.
        """
        return [
            self.rirs(room, [talker])[0, 0]
            for room in range(len(self))
            for talker in range(len(self.doa[room]))
        ]

    def pairs(self, bucket):
        """List all (room, talker, other talker) with an angle in a bucket.

        Arguments
        ---------
        bucket : (float, float)
            Lowest and highest angle between the talkers, degrees; the lowest
            belongs to it, the highest does not (but for 180).

        Returns
        -------
        pairs : list of (int, int, int)
        """
        low, high = bucket
        indices = []
        for room, doa in enumerate(self.doa):
            angle = angle_between(doa[:, None], doa[None, :])
            top = np.inf if high >= 180 else high
            inside = (angle >= low) & (angle < top)
            np.fill_diagonal(inside, False)
            indices += [(room, int(a), int(b)) for a, b in np.argwhere(inside)]
        return indices

    def mean_t60(self):
        """Average nominal and measured reverberation time, in seconds."""
        info = np.stack(self.info)
        return float(info[:, 0].mean()), float(info[:, 1].mean())
