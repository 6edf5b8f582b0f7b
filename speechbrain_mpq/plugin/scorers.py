"""Scores by the names that a user types."""

import copy

from ..allocation.controls import SizeScores, WeightErrorScores
from ..allocation.hessian import HessianScores
from ..allocation.kl import KLScores
from ..allocation.loss import LossScores

CANDIDATES = (2, 3, 4, 6, 8, 16)
PROBES = 4  # of each batch, for the Hessian
SCORES = ("kl", "hessian", "loss", "weight_error", "size", "uniform")


def check_scores(scores):
    """Refuses names that are no scores.

    Arguments
    ---------
    scores : str or object
        One of `SCORES`, or an object such as `KLScores`.

    Example
    -------
    >>> check_scores("kl")
    >>> check_scores("lk")
    Traceback (most recent call last):
    ...
    ValueError: scores must be one of ('kl', ...) or an object such as ...
    """
    if isinstance(scores, str) and scores not in SCORES:
        raise ValueError(
            f"scores must be one of {SCORES} or an object such as KLScores(), "
            f"not {scores!r}"
        )


def scorer_for(scores, quantizer, candidate_bits=CANDIDATES):
    """An object that scores, with the quantizer's tables.

    Arguments
    ---------
    scores : str or object
        One of `SCORES`, or an object such as `KLScores`; that is copied.
    quantizer : Quantizer
        Whose tables are to be scored.
    candidate_bits : sequence of int
        Bits to try, where scores are named.

    Returns
    -------
    scorer : object or None
        None for uniform bits.

    Example
    -------
    >>> import torch
    >>> from speechbrain_mpq import Quantizer
    >>> quantizer = Quantizer([torch.nn.PReLU()], codebook="midrise")
    >>> scorer_for("kl", quantizer).codebook
    'midrise'
    """
    check_scores(scores)
    table = {**quantizer.table, "codebook": quantizer.codebook}
    if scores == "uniform":
        return None
    if scores == "hessian":
        scorer = HessianScores(
            candidate_bits,
            probes=PROBES,
            distribution="rademacher",
            granularity=table["granularity"],
            differences=True,
        )
    elif isinstance(scores, str):
        kinds = {
            "kl": KLScores,
            "loss": LossScores,
            "weight_error": WeightErrorScores,
            "size": SizeScores,
        }
        scorer = kinds[scores](candidate_bits, **table)
    else:
        scorer = copy.deepcopy(scores)
    _check_tables(scorer, table)
    return scorer


def check_needs(scorer):
    """Refuses scores that need more than a Brain can give.

    Arguments
    ---------
    scorer : object or None
        As from `scorer_for`.

    Example
    -------
    >>> check_needs(KLScores())
    """
    if scorer is None:
        return
    unknown = sorted(set(scorer.needs) - {"inputs", "loss"})
    if unknown:
        raise ValueError(
            f"{type(scorer).__name__} needs {unknown}, which no Brain can "
            f"give it: use one of {SCORES}"
        )


def _check_tables(scorer, table):
    """Scores must be of the tables that the model gets."""
    defaults = {"granularity": "tensor", "codebook": "midtread", "rows": None}
    base = getattr(scorer, "base", scorer)
    for key, asked in table.items():
        scored = getattr(base, key, defaults[key])
        if scored != asked:
            raise ValueError(
                f"{type(base).__name__} scores {key} {scored!r}, the quantizer "
                f"has {asked!r}: give both the same, or choose other scores"
            )
