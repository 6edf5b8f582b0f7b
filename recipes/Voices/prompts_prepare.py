"""A person's speech with transcripts: the English prompts of Asterisk.

> apt-get download asterisk-core-sounds-en asterisk-core-sounds-en-g722
> python recipes/Voices/prompts_prepare.py . data/prompts --cmudict cmudict.dict

The folder holds the two .deb files, or what was unpacked from them (CC BY-SA
3.0; 554 prompts, one voice). Recordings are decoded, trimmed and
brought to one level at 16 kHz, and shared out at random, 80 : 10 : 10.
"""

import argparse
import gzip
import re
import sys
import zlib
from pathlib import Path

from voices_prepare import decode, trim, unpacked

from speechbrain_mpq.decoders.text_corpus import normalize
from speechbrain_mpq.decoders.vocabulary import Lexicon
from speechbrain_mpq.experiments.command_line import guarded
from speechbrain_mpq.locks import one_at_a_time
from speechbrain_mpq.simulation.recordings import (
    ffmpeg_program,
    limit_peak,
    run_jobs,
    seconds_of,
    set_level,
    write_flac,
)
from speechbrain_mpq.utils import write_json

TEXTS = "core-sounds-en.txt"
VOICE = "en_US_f_Allison"
NAMES = {"*": " star ", "#": " pound "}  # as they are said
SHORTEST = 0.2  # seconds of a trimmed recording


@one_at_a_time
def prepare_prompts(packages, data_folder, cmudict, workers=2):
    """Write speech, `<split>_speech.json` and lexicon.txt.

    Prompts of training and validation with words that the lexicon lacks are
    left out, counted and told; those of the test are kept.

    Arguments
    ---------
    packages : str or Path
        Folder of the two .deb files, or of what they hold.
    data_folder : str or Path
        Where to write; recordings that are there already are kept.
    cmudict : str or Path
        Lexicon in the form of CMUdict.
    workers : int
        Processes.
    """
    if not cmudict:
        raise ValueError("no lexicon: give cmudict, a file in CMUdict's form")
    ffmpeg_program()  # a missing program is reported before any work
    data_folder = Path(data_folder)
    lexicon = Lexicon.read(cmudict, fold=str.lower)
    folder = unpacked(Path(packages), data_folder / "unpacked")
    texts = read_texts(_only(folder, f"{TEXTS}*", "asterisk-core-sounds-en"))
    sounds = _only(folder, VOICE, "asterisk-core-sounds-en-g722")
    found = {
        key: path for key in texts if (path := sounds / f"{key}.g722").is_file()
    }
    jobs = [
        (path, data_folder / f"speech/{key}.flac")
        for key, path in found.items()
    ]
    new = [job for job in jobs if not seconds_of(job[1])]
    failures = run_jobs(_extract, new, workers, "prompts")
    for problem in sorted(failures.values()):
        print(problem)
    splits = {"train": {}, "valid": {}, "test": {}}
    left_out = 0
    for key in found:
        seconds = seconds_of(data_folder / f"speech/{key}.flac")
        split, words = split_of(key), texts[key]
        if split != "test" and not lexicon.covers(words):
            left_out += 1
        elif seconds:
            splits[split][key.replace("/", "_")] = {
                "wav": f"{{data_root}}/speech/{key}.flac",
                "length": seconds,
                "words": words,
                "speaker": "allison",
            }
    print(f"{left_out} prompts have words that the lexicon lacks: left out")
    for split, entries in splits.items():
        if not entries:
            raise ValueError(f"no prompts of {split}: get both packages whole")
        minutes = sum(entry["length"] for entry in entries.values()) / 60
        print(f"{split}: {len(entries)} prompts, {minutes:.1f} min")
        write_json(data_folder / f"{split}_speech.json", entries)
    lexicon.write(data_folder / "lexicon.txt")


def read_texts(path):
    """What is said in each prompt.

    Arguments
    ---------
    path : Path
        core-sounds-en.txt, packed or not: `name: text` on each line.

    Returns
    -------
    dict of str -> str
        Words as they are spoken, of all prompts that are speech.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    texts = {}
    for line in content.decode("utf-8").splitlines():
        key, _, text = line.partition(":")
        if line.startswith(";") or not text.strip():
            continue
        text = re.sub(r"[*#]", lambda sign: NAMES[sign.group()], text)
        if "[" not in text and normalize(text):  # else a tone, or silence
            texts[key.strip()] = normalize(text)
    return texts


def split_of(key):
    """Split of a prompt, by its name alone.

    Arguments
    ---------
    key : str

    Returns
    -------
    str

    Example
    -------
    >>> split_of("activated")
    'train'
    """
    draw = zlib.crc32(key.encode()) % 10
    return {0: "valid", 1: "test"}.get(draw, "train")


def _only(folder, name, package):
    """The file or folder of a package."""
    paths = sorted(folder.rglob(name))
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds no {name}: `apt-get download {package}` puts the "
            "package there"
        )
    return paths[0]


def _extract(job):
    """Decode, trim and level one recording."""
    path, target = job
    samples = trim(decode(path))
    if len(samples) < SHORTEST * 16000:
        raise ValueError(f"{path} has less than {SHORTEST} s of sound")
    write_flac(target, limit_peak(set_level(samples)))


def main(arguments=None):
    """Prepare from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", help="folder of .deb files, or unpacked")
    parser.add_argument("data_folder")
    parser.add_argument("--cmudict", required=True)
    parser.add_argument("--workers", type=int, default=2)
    prepare_prompts(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(guarded(main))
