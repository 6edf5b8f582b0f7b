"""Manifests, speech and lexicon of Switchboard.

> python recipes/Switchboard/switchboard_prepare.py swb1 \
    swb_ms98_transcriptions data/switchboard --cmudict cmudict.dict

The first folder holds the recordings (LDC97S62: sw02001.sph, both sides in one
file), the second one Mississippi State's transcripts. Utterances are cut out
at their times, a side of a conversation is a talker. Conversations are shared
out as switchboard_text_prepare.py does it with the same seed, so that language
models of its text have not read the test.
"""

import argparse
import sys
from pathlib import Path

import soundfile
from switchboard_text_prepare import SWITCHBOARD, conversations

from speechbrain_mpq.decoders.text_corpus import split_documents
from speechbrain_mpq.decoders.vocabulary import Lexicon
from speechbrain_mpq.experiments.command_line import guarded
from speechbrain_mpq.locks import one_at_a_time
from speechbrain_mpq.simulation.noise import resampled
from speechbrain_mpq.simulation.recordings import (
    limit_peak,
    run_jobs,
    seconds_of,
    write_flac,
)
from speechbrain_mpq.utils import write_json

SHORTEST, LONGEST = 0.3, 40.0  # seconds of an utterance
SIDES = "AB"  # channels 0 and 1


@one_at_a_time
def prepare_switchboard(
    switchboard_folder,
    transcripts,
    data_folder,
    cmudict,
    seed=1234,
    workers=2,
):
    """Write speech, `<split>_speech.json` and lexicon.txt.

    Training and validation utterances with words that the lexicon lacks are
    left out, counted and told; those of the test are kept.

    Arguments
    ---------
    switchboard_folder : str or Path
        Recordings, in any subfolders.
    transcripts : str or Path
        Folder of their transcripts.
    data_folder : str or Path
        Where to write; what is there already is kept.
    cmudict : str or Path
        Lexicon in the form of CMUdict.
    seed : int
        By which conversations are shared out.
    workers : int
        Processes.
    """
    if not cmudict:
        raise ValueError("no lexicon: give cmudict, in the form of CMUdict")
    data_folder = Path(data_folder)
    lexicon = Lexicon.read(cmudict, fold=str.lower)
    spoken = conversations(transcripts)
    recordings = find_recordings(switchboard_folder, spoken)
    splits = split_documents(spoken, seed=seed)
    cut_utterances(spoken, recordings, data_folder, workers)
    manifests = {
        split: _manifest(split, names, spoken, data_folder, lexicon)
        for split, names in splits.items()
    }
    lexicon.write(data_folder / "lexicon.txt")
    for split, entries in manifests.items():
        write_json(data_folder / f"{split}_speech.json", entries)


def find_recordings(folder, names):
    """The recording of each conversation.

    Arguments
    ---------
    folder : str or Path
        Searched with its subfolders.
    names : iterable of str
        Conversations, such as "sw2001".

    Returns
    -------
    dict of str -> Path
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"no folder {folder}: give that of Switchboard's recordings"
        )
    found = {}
    for path in sorted(Path(folder).rglob("sw*.*")):
        if path.suffix.lower() in (".sph", ".wav", ".flac"):
            found[f"sw{path.stem[2:].lstrip('0')}"] = path
    missing = sorted(set(names) - set(found))
    if missing:
        raise FileNotFoundError(
            f"{folder} holds no recording of {len(missing)} conversations that "
            f"have transcripts, such as sw0{missing[0][2:]}.sph: copy all "
            "discs there"
        )
    return {name: found[name] for name in names}


def cut_utterances(spoken, recordings, data_folder, workers):
    """Write every utterance that is not there yet.

    Arguments
    ---------
    spoken : dict
        See `switchboard_text_prepare.conversations`.
    recordings : dict of str -> Path
        Of the same conversations.
    data_folder : Path
        speech/<conversation>/<utterance>.flac, 16 kHz.
    workers : int
        Processes.
    """
    jobs = []
    for name, utterances in spoken.items():
        new = tuple(
            (u.start, u.stop, u.side, _path(data_folder, name, u))
            for u in utterances
            if not seconds_of(_path(data_folder, name, u))
        )
        if new:
            jobs.append((recordings[name], new))
    failures = run_jobs(_cut, jobs, workers, "conversations")
    if failures:
        raise ValueError("\n".join(sorted(failures.values())))


def _path(data_folder, name, utterance):
    """Where an utterance goes."""
    return data_folder / f"speech/{name}/{utterance.key}.flac"


def _cut(job):
    """Cut the utterances of a conversation out of its recording."""
    recording, pieces = job
    try:
        samples, rate = soundfile.read(recording, always_2d=True)
    except RuntimeError as error:
        raise ValueError(
            f"{recording} cannot be read ({error}): packed by shorten? Unpack "
            "it with `sph2pipe -f wav`"
        ) from error
    if samples.shape[1] != len(SIDES):
        raise ValueError(f"{recording} has {samples.shape[1]} channels, not 2")
    for start, stop, side, path in pieces:
        first, last = round(start * rate), round(stop * rate)
        if not 0 <= first < last <= len(samples):
            raise ValueError(
                f"{path.stem} is at {start:g} to {stop:g} s, {recording} has "
                f"{len(samples) / rate:g} s: copy both again"
            )
        piece = samples[first:last, SIDES.index(side)]
        write_flac(path, limit_peak(resampled(piece, rate)))


def _manifest(split, names, spoken, data_folder, lexicon):
    """Entries of a split; tells what was left out."""
    entries, left_out = {}, 0
    for name in names:
        for utterance in spoken[name]:
            if split != "test" and not lexicon.covers(utterance.words):
                left_out += 1
                continue
            seconds = seconds_of(_path(data_folder, name, utterance))
            if not SHORTEST <= seconds <= LONGEST:
                left_out += 1
                continue
            entries[utterance.key] = {
                "wav": f"{{data_root}}/speech/{name}/{utterance.key}.flac",
                "length": seconds,
                "words": utterance.words,
                "speaker": f"{name}{utterance.side}",
            }
    hours = sum(entry["length"] for entry in entries.values()) / 3600
    print(
        f"{split}: {len(entries)} utterances, {hours:.1f} h; {left_out} have "
        f"words that the lexicon lacks or not {SHORTEST:g} to {LONGEST:g} s, "
        "and are left out"
    )
    if not entries:
        raise ValueError(
            f"nothing is left of {split}: the lexicon is another language's"
        )
    return entries


def main(arguments=None):
    """Prepare from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("switchboard_folder")
    parser.add_argument("transcripts", help=f"folder of {SWITCHBOARD}")
    parser.add_argument("data_folder")
    parser.add_argument("--cmudict", required=True)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--workers", type=int, default=2)
    prepare_switchboard(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(guarded(main))
