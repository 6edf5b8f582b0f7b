"""Predicted against measured: do the damages of the clusters add up?

A score table is made with one cluster quantized at a time; a plan's predicted
score is the sum over its clusters. What the plan does when all of them are
quantized together can be measured in the same unit.
"""

import math

import numpy as np

from ..quantization.plan import BitPlan, ClusterBits


def uniform_plan(table, bits):
    """The plan that gives every cluster of a score table the same bits.

    Arguments
    ---------
    table : ScoreTable
        Names and sizes of the clusters.
    bits : int
        Bits for all, whether or not they were scored.

    Returns
    -------
    plan : BitPlan

    Example
    -------
    >>> from speechbrain_mpq.allocation.scores import ScoreTable
    >>> table = ScoreTable({"a": {2: 3.0}}, {"a": {"a.weight": 8}})
    >>> uniform_plan(table, 3).bytes
    7
    """
    return BitPlan(
        {
            cluster: ClusterBits(
                bits, sum(row.values()), tuple(row), table.scales[cluster]
            )
            for cluster, row in table.tensors.items()
        },
        table.rest_parameters,
        table.codebook,
    )


def predicted_score(table, plan):
    """The score of a whole plan, if the damages of its clusters add up.

    Arguments
    ---------
    table : ScoreTable
        Scores. Where they were taken given other bits (see `OutputScores`),
        what each cluster adds is the difference from the given score.
    plan : BitPlan
        Bits of all clusters, each among the table's candidates.

    Returns
    -------
    score : float

    Example
    -------
    >>> from speechbrain_mpq.allocation.scores import ScoreTable
    >>> scores = {"a": {2: 3.0, 4: 1.0}, "b": {2: 5.0, 4: 2.0}}
    >>> tensors = {"a": {"a.weight": 8}, "b": {"b.weight": 8}}
    >>> table = ScoreTable(scores, tensors)
    >>> predicted_score(table, uniform_plan(table, 4))
    3.0
    >>> table = ScoreTable(scores, tensors, details={"given_score": 2.5})
    >>> predicted_score(table, uniform_plan(table, 4))  # 2.5 - 1.5 - 0.5
    0.5
    """
    if set(plan.clusters) != set(table.scores):
        odd = sorted(set(plan.clusters) ^ set(table.scores))
        raise ValueError(
            f"clusters of the plan or of the score table only: {odd[:3]}; "
            "give a plan for the network that was scored"
        )
    given = table.details.get("given_score", 0.0)
    unknown = {c.bits for c in plan.clusters.values()} - set(
        table.candidate_bits
    )
    if unknown:
        raise ValueError(
            f"the plan has {sorted(unknown)} bits, which were not scored, only "
            f"{list(table.candidate_bits)}; score again with them"
        )
    return given + sum(
        table.scores[name][cluster.bits] - given
        for name, cluster in plan.clusters.items()
    )


def planned_gain_db(table, plan):
    """How far a plan stays below uniform bits, by the table's own scores.

    The uniform plan has the average bits of the plan. Between two candidates
    the logarithm of its score is interpolated: a bit is worth a factor.

    Arguments
    ---------
    table : ScoreTable
        Scores.
    plan : BitPlan
        Bits of all clusters, each among the table's candidates.

    Returns
    -------
    gain : float or None
        In dB; None where a predicted score is not above 0, as can happen with
        signed scores and with those given other bits.

    Example
    -------
    >>> from speechbrain_mpq.allocation.scores import ScoreTable
    >>> table = ScoreTable(
    ...     {"a": {2: 16.0, 4: 4.0, 6: 1.0}, "b": {2: 4.0, 4: 1.0, 6: 0.25}},
    ...     {"a": {"a.weight": 8}, "b": {"b.weight": 8}},
    ... )
    >>> mixed = uniform_plan(table, 2).clusters | {
    ...     "a": uniform_plan(table, 6).clusters["a"]
    ... }
    >>> plan = BitPlan(mixed)  # 1 + 4, uniform 4 bits: 4 + 1
    >>> planned_gain_db(table, plan)
    0.0
    """
    candidates = table.candidate_bits
    uniform = [
        predicted_score(table, uniform_plan(table, b)) for b in candidates
    ]
    planned = predicted_score(table, plan)
    if planned <= 0 or min(uniform) <= 0:
        return None
    reference = np.interp(plan.average_bits, candidates, np.log10(uniform))
    return float(10 * (reference - math.log10(planned)))


def predicted_and_measured(
    scorer,
    network,
    *calibration,
    table,
    plans,
    include=("*",),
    exclude=(),
    prefix="mask_net",
):
    """Compares what a score table says of plans with what they do.

    Arguments
    ---------
    scorer : OutputScores
        Measures, on the calibration values, in the unit of the table.
    network : torch.nn.Module
        Full-precision network, left as it was found.
    *calibration : object
        The values that the scorer's `needs` names, in that order.
    table : ScoreTable
        Made by the same kind of scorer.
    plans : dict of str -> BitPlan
        Any name -> bits of all clusters.
    include, exclude : sequence of str
        Patterns on parameter names with their prefix.
    prefix : str
        Name of the network in its model.

    Returns
    -------
    rows : list of dict
        Keys plan, average_bits, bytes, predicted (None where a plan has bits
        that were not scored) and measured.

    Example
    -------
    >>> import torch
    >>> from speechbrain_mpq.allocation.mask_error import MaskErrorScores
    >>> network = torch.nn.Sequential(torch.nn.Conv1d(1, 2, 1, bias=False))
    >>> _ = network[0].weight.data.copy_(torch.tensor([[[1.0]], [[3.0]]]))
    >>> scorer, data = MaskErrorScores((2, 3)), [torch.ones(1, 1, 5)] * 2
    >>> table = scorer(network, *data, progress=False)
    >>> plans = {"uniform 2": uniform_plan(table, 2)}
    >>> rows = predicted_and_measured(
    ...     scorer, network, *data, table=table, plans=plans
    ... )
    >>> rows[0]["predicted"], rows[0]["measured"]
    (0.1, 0.1)
    """
    if table.method != scorer.method:
        raise ValueError(
            f"the table was scored by {table.method!r}, the plans would be "
            f"measured by {scorer.method!r}: give a scorer of the same kind"
        )
    scored = set(table.candidate_bits)
    rows = []
    for name, plan in plans.items():
        known = all(c.bits in scored for c in plan.clusters.values())
        measured = scorer.measure(
            network,
            plan,
            *calibration,
            include=include,
            exclude=exclude,
            prefix=prefix,
        )
        rows.append(
            {
                "plan": name,
                "average_bits": plan.average_bits,
                "bytes": plan.bytes,
                "predicted": predicted_score(table, plan) if known else None,
                "measured": measured,
            }
        )
    return rows
