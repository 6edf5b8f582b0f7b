"""The values of all clusters of a network at some bits."""

from ..quantization.plan import BitPlan
from ..quantization.tables import check_bits
from ..quantization.tensors import near_misses
from .weights import quantized_values


def bits_of_clusters(plan_or_bits, members, codebook="midtread"):
    """Bits of those clusters of a network that have any.

    Arguments
    ---------
    plan_or_bits : BitPlan or int or None
        A plan may leave clusters out; None: it leaves all out.
    members : iterable of str
        Names of the network's clusters.
    codebook : str
        Kind of quantization table that a plan must be of.

    Returns
    -------
    bits : dict of str -> int

    Example
    -------
    >>> bits_of_clusters(4, ["conv", "norm"])
    {'conv': 4, 'norm': 4}
    """
    if plan_or_bits is None:
        return {}
    if not isinstance(plan_or_bits, BitPlan):
        return dict.fromkeys(members, check_bits(plan_or_bits))
    plan = plan_or_bits
    if plan.codebook != codebook:
        raise ValueError(
            f"the plan is of {plan.codebook} tables, the scores are of "
            f"{codebook}: give both the same codebook"
        )
    unknown = sorted(set(plan.clusters) - set(members))
    if unknown:
        raise ValueError(
            f"the plan's cluster {unknown[0]!r} is none of the network's "
            f"{len(members)}{near_misses(unknown[0], members)}"
        )
    return {name: entry.bits for name, entry in plan.clusters.items()}


def values_of_clusters(
    root, members, candidates, given, granularity, codebook, rows
):
    """Values of all tensors at all candidates and at the given bits.

    Fitting the scales is slow and needs no data: once, not once a chunk.

    Arguments
    ---------
    root : torch.nn.Module
        Full-precision network under its prefix, left as it was found.
    members : dict of str -> list of str
        Cluster name -> names of its parameters.
    candidates : sequence of int
        Bits of every cluster.
    given : dict of str -> int
        Bits that some clusters are needed at besides.
    granularity, codebook, rows : str, str, int or None
        See `quantized_values`.

    Returns
    -------
    values : dict
        values[cluster][bits][name of a tensor]
    """
    return {
        cluster: {
            bits: quantized_values(
                root, cluster, names, bits, granularity, codebook, rows
            )
            for bits in dict.fromkeys((*candidates, given.get(cluster)))
            if bits is not None
        }
        for cluster, names in members.items()
    }


def chosen_values(values, bits):
    """The values of all tensors at their cluster's bits.

    Arguments
    ---------
    values : dict
        values[cluster][bits][name of a tensor]
    bits : dict of str -> int
        Cluster -> bits.

    Returns
    -------
    chosen : dict
        chosen[name of a tensor]

    Example
    -------
    >>> chosen_values({"conv": {2: {"conv.weight": 0.5}}}, {"conv": 2})
    {'conv.weight': 0.5}
    """
    chosen = {}
    for cluster, width in bits.items():
        chosen |= values[cluster][width]
    return chosen
