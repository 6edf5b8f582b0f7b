"""Transcripts of LRS3-TED and LRS2, and where long clips are cut.

A transcript is a text file beside its video:

    Text:  THE FIRST THING THAT
    Conf:  4
    Ref:  0Fi83BHQsMA

    WORD START END ASDSCORE
    THE 0.10 0.22 5.1
    ...

Word times, in seconds of the clip, are in the pretrain part only; some
releases have tables of face boxes in between.
"""

import re
from pathlib import Path

WORD_TABLE = "WORD START END"
MARGIN = 0.25  # seconds kept around the words of a piece


def read_transcript(path):
    """The words of a clip and, where the file has them, their times.

    Arguments
    ---------
    path : str or Path
        The .txt file.

    Returns
    -------
    words : str
        Lower case; marks like {NS} for noises are left out.
    times : list of (str, float, float)
        Word, start and end in seconds; empty without a table of them.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error
    texts = [line for line in lines if line.startswith("Text:")]
    if not texts:
        raise ValueError(f"{path} has no line that begins with 'Text:'")
    words = plain(texts[0].removeprefix("Text:"))
    if not words:
        raise ValueError(f"{path} has no words")
    return words, _word_times(path, lines)


def plain(text):
    """Lower-case words without marks for noises.

    Arguments
    ---------
    text : str

    Returns
    -------
    words : str

    Example
    -------
    >>> plain("  WELL {NS} IT'S  OVER ")
    "well it's over"
    """
    return " ".join(re.sub(r"\{[^}]*\}", " ", text).lower().split())


def _word_times(path, lines):
    """Rows below WORD START END, checked."""
    heads = [n for n, line in enumerate(lines) if line.startswith(WORD_TABLE)]
    if not heads:
        return []
    times, before = [], 0.0
    for number, line in enumerate(lines[heads[0] + 1 :], heads[0] + 2):
        if not line.strip():
            break
        try:
            word, start, end = line.split()[:3]
            start, end = float(start), float(end)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: expected a word, its start and its "
                f"end, found {line!r}"
            ) from error
        if not before <= start <= end:
            raise ValueError(
                f"{path}, line {number}: {word} from {start} to {end} s after "
                f"a word that ends at {before} s"
            )
        before = end
        times.append((word, start, end))
    return times


def cut(times, longest):
    """Pieces of a clip no longer than asked for, cut in its pauses.

    A piece that is too long is cut in the longest pause of its middle half
    (of all where there is none), again and again.

    Arguments
    ---------
    times : list of (str, float, float)
        From `read_transcript`.
    longest : float
        Seconds from the first to the last word of a piece; a single word may
        be longer.

    Returns
    -------
    pieces : list of (str, float, float)
        Words, start and end in seconds: a quarter of a second around the
        words, but at most half of the pause to the next piece. Pieces
        without words are left out.

    Example
    -------
    >>> times = [("A", 0.1, 0.9), ("B", 1.0, 2.0), ("C", 2.4, 3.1)]
    >>> cut(times, 2.5)
    [('a b', 0.0, 2.2), ('c', 2.2, 3.35)]
    """
    groups = _split(times, longest)
    pieces = []
    for i, group in enumerate(groups):
        start, end = group[0][1], group[-1][2]
        before = (groups[i - 1][-1][2] + start) / 2 if i else 0.0
        first = max(start - MARGIN, before)
        last = end + MARGIN
        if i + 1 < len(groups):
            last = min(last, (end + groups[i + 1][0][1]) / 2)
        words = plain(" ".join(word for word, _, _ in group))
        if words:
            pieces.append((words, round(first, 3), round(last, 3)))
    return pieces


def _split(times, longest):
    """Groups of words, cut in half until they are short enough."""
    if not times:
        return []
    start, length = times[0][1], times[-1][2] - times[0][1]
    if length <= longest or len(times) == 1:
        return [times]
    pauses = [
        (times[n][1] - times[n - 1][2], (times[n][1] + times[n - 1][2]) / 2, n)
        for n in range(1, len(times))
    ]
    inner = [
        pause for pause in pauses if 0.25 <= (pause[1] - start) / length <= 0.75
    ]
    middle = start + length / 2
    _, _, place = max(
        inner or pauses, key=lambda p: (p[0], -abs(p[1] - middle))
    )
    return _split(times[:place], longest) + _split(times[place:], longest)
