"""Transcripts of Switchboard and Fisher, as text for language models.

> python recipes/Switchboard/switchboard_text_prepare.py data/swbd_text \
>     --switchboard swb_ms98_transcriptions --fisher fe_03_p1_tran fe_03_p2_tran

Switchboard in Mississippi State's form (sw2001A-ms98-a-trans.text), Fisher as
the LDC has it (trans/000/fe_03_00001.txt). Conversations of Switchboard are
shared out to validation and test; Fisher trains.
"""

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from speechbrain_mpq.decoders.text_corpus import (
    normalize,
    split_documents,
    write_corpus,
)
from speechbrain_mpq.experiments.command_line import guarded
from speechbrain_mpq.locks import one_at_a_time

SWITCHBOARD = "sw*-ms98-a-trans.text"
_FISHER = re.compile(r"([\d.]+) ([\d.]+) ([AB]): ?(.*)")
# [laughter-yeah] was said laughing; [vocalized-noise] is no word.
_LAUGHED = re.compile(r"\[laughter-([^\]]+)\]")
_MEANT = re.compile(r"\[([^\]/]+)/[^\]]+\]")  # [splat/split]: what was said
_NO_WORD = re.compile(r"\[[^\]]*\]|<[^>]*>|\(\(|\)\)|_1")
_BROKEN = re.compile(
    r"\S*-\[[^\]]*\]\S*|\S*\[[^\]]*\]-\S*"
)  # th[at]- is no word


def clean(text):
    """Words of a transcript without its marks.

    Arguments
    ---------
    text : str

    Returns
    -------
    str

    Example
    -------
    >>> clean("[laughter-yeah] i th[at]- [noise] <b_aside> {alot} um-hum_1")
    'yeah i alot um hum'
    """
    text = _LAUGHED.sub(r"\1", text)
    text = _BROKEN.sub(" ", text)
    text = _NO_WORD.sub(" ", _MEANT.sub(r"\1", text))
    return normalize(text.replace("{", " ").replace("}", " "))


@dataclass(frozen=True, order=True)
class Utterance:
    """What one side says, from `start` to `stop` in seconds.

    Arguments
    ---------
    start : float
        Seconds.
    words : str
        Cleaned.
    stop : float
        Seconds.
    key : str
        Its name, such as "sw2001A-ms98-a-0002".
    side : str
        The talker, "A" or "B".
    """

    start: float
    words: str
    stop: float
    key: str
    side: str


def conversations(folder):
    """Utterances of each conversation that have words.

    Arguments
    ---------
    folder : str or Path
        Searched with its subfolders.

    Returns
    -------
    dict of str -> list of Utterance
        Conversation, such as "sw2001" -> utterances of both sides in order.
    """
    found = {}
    for path in sorted(Path(folder).rglob(SWITCHBOARD)):
        for number, line in enumerate(_lines(path), 1):
            parts = line.split(maxsplit=3)
            if len(parts) < 3:
                raise ValueError(f"{path}, line {number}: no utterance")
            words = clean(parts[3]) if len(parts) > 3 else ""
            if words:
                start, stop = (_seconds(t, path, number) for t in parts[1:3])
                name, side = path.name[:6], path.name[6]
                utterance = Utterance(start, words, stop, parts[0], side)
                found.setdefault(name, []).append(utterance)
    if not found:
        raise FileNotFoundError(f"{folder} holds no {SWITCHBOARD}")
    return {name: sorted(utterances) for name, utterances in found.items()}


def read_switchboard(folder):
    """Words of each conversation.

    Arguments
    ---------
    folder : str or Path
        Searched with its subfolders.

    Returns
    -------
    dict of str -> list of str
        Conversation -> utterances of both sides in order.
    """
    found = conversations(folder)
    return {name: [u.words for u in spoken] for name, spoken in found.items()}


def read_fisher(folder):
    """Utterances of each conversation.

    Arguments
    ---------
    folder : str or Path
        Searched with its subfolders.

    Returns
    -------
    dict of str -> list of str
        Conversation, such as "fe_03_00001" -> utterances.
    """
    conversations = {}
    for path in sorted(Path(folder).rglob("fe_03_*.txt")):
        rows = []
        for number, line in enumerate(_lines(path), 1):
            if not line.strip() or line.startswith("#"):
                continue
            match = _FISHER.fullmatch(line.strip())
            if not match:
                raise ValueError(
                    f"{path}, line {number}: no utterance such as "
                    "'3.76 5.54 A: and i generally prefer'"
                )
            words = clean(match[4])
            if words:
                rows.append(words)
        conversations[path.stem] = rows
    if not conversations:
        raise FileNotFoundError(f"{folder} holds no fe_03_*.txt")
    return conversations


@one_at_a_time
def prepare_switchboard_text(
    data_folder, switchboard, fisher=(), vocabulary=30430, seed=1234
):
    """Write train.txt, valid.txt, test.txt and vocab.txt.

    Arguments
    ---------
    data_folder : str or Path
        Where to write.
    switchboard : str or Path
        Folder of its transcripts.
    fisher : sequence of str or Path
        Folders of Fisher's.
    vocabulary : int or None
        Words and special symbols; None: all words of training.
    seed : int
        By which conversations of Switchboard are shared out.

    Returns
    -------
    dict
        See `write_corpus`.
    """
    documents = read_switchboard(switchboard)
    splits = split_documents(documents, seed=seed)
    for folder in fisher:
        more = read_fisher(folder)
        documents |= more
        splits["train"] += list(more)
    return write_corpus(data_folder, documents, splits, vocabulary)


def _lines(path):
    """Lines of a transcript, which may have letters of Latin 1."""
    return path.read_text(encoding="latin-1").splitlines()


def _seconds(text, path, number):
    """A time of a transcript."""
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(
            f"{path}, line {number}: {text!r} is no time"
        ) from error


def main(arguments=None):
    """Prepare from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_folder")
    parser.add_argument("--switchboard", required=True)
    parser.add_argument("--fisher", nargs="+", default=())
    parser.add_argument("--vocabulary", type=int, default=30430)
    parser.add_argument("--seed", type=int, default=1234)
    prepare_switchboard_text(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(guarded(main))
