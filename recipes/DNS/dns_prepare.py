"""Manifests of the DNS Challenge's clean speech, for the recipes with noise.

> python recipes/DNS/dns_prepare.py DNS-Challenge --data_folder data/dns

Nothing is copied: the manifests name the challenge's own files. Readers occur
in one split only. See README.md.
"""

import argparse
import re
import sys
import zlib
from pathlib import Path

import soundfile

from speechbrain_mpq.experiments.command_line import guarded
from speechbrain_mpq.locks import one_at_a_time
from speechbrain_mpq.simulation.noise import (
    DNS_CLEAN,
    DNS_NOISE,
    audio_files,
    dns_folder,
)
from speechbrain_mpq.simulation.recordings import write_manifests

READER = re.compile(r"reader_(\d+)")
SAMPLE_RATE = 16000  # Hz
SHORTEST = 1.0  # seconds


@one_at_a_time
def prepare_dns(dns, data_folder, limit=None):
    """Write `<split>_speech.json` for the clean speech of the challenge.

    Arguments
    ---------
    dns : str or Path
        Folder with the challenge's `datasets` (or a copy of its layout).
    data_folder : str or Path
        The manifests go there.
    limit : int or None
        Files of each split at most.
    """
    clean = dns_folder(dns, DNS_CLEAN)
    if clean == Path(dns):
        raise ValueError(
            f"{dns} has none of {', '.join(DNS_CLEAN)}: give the folder that "
            "the challenge's download script has filled"
        )
    audio_files(dns_folder(dns, DNS_NOISE))  # or an error, before the work
    splits = {"train": {}, "valid": {}, "test": {}}
    for path in audio_files(clean):
        reader = reader_of(path)
        entries = splits[split_of(reader)]
        if limit is not None and len(entries) >= limit:
            continue
        information = soundfile.info(path)
        if information.samplerate != SAMPLE_RATE:
            raise ValueError(
                f"{path} has {information.samplerate} Hz: convert the speech "
                f"to {SAMPLE_RATE} Hz"
            )
        if information.duration < SHORTEST:
            continue
        key = path.relative_to(clean).with_suffix("").as_posix()
        entries[key.replace("/", "_")] = {
            "wav": str(path.resolve()),
            "length": information.duration,
            "speaker": reader,
            "words": "-",  # the challenge has no transcripts
        }
    write_manifests(data_folder, splits)


def reader_of(path):
    """Who reads a file.

    Arguments
    ---------
    path : Path

    Returns
    -------
    str
        The number in its name; without one, the name of its folder.

    Example
    -------
    >>> reader_of(Path("book_0_chp_9_reader_06709_5_seg_1.wav"))
    'reader_06709'
    """
    match = READER.search(path.name)
    return match[0] if match else path.parent.name


def split_of(reader):
    """Split of a reader: 90, 5 and 5 %, whatever other readers there are.

    Arguments
    ---------
    reader : str

    Returns
    -------
    str

    Example
    -------
    >>> splits = [split_of(f"reader_{n:05d}") for n in range(1000)]
    >>> 30 < splits.count("test") < 70
    True
    """
    place = zlib.crc32(reader.encode()) % 20
    return {0: "test", 1: "valid"}.get(place, "train")


def main():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dns", help="folder of the challenge")
    parser.add_argument("--data_folder", default="data/dns")
    parser.add_argument("--limit", type=int, help="files of each split")
    prepare_dns(**vars(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(guarded(main))
