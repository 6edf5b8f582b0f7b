"""A bank of room impulse responses on disk, and the rooms of one split.

Only the microphones that a separator uses are simulated. Room i of a split
depends on (seed, split, i) alone, so a larger bank extends a smaller one.
"""

import json
import multiprocessing
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..whole_files import remove_partial, whole_file, write_text
from .rooms import draw_room, measured_t60, simulate

ROOMS_PER_SHARD = 25
SPLITS = ("train", "valid", "test")


def prepare_rooms(
    data_folder, counts, microphones, seed=1234, workers=2, progress=True
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
    """
    folder = Path(data_folder) / "rooms"
    settings = {"seed": seed, "microphones": list(microphones)}
    _check_settings(folder, settings)
    jobs = [
        (folder, split, shard, tuple(microphones), seed)
        for split, count in counts.items()
        for shard in range(-(-count // ROOMS_PER_SHARD))
        if not _shard(folder, split, shard).exists()
    ]
    if not jobs:
        return
    remove_partial(folder)
    context = multiprocessing.get_context("fork")
    with context.Pool(workers) as pool:
        done = pool.imap_unordered(_simulate_shard, jobs)
        total = len(jobs) * ROOMS_PER_SHARD
        with tqdm(
            total=total, desc="rooms", unit="room", disable=not progress
        ) as bar:
            for _ in done:
                bar.update(ROOMS_PER_SHARD)


def _check_settings(folder, settings):
    """Refuse to mix two banks in one folder."""
    path = folder / "settings.json"
    if path.exists():
        found = json.loads(path.read_text())
        if found != settings:
            raise ValueError(
                f"{folder} holds rooms of {found}, asked for {settings}: "
                "choose another data_folder or delete that one"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(settings))


def _shard(folder, split, shard):
    """File of one shard."""
    return folder / split / f"{shard:05d}.npz"


def _simulate_shard(job):
    """Simulate and store ROOMS_PER_SHARD rooms, atomically."""
    folder, split, shard, microphones, seed = job
    arrays = {}
    for i in range(ROOMS_PER_SHARD):
        index = shard * ROOMS_PER_SHARD + i
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        room = draw_room(rng)
        rirs = simulate(room, microphones)
        arrays[f"rirs_{i}"] = rirs.astype(np.float16)
        arrays[f"doa_{i}"] = room["doa"]
        arrays[f"info_{i}"] = np.array(
            [
                room["t60"],
                measured_t60(rirs[0, 0]),
                *room["dimensions"],
                *room["distance"],
            ]
        )
    path = _shard(folder, split, shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part, open(part, "wb") as out:
        np.savez(out, **arrays)


class RoomBank:
    """The rooms of one split, in memory.

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
        for shard in range(-(-count // ROOMS_PER_SHARD)):
            path = _shard(folder, split, shard)
            if not path.exists():
                raise FileNotFoundError(
                    f"{path} is missing: run prepare_rooms for {count} "
                    f"{split} rooms first"
                )
            with np.load(path) as arrays:
                for i in range(ROOMS_PER_SHARD):
                    self._rirs.append(arrays[f"rirs_{i}"])
                    self.doa.append(arrays[f"doa_{i}"])
                    self.info.append(arrays[f"info_{i}"])
        del self._rirs[count:], self.doa[count:], self.info[count:]

    def __len__(self):
        return len(self._rirs)

    def rirs(self, room, talkers):
        """Responses of some talkers of a room.

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

    def pairs(self, bucket):
        """All (room, talker, other talker) with an angle in a bucket.

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
        found = []
        for room, doa in enumerate(self.doa):
            angle = np.abs(doa[:, None] - doa[None, :])
            top = np.inf if high >= 180 else high
            inside = (angle >= low) & (angle < top)
            np.fill_diagonal(inside, False)
            found += [(room, int(a), int(b)) for a, b in np.argwhere(inside)]
        return found

    def mean_t60(self):
        """Nominal and measured mean reverberation time in seconds."""
        info = np.stack(self.info)
        return float(info[:, 0].mean()), float(info[:, 1].mean())
