"""Transcripts of the AMI meetings, as text for language models.

> python recipes/AMI/ami_text_prepare.py ami_public_manual_1.6.2 data/ami_text

Reads the manual annotations in NXT's form: words/*.words.xml and
segments/*.segments.xml. The splits are those of recognition on the full corpus.
"""

import argparse
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

from speechbrain_mpq.decoders.text_corpus import normalize, write_corpus
from speechbrain_mpq.experiments.command_line import guarded
from speechbrain_mpq.locks import one_at_a_time

# Meetings of the full-corpus partition by the beginnings of their names.
VALID = "ES2011 IS1008 TS3004 IB4001 IB4002 IB4003 IB4004 IB4010 IB4011"
TEST = "ES2004 IS1009 TS3003 EN2002"
_ID = "{http://nite.sourceforge.net/}id"
_CHILD = "{http://nite.sourceforge.net/}child"
_RANGE = re.compile(r"id\(([^)]+)\)(?:\.\.id\(([^)]+)\))?")


def read_words(path):
    """Words of a speaker in a meeting, in order.

    Arguments
    ---------
    path : str or Path
        A file such as ES2002a.A.words.xml.

    Returns
    -------
    list of (str, str)
        Id and word; the word is empty for punctuation, noises and gaps.
    """
    words = []
    for element in _root(path):
        spoken = element.tag == "w" and element.get("punc") != "true"
        text = (element.text or "") if spoken else ""
        words.append((element.get(_ID), text))
    return words


def read_segments(path, words):
    """Utterances of a speaker in a meeting.

    Arguments
    ---------
    path : str or Path
        A file such as ES2002a.A.segments.xml.
    words : list of (str, str)
        Of the same speaker, from `read_words`.

    Returns
    -------
    list of (float, str)
        Start in seconds, and normalized words.
    """
    places = {key: index for index, (key, _) in enumerate(words)}
    utterances = []
    for segment in _root(path):
        texts = []
        for child in segment.iter(_CHILD):
            match = _RANGE.search(child.get("href", ""))
            ends = [end for end in match.groups() if end] if match else []
            if not ends or any(end not in places for end in ends):
                raise ValueError(
                    f"{path}: a segment refers to {child.get('href')!r}, which "
                    "its words file lacks: are both of one release?"
                )
            start, stop = places[ends[0]], places[ends[-1]]
            texts += [text for _, text in words[start : stop + 1]]
        line = normalize(" ".join(filter(None, texts)))
        if line:
            start = float(segment.get("transcriber_start", "nan"))
            utterances.append((start, line))
    return utterances


@one_at_a_time
def prepare_ami_text(folder, data_folder, vocabulary=None):
    """Write train.txt, valid.txt, test.txt and vocab.txt.

    Arguments
    ---------
    folder : str or Path
        Of the annotations, with words/ and segments/.
    data_folder : str or Path
        Where to write.
    vocabulary : int or None
        Words and special symbols; None: all words of training.

    Returns
    -------
    dict
        See `write_corpus`. A document is a meeting.
    """
    paths = sorted(Path(folder, "segments").glob("*.segments.xml"))
    if not paths:
        raise FileNotFoundError(
            f"{folder} has no segments/*.segments.xml: name the folder of "
            "AMI's manual annotations"
        )
    meetings = defaultdict(list)
    for path in paths:
        speaker = path.name.removesuffix(".segments.xml")
        words = Path(folder, "words", f"{speaker}.words.xml")
        if not words.is_file():
            raise FileNotFoundError(f"no {words} for {path.name}")
        meeting = speaker.rpartition(".")[0]
        meetings[meeting] += read_segments(path, read_words(words))
    splits = {"train": [], "valid": [], "test": []}
    for meeting in sorted(meetings):
        splits[split_of(meeting)].append(meeting)
    documents = {
        meeting: [line for _, line in sorted(rows)]
        for meeting, rows in meetings.items()
    }
    return write_corpus(data_folder, documents, splits, vocabulary)


def split_of(meeting):
    """Split of a meeting.

    Example
    -------
    >>> split_of("ES2011c"), split_of("EN2002a"), split_of("ES2002a")
    ('valid', 'test', 'train')
    """
    if meeting.startswith(tuple(VALID.split())):
        return "valid"
    return "test" if meeting.startswith(tuple(TEST.split())) else "train"


def _root(path):
    """The root of an XML file."""
    try:
        return ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is no XML ({error})") from error


def main(arguments=None):
    """Prepare from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("data_folder")
    parser.add_argument("--vocabulary", type=int)
    options = parser.parse_args(arguments)
    prepare_ami_text(options.folder, options.data_folder, options.vocabulary)


if __name__ == "__main__":
    sys.exit(guarded(main))
