"""Settings that cannot work, refused before any work."""

from ..quantization.tables import check_bits


def check_average_bits(bits):
    """Raise ValueError unless a budget can be meant.

    Arguments
    ---------
    bits : float
        1 to 16, or 32 for full precision.

    Example
    -------
    >>> check_average_bits(2.5)
    """
    if isinstance(bits, bool) or not 1 <= bits <= 16 and bits != 32:
        raise ValueError(
            f"bits must lie in 1 to 16, or be 32 for full precision, not "
            f"{bits!r}: change --bits"
        )


def check_reachable(bits, candidates, min_bits):
    """Raise ValueError unless some plan has these bits on average.

    Arguments
    ---------
    bits : float
        Average that is asked for.
    candidates : sequence of int or None
        Bits that a cluster may have, ascending; None: all get the same.
    min_bits : int
        Of any cluster.

    Example
    -------
    >>> check_reachable(2.5, candidates=[2, 4], min_bits=2)
    """
    if candidates is None:
        check_bits(bits)  # a whole number of them
        return
    least, most = max(candidates[0], min_bits), candidates[-1]
    if bits < least:
        raise ValueError(
            f"{bits} bits on average cannot be reached with at least {least} "
            "in each cluster: raise --bits, or lower candidate_bits and "
            "--min_bits"
        )
    if bits > most:
        raise ValueError(
            f"{bits} bits on average cannot be reached with at most {most} "
            "in each cluster: lower --bits, or give scores more "
            "candidate_bits"
        )


def check_methods(hparams):
    """Raise ValueError where methods exclude or miss each other.

    Arguments
    ---------
    hparams : object
        Those of a `QuantizationBrain`.
    """
    if hparams.one_stage and hparams.scores:
        raise ValueError(
            "one_stage decides on the bits itself: set scores to null"
        )
    if hparams.round_calibrated and (hparams.admm or hparams.one_stage):
        raise ValueError(
            "calibrated rounding is for a plan that stays, and for "
            "estimators that begin at rounded weights: set "
            "round_calibrated to False"
        )
    if hparams.admm and hparams.rows:
        raise ValueError("ADMM takes whole layers: set rows to null")
    for key in ("granularity", "codebook", "rows"):
        asked = getattr(hparams, key)
        scored = getattr(hparams.scores, key, asked)
        if scored != asked:
            raise ValueError(
                f"scores have {key} {scored!r}, the model {asked!r}: "
                "give both the same"
            )
