"""Connected digit strings of real people from the Free Spoken Digit Dataset.

> python recipes/FSDD/fsdd_prepare.py free-spoken-digit-dataset/recordings

Strings of digits that one speaker has recorded one by one, with short pauses
between them, at 16 kHz. Test speakers occur in no other split. See README.md.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import soundfile

from speechbrain_mpq.experiments.command_line import guarded
from speechbrain_mpq.locks import one_at_a_time
from speechbrain_mpq.simulation.augmentation import change_speed
from speechbrain_mpq.simulation.noise import resampled
from speechbrain_mpq.simulation.recordings import (
    PEAK,
    limit_peak,
    set_level,
    write_flac,
    write_manifests,
)
from speechbrain_mpq.simulation.rooms import prepare_rooms
from speechbrain_mpq.utils import SAMPLE_RATE

DIGITS = "zero one two three four five six seven eight nine".split()
NAME = re.compile(r"([0-9])_([a-z]+)_([0-9]+)\.(?:wav|flac)")
SPLITS = ("train", "valid", "test")
VALID_TAKES = 5  # 0 to 4: the test split of the data set itself
LENGTHS = (4, 7)  # digits of a string
PAUSE = (0.05, 0.3)  # seconds between digits
ROOMS = {"train": 200, "valid": 50, "test": 100}  # as hparams/kl_4bit.yaml
MICROPHONES = (1, 4, 6, 8, 10, 12, 15)  # that the separator uses


@one_at_a_time
def prepare_fsdd(
    recordings,
    data_folder,
    test_speakers=("lucas", "yweweler"),
    train=2000,
    valid=60,
    test=200,
    speed=0.15,
    seed=1234,
    rooms=None,
):
    """Write the strings, their manifests and the rooms.

    Arguments
    ---------
    recordings : str or Path
        Folder of {digit}_{speaker}_{take}.wav or .flac.
    data_folder : str or Path
        `speech/<split>/*.flac` and `<split>_speech.json` go there.
    test_speakers : sequence of str
        At least two; all others train.
    train, valid, test : int
        Strings of each split.
    speed : float
        Training strings are played up to this share faster or slower, which
        changes the voice too. 0: as recorded.
    seed : int
        String i of a split depends on it and on i alone.
    rooms : dict or None
        Split -> rooms to simulate; None: as many as hparams/kl_4bit.yaml asks
        for.
    """
    if not 0 <= speed < 0.5:
        raise ValueError(f"speed must lie in 0 to 0.5, not {speed}")
    takes = find_takes(recordings)
    pools = split_takes(takes, test_speakers)
    sounds = {path: read_take(path) for path in takes.values()}
    counts = dict(zip(SPLITS, (train, valid, test)))
    splits, data_folder = {}, Path(data_folder)
    for number, (split, count) in enumerate(counts.items()):
        splits[split] = {}
        for index in range(count):
            rng = np.random.default_rng([seed, number, index])
            speaker = sorted(pools[split])[index % len(pools[split])]
            samples, digits = string(pools[split][speaker], sounds, rng)
            if split == "train":
                samples = play_faster(samples, rng.uniform(-speed, speed))
            key = f"{split}_{index:06d}"
            write_flac(data_folder / f"speech/{split}/{key}.flac", samples)
            splits[split][key] = {
                "wav": f"{{data_root}}/speech/{split}/{key}.flac",
                "length": len(samples) / SAMPLE_RATE,
                "words": " ".join(DIGITS[digit] for digit in digits),
                "speaker": speaker,
            }
    rooms = ROOMS if rooms is None else rooms
    prepare_rooms(data_folder, rooms, MICROPHONES, progress=False)
    write_manifests(data_folder, splits)


def find_takes(recordings):
    """All recordings of a folder.

    Arguments
    ---------
    recordings : str or Path

    Returns
    -------
    takes : dict
        (digit, speaker, take) -> path.
    """
    takes = {}
    for path in sorted(Path(recordings).glob("*")):
        match = NAME.fullmatch(path.name)
        if match:
            digit, speaker, take = match.groups()
            takes[int(digit), speaker, int(take)] = path
    if not takes:
        raise FileNotFoundError(
            f"{recordings} holds no recordings named like 7_jackson_32.wav: "
            "name the folder recordings/ of a clone of "
            "https://github.com/Jakobovski/free-spoken-digit-dataset"
        )
    return takes


def split_takes(takes, test_speakers):
    """What each split may use.

    Arguments
    ---------
    takes : dict
        From `find_takes`.
    test_speakers : sequence of str

    Returns
    -------
    pools : dict
        Split -> speaker -> digit -> list of paths.
    """
    speakers = {speaker for _, speaker, _ in takes}
    unknown = set(test_speakers) - speakers
    if unknown:
        raise ValueError(
            f"no recordings of {sorted(unknown)}: there are {sorted(speakers)}"
        )
    if len(set(test_speakers)) < 2 or len(speakers - set(test_speakers)) < 2:
        raise ValueError(
            "mixtures need two speakers in test and two others in training; "
            f"test has {sorted(test_speakers)} of {sorted(speakers)}"
        )
    pools = {split: {} for split in SPLITS}
    for (digit, speaker, take), path in takes.items():
        split = "valid" if take < VALID_TAKES else "train"
        if speaker in test_speakers:
            split = "test"
        digits = pools[split].setdefault(speaker, {})
        digits.setdefault(digit, []).append(path)
    for split, people in pools.items():
        for speaker, digits in people.items():
            missing = set(range(10)) - set(digits)
            if missing:
                raise ValueError(
                    f"{speaker} has no {sorted(missing)} for {split}: is the "
                    "data set whole?"
                )
    return pools


def read_take(path):
    """One digit at 16 kHz, of a fixed level, faded in and out.

    Arguments
    ---------
    path : Path

    Returns
    -------
    samples : numpy.ndarray
        [samples], float.
    """
    try:
        samples, rate = soundfile.read(path)
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if samples.ndim != 1 or not samples.any():
        raise ValueError(f"{path} is silent or not mono")
    return set_level(resampled(samples, rate))


def string(digits, sounds, rng):
    """Some digits of a speaker, one after the other.

    Arguments
    ---------
    digits : dict
        Digit -> paths of its takes.
    sounds : dict
        Path -> samples.
    rng : numpy.random.Generator

    Returns
    -------
    samples : numpy.ndarray
        [samples], float.
    chosen : list of int
        The digits.
    """
    chosen = rng.integers(10, size=rng.integers(LENGTHS[0], LENGTHS[1] + 1))
    pieces = []
    for digit in chosen.tolist():
        takes = digits[digit]
        pieces.append(sounds[takes[rng.integers(len(takes))]])
        pieces.append(np.zeros(round(rng.uniform(*PAUSE) * SAMPLE_RATE)))
    samples = np.concatenate(pieces[:-1])
    return limit_peak(samples), chosen.tolist()


def play_faster(samples, share):
    """Speech of another speed, pitch and formants.

    Arguments
    ---------
    samples : numpy.ndarray
        [samples].
    share : float
        0.1: a tenth faster; negative: slower. Rounded to hundredths.

    Returns
    -------
    samples : numpy.ndarray
        [samples], another number of them.

    Example
    -------
    >>> len(play_faster(np.ones(1100), 0.1)), len(play_faster(np.ones(5), 0))
    (1000, 5)
    """
    return change_speed(samples, 1 + share).clip(-PEAK, PEAK)


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recordings", help="folder of the recordings")
    parser.add_argument("--data_folder", default="data/fsdd")
    parser.add_argument(
        "--test_speakers", nargs="+", default=["lucas", "yweweler"]
    )
    parser.add_argument("--train", type=int, default=2000, help="strings")
    parser.add_argument("--valid", type=int, default=60, help="strings")
    parser.add_argument("--test", type=int, default=200, help="strings")
    parser.add_argument("--speed", type=float, default=0.15)
    parser.add_argument("--seed", type=int, default=1234)
    return parser.parse_args()


if __name__ == "__main__":
    options = vars(arguments())
    sys.exit(guarded(lambda: prepare_fsdd(**options)))
