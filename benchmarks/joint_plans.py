"""The bit plans that joint_budget.py compares."""

from dataclasses import replace

from speechbrain_mpq.allocation.scores import ScoreTable
from speechbrain_mpq.allocation.solver import allocate_bits
from speechbrain_mpq.quantization.plan import BitPlan

CODEBOOK = "midrise"
WEIGHTS = (1, 2, 4, 8, 16)  # of the recognizer's scores


def part_of(table, names):
    """The rows of some stages of a score table, as a table of their own.

    Arguments
    ---------
    table : ScoreTable
    names : set of str
        First parts of cluster names.

    Returns
    -------
    part : ScoreTable
    """
    chosen = [c for c in table.scores if _stage(c) in names]
    return ScoreTable(
        scores={c: table.scores[c] for c in chosen},
        tensors={c: table.tensors[c] for c in chosen},
        scales={c: table.scales[c] for c in chosen},
        method=table.method,
        codebook=table.codebook,
    )


def plans_of(tables, stages, bits):
    """The plans that are compared, all within the same bytes.

    Arguments
    ---------
    tables : dict
        "end": score table of the chain; "own": that of the mask network.
    stages : sequence of str
        Stages of the separator.
    bits : float
        Average bits.

    Returns
    -------
    plans : dict
        Name -> BitPlan; "uniform" only at whole bits.
    """
    end, stages = tables["end"], set(stages)
    others = {_stage(c) for c in end.scores} - stages
    recognizer = allocate_bits(part_of(end, others), average_bits=bits)
    plans = {}
    for name in ("own", "end"):
        half = allocate_bits(part_of(tables[name], stages), average_bits=bits)
        both = half.clusters | recognizer.clusters
        plans[name] = BitPlan(both, end.rest_parameters, CODEBOOK)
    plans["joint"] = allocate_bits(end, average_bits=bits)
    if bits == int(bits):
        same = BitPlan.uniform(
            plans["joint"].clusters, int(bits), end.rest_parameters, CODEBOOK
        )
        plans = {"uniform": same, **plans}
    return plans


def weighed_plan(end, stages, bits, measure, weights=WEIGHTS):
    """The joint plan whose divergence is least when it is measured.

    Damages do not add up in the same way in both models: measured together,
    those of a separator's clusters come to less than their sum, those of a
    recognizer's to more. So the recognizer's scores get a weight, and the
    weight is chosen by measuring whole plans.

    Arguments
    ---------
    end : ScoreTable
        Of the chain.
    stages : sequence of str
        Stages of the separator.
    bits : float
        Average bits.
    measure : callable
        Maps a plan to its divergence.
    weights : sequence of float

    Returns
    -------
    plan : BitPlan
    weight : float

    Example
    -------
    >>> rows = {"mask": {2: 1.0, 4: 0.0}, "words": {2: 0.9, 4: 0.0}}
    >>> sizes = {"mask": {"mask.w": 80}, "words": {"words.w": 80}}
    >>> table = ScoreTable(rows, sizes, codebook="midrise")
    >>> measure = lambda plan: 4 - plan.clusters["words"].bits
    >>> plan, weight = weighed_plan(table, ["mask"], 3, measure)
    >>> weight, plan.clusters["mask"].bits, plan.clusters["words"].bits
    (2, 2, 4)
    """
    plans = {}
    for weight in weights:
        scores = {
            cluster: {
                width: score if _stage(cluster) in stages else weight * score
                for width, score in row.items()
            }
            for cluster, row in end.scores.items()
        }
        weighed = replace(end, scores=scores)
        plans[weight] = allocate_bits(weighed, average_bits=bits)
    best = min(plans, key=lambda weight: measure(plans[weight]))
    return plans[best], best


def shares(plan, stages):
    """Average bits and bytes of each model in a plan.

    Arguments
    ---------
    plan : BitPlan
    stages : sequence of str
        Stages of the separator.

    Returns
    -------
    shares : dict
        "separator_bits", "recognizer_bits", "bytes".
    """
    halves = {"separator": {}, "recognizer": {}}
    for name, cluster in plan.clusters.items():
        mine = _stage(name) in stages
        halves["separator" if mine else "recognizer"][name] = cluster
    averages = {
        f"{model}_bits": BitPlan(clusters).average_bits
        for model, clusters in halves.items()
    }
    return averages | {"bytes": plan.bytes}


def _stage(cluster):
    """Stage of the chain that a cluster is in."""
    return cluster.split(".")[0]
