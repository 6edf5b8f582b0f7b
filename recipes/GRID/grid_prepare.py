"""Sentences of the GRID corpus: the sound of its clips, and manifests.

> python recipes/GRID/grid_prepare.py /corpora/grid --data_folder data/grid

Clips are <speaker>/.../<sentence>.mpg, where six letters spell the sentence.
A few clips in one folder make a test set (--test_only), each clip being taken
for a speaker of its own.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np

from speechbrain_mpq.experiments.command_line import guarded
from speechbrain_mpq.locks import one_at_a_time
from speechbrain_mpq.simulation.recordings import (
    ffmpeg_program,
    read_sound,
    run_jobs,
    seconds_of,
    write_flac,
    write_manifests,
)

COMMANDS = {"b": "bin", "l": "lay", "p": "place", "s": "set"}
COLOURS = {"b": "blue", "g": "green", "r": "red", "w": "white"}
PREPOSITIONS = {"a": "at", "b": "by", "i": "in", "w": "with"}
DIGITS = dict(
    zip(
        "z123456789",
        "zero one two three four five six seven eight nine".split(),
    )
)
ADVERBS = {"a": "again", "n": "now", "p": "please", "s": "soon"}
NAME = re.compile(r"(?:.*_)?([blps][bgrw][abiw][a-vx-z][z1-9][anps])")
SPEAKER = re.compile(r"s[0-9]{1,2}")


def words_of(name):
    """The sentence that a file's name spells.

    Arguments
    ---------
    name : str
        Without an extension; what stands before a last underscore is left out.

    Returns
    -------
    words : str

    Example
    -------
    >>> words_of("id2_vcd_swwp2s")
    'set white with p two soon'
    """
    match = NAME.fullmatch(name)
    if not match:
        raise ValueError(
            f"{name} spells no sentence of GRID, as bbaf2n spells 'bin blue "
            "at f two now'"
        )
    command, colour, preposition, letter, digit, adverb = match[1]
    return (
        f"{COMMANDS[command]} {COLOURS[colour]} {PREPOSITIONS[preposition]} "
        f"{letter} {DIGITS[digit]} {ADVERBS[adverb]}"
    )


@one_at_a_time
def prepare_grid(
    corpus, data_folder, test_only=False, held_out=3, seed=1234, workers=4
):
    """Extract the sound and write the manifests.

    Arguments
    ---------
    corpus : str or Path
        Searched for .mpg files.
    data_folder : str or Path
    test_only : bool
        Write a test manifest alone; each clip is a speaker of its own.
    held_out : int
        Speakers of the validation and of the test split.
    seed : int
        Draws who they are.
    workers : int
        Processes.
    """
    ffmpeg_program()  # a missing program is reported before any work
    data_folder = Path(data_folder)
    clips = sorted(Path(corpus).resolve().rglob("*.mpg"))
    if not clips:
        raise FileNotFoundError(f"no .mpg files in {corpus}")
    entries, jobs = {}, []
    for clip in clips:
        speaker = clip.stem if test_only else speaker_of(clip)
        name = f"speech/{speaker}/{clip.stem}.flac"
        words = words_of(clip.stem)
        key = clip.stem if test_only else f"{speaker}_{clip.stem}"
        if key in entries:
            raise ValueError(
                f"{entries[key]['video']} and {clip} would both be {name}: "
                "leave one of them out"
            )
        entries[key] = {
            "wav": f"{{data_root}}/{name}",
            "words": words,
            "speaker": speaker,
            "video": str(clip),
        }
        if not seconds_of(data_folder / name):
            jobs.append((clip, data_folder / name))
    failures = run_jobs(extract, jobs, workers, "sound")
    if failures:
        raise ValueError("\n".join(sorted(failures.values())))
    for entry in entries.values():
        path = entry["wav"].replace("{data_root}", str(data_folder))
        entry["length"] = seconds_of(Path(path))
    if test_only:
        splits = {"test": entries}
    else:
        splits = split_speakers(entries, held_out, np.random.default_rng(seed))
    write_manifests(data_folder, splits)


def speaker_of(clip):
    """The nearest folder named like a speaker."""
    for folder in clip.parents:
        if SPEAKER.fullmatch(folder.name):
            return folder.name
    raise ValueError(
        f"{clip} is in no folder named like a speaker (s1 to s34): take single "
        "clips for a test set with --test_only"
    )


def extract(job):
    """Write the sound of a (clip, path)."""
    clip, path = job
    write_flac(path, read_sound(clip))


def split_speakers(entries, held_out, rng):
    """Train, valid and test without a common speaker.

    Arguments
    ---------
    entries : dict
        id -> entry.
    held_out : int
        Speakers of validation and of test.
    rng : numpy.random.Generator

    Returns
    -------
    splits : dict
        Split -> (id -> entry).
    """
    speakers = sorted({entry["speaker"] for entry in entries.values()})
    if not 0 < 2 * held_out < len(speakers):
        raise ValueError(
            f"of {len(speakers)} speakers, {held_out} each are no validation "
            "and test split with others to train with: give another "
            "--held_out, or --test_only"
        )
    order = rng.permutation(speakers).tolist()
    test, valid = order[:held_out], order[held_out : 2 * held_out]
    splits = {"train": {}, "valid": {}, "test": {}}
    for key, entry in entries.items():
        split = "train"
        if entry["speaker"] in test:
            split = "test"
        elif entry["speaker"] in valid:
            split = "valid"
        splits[split][key] = entry
    return splits


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", help="folder of the clips")
    parser.add_argument("--data_folder", default="data/grid")
    parser.add_argument("--test_only", action="store_true")
    parser.add_argument("--held_out", type=int, default=3, help="speakers")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--workers", type=int, default=4)
    return parser.parse_args()


if __name__ == "__main__":
    options = vars(arguments())
    sys.exit(guarded(lambda: prepare_grid(**options)))
