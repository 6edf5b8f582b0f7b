"""Test word errors for significance: matched pairs of segments (MAPSSWE).

Two systems are compared on the same utterances. Errors are counted in
segments that lie between words both have right, so that the segments can be
taken as independent; the mean difference is then tested against zero.

Segments and test are those of NIST's SCTK (sclite and sc_stats). Alignments
are those of least cost under sclite's weights, which can hold more errors than
the least number that word error rates count; which of several with equal cost
is taken, `wer.align` says.
"""

import math
from functools import lru_cache
from statistics import fmean, stdev
from typing import NamedTuple

from .wer import CORRECT, INSERTION, align

SCLITE_WEIGHTS = (4, 3, 3)  # substitution, deletion, insertion
SIGNIFICANCE_LEVEL = 0.05


class Segment(NamedTuple):
    """Span of reference words [start, stop) with both systems' errors."""

    start: int
    stop: int
    errors_1: int
    errors_2: int


class MapssweResult(NamedTuple):
    """Outcome of the test; z > 0 says that system 2 makes fewer errors."""

    z: float
    p: float
    segments: int
    mean: float
    std: float

    @property
    def significant(self):
        """Whether the systems differ at the 0.05 level."""
        return self.p < SIGNIFICANCE_LEVEL


def segments(reference, hypothesis_1, hypothesis_2, min_good=2):
    """Find the segments of one utterance with errors of either system.

    A segment begins with up to `min_good` words before the first error that
    both systems have right, and ends when `min_good` such words follow in a
    row. Neighbours may share these words. An insertion is an error before the
    word that follows it.

    Arguments
    ---------
    reference, hypothesis_1, hypothesis_2 : str | list[str]
        Words said, and recognised by either system.

    Returns
    -------
    list[Segment]
        Segments in order; none where both systems are right.
    """
    if min_good < 1:
        raise ValueError(f"min_good is {min_good}: it must be at least 1")
    reference = _words(reference)
    errors_1 = _errors_by_word(reference, _words(hypothesis_1))
    errors_2 = _errors_by_word(reference, _words(hypothesis_2))
    words = len(errors_1) - 1
    found, good = [], min_good
    for word, (here_1, here_2) in enumerate(zip(errors_1, errors_2)):
        inserted = here_1[0] + here_2[0]
        wrong = here_1[1] + here_2[1]
        if inserted or wrong:
            if good >= min_good:
                start = max(0, word - min_good)
                found.append(Segment(start, words, 0, 0))
            last = found[-1]
            found[-1] = last._replace(
                stop=words,
                errors_1=last.errors_1 + sum(here_1),
                errors_2=last.errors_2 + sum(here_2),
            )
            # A right word behind an insertion is the first good one.
            good = 0 if wrong else 1
        else:
            good += 1
        if good == min_good and found:
            found[-1] = found[-1]._replace(stop=min(word + 1, words))
    return found


def mapsswe(pairs, min_good=2):
    """Test whether two systems differ in word errors, two-tailed.

    As in SCTK, z is 0 where the differences do not vary or there are fewer
    than two segments.

    Arguments
    ---------
    pairs : iterable[tuple]
        (reference, hypothesis of system 1, hypothesis of system 2), each a
        string or a list of words.
    """
    differences = [
        segment.errors_1 - segment.errors_2
        for pair in pairs
        for segment in segments(*pair, min_good)
    ]
    n = len(differences)
    mean = fmean(differences) if n else 0.0
    std = stdev(differences) if n > 1 else 0.0
    z = mean / (std / math.sqrt(n)) if std else 0.0
    return MapssweResult(z, math.erfc(abs(z) / math.sqrt(2)), n, mean, std)


def _words(text):
    """Words of a string or a list, hashable."""
    return tuple(text.split() if isinstance(text, str) else text)


@lru_cache(maxsize=2**16)  # a table tests one system against several
def _errors_by_word(reference, hypothesis):
    """(insertions before, errors at) every reference word, and at the end."""
    errors, inserted = [], 0
    for edit in align(reference, hypothesis, SCLITE_WEIGHTS):
        if edit.kind == INSERTION:
            inserted += 1
        else:
            errors.append((inserted, int(edit.kind != CORRECT)))
            inserted = 0
    return (*errors, (inserted, 0))
