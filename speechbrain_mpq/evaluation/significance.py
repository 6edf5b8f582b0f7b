"""Test whether two systems differ, on the same items.

Word errors are tested by matched pairs of segments (MAPSSWE): errors are
counted in segments that lie between words both systems have right, so that the
segments can be taken as independent; the mean difference is then tested
against zero. Segments and test are those of NIST's SCTK (sclite and sc_stats).
Alignments are those of least cost under sclite's weights, which can hold more
errors than the least number that word error rates count; which of several with
equal cost is taken, `wer.align` says.

Classifiers are compared by McNemar's test, predicted scores by bootstrap of
their correlations.
"""

import math
from functools import lru_cache
from math import comb
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

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
    spans, good = [], min_good
    for word, (here_1, here_2) in enumerate(zip(errors_1, errors_2)):
        inserted = here_1[0] + here_2[0]
        wrong = here_1[1] + here_2[1]
        if inserted or wrong:
            if good >= min_good:
                start = max(0, word - min_good)
                spans.append(Segment(start, words, 0, 0))
            last = spans[-1]
            spans[-1] = last._replace(
                stop=words,
                errors_1=last.errors_1 + sum(here_1),
                errors_2=last.errors_2 + sum(here_2),
            )
            # A right word behind an insertion is the first good one.
            good = 0 if wrong else 1
        else:
            good += 1
        if good == min_good and spans:
            spans[-1] = spans[-1]._replace(stop=min(word + 1, words))
    return spans


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
    return MapssweResult(*paired_z_test(differences))


def paired_z_test(differences):
    """Test whether the mean of paired differences is zero, two-tailed.

    Arguments
    ---------
    differences : list of float

    Returns
    -------
    tuple
        (z, p, number, mean, standard deviation); z is 0 where the differences
        do not vary or there are fewer than two.

    Example
    -------
    >>> z, p, *_ = paired_z_test([1.0, 2.0, 3.0])
    >>> round(z, 4), round(p, 5)
    (3.4641, 0.00053)
    """
    n = len(differences)
    mean = fmean(differences) if n else 0.0
    std = stdev(differences) if n > 1 else 0.0
    z = mean / (std / math.sqrt(n)) if std else 0.0
    return z, math.erfc(abs(z) / math.sqrt(2)), n, mean, std


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


class McNemarResult(NamedTuple):
    """Items that only one classifier has right, and the exact p."""

    only_first: int
    only_second: int
    p: float

    @property
    def significant(self):
        """Whether the classifiers differ at the 0.05 level."""
        return self.p < SIGNIFICANCE_LEVEL


def mcnemar(first, second) -> McNemarResult:
    """Exact two-sided test on the items where two classifiers disagree.

    Were both equally good, either would be the right one in half of these
    (McNemar 1947, 10.1007/BF02295996): p is that of the binomial distribution.

    Arguments
    ---------
    first, second : iterable of bool
        Which items each classifier has right, in the same order.

    Example
    -------
    >>> mcnemar([True] * 8, [True, True] + [False] * 6)
    McNemarResult(only_first=6, only_second=0, p=0.03125)
    >>> mcnemar([True, False], [True, False]).p
    1.0
    """
    pairs = [(bool(a), bool(b)) for a, b in zip(first, second, strict=True)]
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    count, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(comb(count, k) for k in range(fewer + 1)) / 2**count
    return McNemarResult(only_first, only_second, min(1.0, 2 * tail))


def paired_difference(first, second):
    """Difference of two classifiers' accuracies on the same items.

    The interval is the adjusted Wald interval for paired shares (Bonett and
    Price 2012, 10.3102/1076998611411915), which holds its level where few
    items differ.

    Arguments
    ---------
    first, second : iterable of bool
        Which items each classifier has right, in the same order.

    Returns
    -------
    difference : float
        First minus second, as a share.
    low, high : float
        Ends of the 95 % interval.

    Example
    -------
    >>> first = [True] * 90 + [False] * 10
    >>> second = [True] * 80 + [False] * 20
    >>> [round(value, 3) for value in paired_difference(first, second)]
    [0.1, 0.034, 0.162]
    """
    first, second = list(first), list(second)
    if not first:
        raise ValueError("no items: nothing to compare")
    result, items = mcnemar(first, second), len(first)
    total = items + 2
    more, fewer = (count + 1 for count in result[:2])
    more, fewer = more / total, fewer / total
    middle = more - fewer
    width = 1.959964 * math.sqrt((more + fewer - middle**2) / total)
    difference = (result.only_first - result.only_second) / items
    return difference, middle - width, middle + width


def pcc(predictions, labels):
    """Pearson's correlation.

    Arguments
    ---------
    predictions, labels : array_like
        [items].

    Returns
    -------
    float
        NaN where either is constant.

    Example
    -------
    >>> pcc([1, 2, 3], [2, 4, 6]), pcc([1, 1, 1], [2, 4, 6])
    (1.0, nan)
    """
    x, y = _checked(predictions, labels)
    x, y = x - x.mean(), y - y.mean()
    energy = np.sqrt((x @ x) * (y @ y))
    return round(float(x @ y / energy), 12) if energy > 0 else float("nan")


def srcc(predictions, labels) -> float:
    """Spearman's rank correlation.

    Arguments
    ---------
    predictions, labels : array_like
        [items].

    Example
    -------
    >>> srcc([1, 10, 100], [2, 4, 6])
    1.0
    """
    x, y = _checked(predictions, labels)
    return pcc(rankdata(x), rankdata(y))


def mse(predictions, labels) -> float:
    """Mean squared error.

    Arguments
    ---------
    predictions, labels : array_like
        [items].

    Example
    -------
    >>> mse([1, 2], [1, 4])
    2.0
    """
    x, y = _checked(predictions, labels)
    return float(np.mean((x - y) ** 2))


def paired_bootstrap(
    first, second, labels, measure=pcc, draws=2000, seed=1234, level=0.95
):
    """Interval of the difference between two predictors of the same items.

    Items are drawn with replacement, the same ones for both.

    Arguments
    ---------
    first, second : array_like
        [items], or [seeds, items]: then means over the seeds are compared.
    labels : array_like
        [items].
    measure : callable
        Takes (predictions, labels).
    draws : int
    seed : int
    level : float
        Share of the draws inside the interval.

    Returns
    -------
    difference : float
        Of all items, second minus first.
    low, high : float
        No difference is likely where zero lies between them.

    Example
    -------
    >>> labels = np.arange(50.0)
    >>> good, bad = labels + np.sin(labels), labels + 40 * np.sin(labels)
    >>> difference, low, high = paired_bootstrap(good, bad, labels)
    >>> low < difference < high < 0
    True
    """
    pair = [
        [_checked(row, labels)[0] for row in np.atleast_2d(x)]
        for x in (first, second)
    ]
    labels = np.asarray(labels, dtype=np.float64)

    def difference(items):
        one, other = (
            fmean(measure(row[items], labels[items]) for row in rows)
            for rows in pair
        )
        return other - one

    rng = np.random.default_rng(seed)
    size = len(labels)
    drawn = [difference(rng.integers(size, size=size)) for _ in range(draws)]
    tail = (1 - level) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return difference(np.arange(size)), float(low), float(high)


def _checked(predictions, labels):
    """Both as float64 [items]."""
    x = np.asarray(predictions, dtype=np.float64)
    y = np.asarray(labels, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or not len(x):
        raise ValueError(
            f"predictions {x.shape} and labels {y.shape} must be [items]"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("predictions or labels hold NaN or infinity")
    return x, y
