"""Prepares LRS3-TED (or LRS2) for the separation experiment.

> python recipes/LRS3/lrs3_prepare.py /corpora/lrs3 --data_folder data/lrs3

Takes the sound out of the videos (16 kHz mono FLAC), selects the 141 hours of
the paper and writes three manifests. Interrupt it whenever you like: the same
command continues. See README.md for what the selection is.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from lrs3_audio import described, extract
from lrs3_layout import find_clips
from lrs3_selection import draw_clips, draw_speakers
from lrs3_transcripts import cut, read_transcript

from speechbrain_mpq.experiments.command_line import guarded
from speechbrain_mpq.locks import one_at_a_time
from speechbrain_mpq.simulation.recordings import (
    ffmpeg_program,
    write_manifests,
)

PARTS = {
    "lrs3": ("pretrain", "trainval", "test"),
    "lrs2": ("pretrain", "train", "valid", "test"),
}
SPEAKERS = {"lrs3": 4320, "lrs2": 0}
SHOWN = 5  # broken clips named in an error


@one_at_a_time
def prepare_lrs3(
    corpus,
    data_folder,
    layout="lrs3",
    pretrain_hours=113.0,
    valid_hours=2.0,
    speakers=None,
    longest=6.0,
    seed=1234,
    workers=4,
    skip_broken=False,
):
    """Extract the sound, select and write the manifests.

    Arguments
    ---------
    corpus : str or Path
        The folder with pretrain/, trainval/ and test/ (LRS2: pretrain/, main/).
    data_folder : str or Path
        `speech/` and `<split>_speech.json` go there.
    layout : str
        "lrs3" or "lrs2".
    pretrain_hours : float
        Drawn from pretrain; 0: none of it.
    valid_hours : float
        Held out of LRS3's trainval, by speakers; LRS2 has its own list.
    speakers : int or None
        Of the training split; 0: as they come; None: 4320, or 0 for LRS2.
    longest : float
        Seconds of a piece of a pretrain clip.
    seed : int
    workers : int
        Processes.
    skip_broken : bool
        Leave out clips with a missing, damaged or contradictory file, and
        list them in broken.txt, instead of raising a ValueError.
    """
    corpus, data_folder = Path(corpus).resolve(), Path(data_folder)
    ffmpeg_program()  # a missing program is reported before any work
    speakers = SPEAKERS[layout] if speakers is None else speakers
    parts = PARTS[layout][0 if pretrain_hours else 1 :]
    checked = Failures(data_folder / "broken.txt", skip_broken)
    clips, missing = find_clips(corpus, layout, parts)
    checked.add(missing)
    utterances, broken = read_transcripts(clips, longest)
    checked.add(broken)
    rng = np.random.default_rng(seed)

    whole = {
        part: [u for u in utterances if u["clip"].part == part]
        for part in parts
    }
    pretrain = whole.pop("pretrain", [])
    for part in whole:
        checked.add(extract(data_folder, whole[part], part, workers))
    entries = {part: described(data_folder, whole[part]) for part in whole}
    splits, held_out = split_parts(entries, layout, valid_hours, rng)
    pretrain = drawn_pretrain(
        pretrain, splits["train"], held_out, pretrain_hours, speakers, rng
    )
    checked.add(extract(data_folder, pretrain, "pretrain", workers))
    splits["train"] |= described(data_folder, pretrain)
    write_manifests(data_folder, splits)


class Failures:
    """Broken clips: refused, or listed in a file and left out.

    Arguments
    ---------
    path : Path
        The list.
    skip : bool
        Whether to leave them out.
    """

    def __init__(self, path, skip):
        self.path = path
        self.skip = skip
        path.unlink(missing_ok=True)

    def add(self, failures):
        """Note some, clip -> what is wrong; raise ValueError if not skipped."""
        if not failures:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        messages = sorted(failures.values())
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("\n".join(messages) + "\n")
        if self.skip:
            print(f"left out: {len(messages)} clips, see {self.path}")
            return
        shown = "\n".join(messages[:SHOWN])
        raise ValueError(
            f"{len(messages)} clips are broken, all of them in {self.path}:\n"
            f"{shown}\nRepair them, or leave them out with --skip_broken"
        )


def read_transcripts(clips, longest):
    """What is said in the clips, long ones in pieces.

    Arguments
    ---------
    clips : list of Clip
    longest : float
        Seconds of a piece.

    Returns
    -------
    utterances : list of dict
        "clip", "words", "start" and "end" (seconds; end None: whole clip).
    broken : dict
        Clip -> what is wrong with its transcript.
    """
    utterances, broken = [], {}
    for clip in clips:
        try:
            words, times = read_transcript(clip.transcript)
        except ValueError as error:
            broken[clip] = str(error)
            continue
        if clip.part == "pretrain" and not times:
            broken[clip] = f"{clip.transcript} has no word times"
            continue
        pieces = [(words, 0.0, None)]
        if clip.part == "pretrain":
            pieces = cut(times, longest)
        for words, start, end in pieces:
            span = {"start": start, "end": end}
            utterances.append({"clip": clip, "words": words, **span})
    return utterances, broken


def split_parts(entries, layout, valid_hours, rng):
    """Train, valid and test without pretrain, and who is held out.

    Arguments
    ---------
    entries : dict
        Part -> (id -> entry).
    layout : str
    valid_hours : float
    rng : numpy.random.Generator

    Returns
    -------
    splits : dict
        Split -> (id -> entry).
    held_out : set of str
        Speakers of valid and test; LRS2 does not know its speakers.
    """
    if layout == "lrs2":
        return entries, set()
    test = {entry["speaker"] for entry in entries["test"].values()}
    known = {
        key: entry
        for key, entry in entries["trainval"].items()
        if entry["speaker"] not in test
    }
    seconds = defaultdict(float)
    for entry in known.values():
        seconds[entry["speaker"]] += entry["length"]
    valid = draw_speakers(seconds, valid_hours, rng)
    splits = {"train": {}, "valid": {}, "test": entries["test"]}
    for key, entry in known.items():
        split = "valid" if entry["speaker"] in valid else "train"
        splits[split][key] = entry
    return splits, valid | test


def drawn_pretrain(utterances, train, held_out, hours, speakers, rng):
    """The pieces of pretrain that are trained on.

    Arguments
    ---------
    utterances : list of dict
        All pieces.
    train : dict
        Entries that are trained on anyway.
    held_out : set of str
    hours : float
    speakers : int
    rng : numpy.random.Generator

    Returns
    -------
    utterances : list of dict
    """
    seconds = defaultdict(float)
    for utterance in utterances:
        clip = utterance["clip"]
        if clip.speaker not in held_out:
            length = utterance["end"] - utterance["start"]
            seconds[clip.speaker, clip.name] += length
    known = {entry["speaker"] for entry in train.values()}
    chosen = set(draw_clips(seconds, hours, known, speakers, rng))
    return [
        utterance
        for utterance in utterances
        if (utterance["clip"].speaker, utterance["clip"].name) in chosen
    ]


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", help="folder of the corpus")
    parser.add_argument("--data_folder", default="data/lrs3")
    parser.add_argument("--layout", choices=sorted(PARTS), default="lrs3")
    parser.add_argument("--pretrain_hours", type=float, default=113.0)
    parser.add_argument("--valid_hours", type=float, default=2.0)
    parser.add_argument("--speakers", type=int, help="of training; 0: any")
    parser.add_argument("--longest", type=float, default=6.0, help="seconds")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--skip_broken", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    options = vars(arguments())
    sys.exit(guarded(lambda: prepare_lrs3(**options)))
