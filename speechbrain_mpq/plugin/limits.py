"""What no plan can keep to, told before the bits are chosen."""

from ..allocation.controls import RandomScores
from ..allocation.solver import allocate_bits
from .quantizer_options import check_uniform_bits


def check_limits(quantizer, scorer, limits):
    """Refuses limits that no plan can keep, before any scoring.

    Arguments
    ---------
    quantizer : Quantizer
        Its modules are in full precision.
    scorer : object or None
        As from `scorer_for`; None: uniform bits.
    limits : dict
        Those of `allocate_bits`.

    Example
    -------
    >>> import torch
    >>> from speechbrain_mpq import KLScores, Quantizer
    >>> quantizer = Quantizer([torch.nn.Linear(8, 8)], bits=None)
    >>> check_limits(quantizer, KLScores((2, 4)), {"average_bits": 8})
    Traceback (most recent call last):
    ...
    ValueError: a budget of 80 bytes is out of reach: with 2 to 4 bits this ...
    """
    if scorer is None:
        if "average_bits" not in limits:
            raise ValueError(
                "uniform bits need a budget in bits, such as 4: or use "
                'scores="kl"'
            )
        check_uniform_bits(limits["average_bits"])
        return
    candidates = getattr(getattr(scorer, "base", scorer), "candidate_bits", ())
    if candidates:
        # Any scores will do: whether there is a plan depends on sizes only.
        table = {**quantizer.table, "codebook": quantizer.codebook}
        scores = RandomScores(candidates, **table)
        scored = scores(quantizer.model, **quantizer.patterns, prefix="")
        allocate_bits(scored, **limits)
