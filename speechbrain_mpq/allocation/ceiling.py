"""How much mixed precision can win over uniform precision, before training.

Rounding n values to b bits does damage of about n s 2^(-2b), where s is the
sensitivity of a value. With the sum of n b held, the least total damage has
the same s 2^(-2b) everywhere: uniform bits lose to it by the arithmetic over
the geometric mean of s, weighted by n. That ratio is the ceiling.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ceiling:
    """What the best bits could win over uniform bits, by a score table.

    Arguments
    ---------
    bits : float
        Average bits.
    am_gm_db : float
        Less damage at best, in dB, with bits of any size and sign.
    limited_db : float
        The same with real-valued bits between the least and the most
        candidate.
    insensitive : int
        Clusters without measurable damage, counted at the least sensitivity
        of the others.

    Example
    -------
    >>> Ceiling(4, 3.25, 3.0, 0).limited_db
    3.0
    """

    bits: float
    am_gm_db: float
    limited_db: float
    insensitive: int


def am_gm(sensitivities, parameters):
    """Arithmetic over geometric mean of the sensitivities of all values.

    Arguments
    ---------
    sensitivities : sequence of float
        One for each cluster, of each of its values; above 0.
    parameters : sequence of int
        Number of values of each cluster.

    Returns
    -------
    ratio : float
        At least 1.

    Example
    -------
    >>> round(am_gm([4.0, 1.0], [10, 10]), 9)  # 2.5 / 2
    1.25
    """
    s, n = np.asarray(sensitivities, float), np.asarray(parameters, float)
    share = n / n.sum()
    return float(share @ s / np.exp(share @ np.log(s)))


def limited_bits(sensitivities, parameters, average_bits, least, most):
    """The best real-valued bits within limits, by reverse water-filling.

    Bits are log2(s / level) / 2 cut to the limits, with the level of noise
    that leaves the wanted average.

    Arguments
    ---------
    sensitivities : sequence of float
        One for each cluster, of each of its values; above 0.
    parameters : sequence of int
        Number of values of each cluster.
    average_bits : float
        Average over all values, within the limits.
    least, most : float
        Limits of the bits.

    Returns
    -------
    bits : numpy.ndarray
        One for each cluster.

    Example
    -------
    >>> limited_bits([16.0, 1.0], [1, 1], average_bits=4, least=2, most=8)
    array([5., 3.])
    >>> limited_bits([16.0, 1.0], [1, 1], average_bits=2.5, least=2, most=8)
    array([3., 2.])
    """
    n = np.asarray(parameters, float)
    ideal = np.log2(np.asarray(sensitivities, float)) / 2
    # Each cluster's bits start to rise at one level and stop at another;
    # between two such levels the average is a straight line.
    levels = np.unique(np.concatenate([least - ideal, most - ideal]))
    averages = [
        n @ np.clip(ideal + level, least, most) / n.sum() for level in levels
    ]
    level = np.interp(average_bits, averages, levels)
    return np.clip(ideal + level, least, most)


def ceiling(table, bits):
    """The most that a plan of so many bits could win over uniform bits.

    Sensitivities are read from the table between the candidate nearest to the
    budget and the most bits, whose score is taken for the floor.

    Arguments
    ---------
    table : ScoreTable
        Scores at two candidates or more.
    bits : float
        Average bits, between the least and the most candidate.

    Returns
    -------
    ceiling : Ceiling

    Example
    -------
    >>> from speechbrain_mpq.allocation.scores import ScoreTable
    >>> table = ScoreTable(  # sensitivities 256 and 1
    ...     {"a": {2: 160, 4: 10, 8: 0}, "b": {2: 0.625, 4: 0.0390625, 8: 0}},
    ...     {"a": {"a.weight": 10}, "b": {"b.weight": 10}},
    ... )
    >>> best = ceiling(table, 4)  # 6 and 2 bits: 128.5 / 16
    >>> round(best.am_gm_db, 2), round(best.limited_db, 2)
    (9.05, 9.05)
    >>> round(ceiling(table, 3).limited_db, 2)  # 4 and 2 bits
    5.77
    """
    least, most = table.candidate_bits[0], table.candidate_bits[-1]
    if least == most:
        raise ValueError("a ceiling needs scores at two candidates or more")
    if not least <= bits <= most:
        raise ValueError(
            f"average bits must lie in {least} to {most}, the candidates of "
            f"the score table, not {bits!r}"
        )
    raw = _sensitivities(table, bits)
    sensitive = raw[raw > 0]
    if not sensitive.size:
        return Ceiling(bits, 0.0, 0.0, len(raw))
    # The least of the others keeps the ratio finite, and on the safe side.
    s = np.where(raw > 0, raw, sensitive.min())
    n = list(table.parameters.values())
    limited = limited_bits(s, n, bits, least, most)
    uniform, best = (
        n @ (s * 4.0**-b) for b in (np.full(len(s), bits), limited)
    )
    return Ceiling(
        bits=bits,
        am_gm_db=10 * math.log10(am_gm(s, n)),
        limited_db=10 * math.log10(uniform / best),
        insensitive=len(raw) - len(sensitive),
    )


def _sensitivities(table, bits):
    """Damage of a value at zero bits, in each cluster; noise can be below 0."""
    *fewer, most = table.candidate_bits
    anchor = min(fewer, key=lambda candidate: abs(candidate - bits))
    step = 4.0**-anchor - 4.0**-most
    return np.array(
        [
            (row[anchor] - row[most]) / (table.parameters[cluster] * step)
            for cluster, row in table.scores.items()
        ]
    )
