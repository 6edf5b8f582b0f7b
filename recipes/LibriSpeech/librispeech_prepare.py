"""Manifests and lexicon of LibriSpeech or mini-LibriSpeech.

> python recipes/LibriSpeech/librispeech_prepare.py LibriSpeech data/libri \
    --cmudict cmudict.dict --train train-clean-5 --valid dev-clean-2

The folder holds the subsets as they are unpacked: train-clean-5/1088/134315/
with 1088-134315-0000.flac, ... and 1088-134315.trans.txt.
"""

import argparse
import sys
from pathlib import Path

from speechbrain_mpq.decoders.vocabulary import Lexicon
from speechbrain_mpq.experiments.command_line import guarded
from speechbrain_mpq.locks import one_at_a_time
from speechbrain_mpq.simulation.recordings import seconds_of
from speechbrain_mpq.utils import write_json

LONGEST = 40.0  # seconds; the longest utterances of LibriSpeech have 35


@one_at_a_time
def prepare_librispeech(librispeech_folder, data_folder, cmudict, subsets):
    """Write `<name>_speech.json` and lexicon.txt.

    Training and validation utterances with words that the lexicon lacks are
    left out, counted and told; those of test sets are kept.

    Arguments
    ---------
    librispeech_folder : str or Path
        Holds the subsets.
    data_folder : str or Path
        Where to write.
    cmudict : str or Path
        Lexicon in the form of CMUdict: CMUdict itself, or LibriSpeech's
        librispeech-lexicon.txt.
    subsets : dict
        Name of a manifest, "train", "valid" or a test set -> names of its
        subsets.
    """
    folder, data_folder = Path(librispeech_folder), Path(data_folder)
    if not cmudict:
        raise ValueError(
            "no lexicon: give cmudict, CMUdict itself or LibriSpeech's "
            "librispeech-lexicon.txt"
        )
    names = [name for subset in subsets.values() for name in subset]
    missing = [name for name in names if not (folder / name).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"no {folder / missing[0]}: unpack {missing[0]}.tar.gz there, or "
            "name other subsets"
        )
    lexicon = Lexicon.read(cmudict, fold=str.upper)
    data_folder.mkdir(parents=True, exist_ok=True)
    manifests = {}
    for split, parts in subsets.items():
        entries = {}
        for part in parts:
            entries.update(read_subset(folder / part))
        spoken = entries
        if split in ("train", "valid"):
            spoken = {
                key: entry
                for key, entry in entries.items()
                if lexicon.covers(entry["words"])
            }
        hours = sum(entry["length"] for entry in spoken.values()) / 3600
        print(
            f"{split}: {len(spoken)} utterances, {hours:.1f} h; "
            f"{len(entries) - len(spoken)} have words that the lexicon lacks "
            "and are left out"
        )
        if not spoken:
            raise ValueError(
                f"nothing is left of {split}: {cmudict} is another language's"
            )
        manifests[split] = spoken
    lexicon.write(data_folder / "lexicon.txt")
    for split, entries in manifests.items():
        write_json(data_folder / f"{split}_speech.json", entries)


def read_subset(folder):
    """Utterances of a subset.

    Arguments
    ---------
    folder : Path
        As train-clean-5.

    Returns
    -------
    dict
        Utterance -> "wav", "length", "words" and "speaker".
    """
    entries = {}
    for path in sorted(folder.glob("*/*/*.trans.txt")):
        text = path.read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), 1):
            key, _, words = line.strip().partition(" ")
            audio = path.with_name(f"{key}.flac")
            if not words or not audio.is_file():
                what = "no words" if audio.is_file() else f"no {audio.name}"
                raise ValueError(f"{path}, line {number}: {what} for {key!r}")
            seconds = seconds_of(audio) or 0
            if not 0 < seconds <= LONGEST:
                raise ValueError(
                    f"{audio} has {seconds:g} s and not up to {LONGEST:g}: it "
                    "is damaged: unpack it anew"
                )
            entries[key] = {
                "wav": str(audio.resolve()),
                "length": seconds,
                "words": words,
                "speaker": key.partition("-")[0],
            }
    if not entries:
        raise FileNotFoundError(
            f"{folder} holds no <speaker>/<chapter>/*.trans.txt: give a subset "
            "of LibriSpeech as it is unpacked"
        )
    return entries


def main(arguments=None):
    """Prepare from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("librispeech_folder")
    parser.add_argument("data_folder")
    parser.add_argument("--cmudict", required=True)
    for name in ("train", "valid", "test"):
        parser.add_argument(f"--{name}", nargs="+", default=[])
    options = vars(parser.parse_args(arguments))
    subsets = {name: options.pop(name) for name in ("train", "valid", "test")}
    subsets = {name: parts for name, parts in subsets.items() if parts}
    prepare_librispeech(**options, subsets=subsets)


if __name__ == "__main__":
    sys.exit(guarded(main))
