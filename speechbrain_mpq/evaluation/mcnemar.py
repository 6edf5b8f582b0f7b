"""McNemar's test: do two classifiers differ on the same items?"""

from math import comb
from typing import NamedTuple

SIGNIFICANCE_LEVEL = 0.05


class McNemarResult(NamedTuple):
    """Items that only one classifier has right, and the exact p."""

    only_first: int
    only_second: int
    p: float

    @property
    def significant(self):
        """Whether the classifiers differ at the 0.05 level."""
        return self.p < SIGNIFICANCE_LEVEL


def mcnemar(first, second):
    """Exact two-sided test on the items where two classifiers disagree.

    Were both equally good, either would be the right one in half of these
    (McNemar 1947, 10.1007/BF02295996): p is that of the binomial distribution.

    Arguments
    ---------
    first, second : iterable of bool
        Which items each classifier has right, in the same order.

    Returns
    -------
    McNemarResult

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
