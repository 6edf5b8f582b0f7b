"""What a score table says before any training.

How much mixed precision can win over uniform precision at all, the predicted
harm of every budget, and whether the harm of clusters adds up: three files for
the report (ceiling.json, pareto.json, additivity.json).

Rounding n values to b bits does harm of about n s 2^(-2b), where s is the
sensitivity of a value. With the sum of n b held, the least total harm has the
same s 2^(-2b) everywhere: uniform bits lose to it by the arithmetic over the
geometric mean of s, weighted by n. That ratio, the coding gain, is the most
that a plan can win.

A score table is made with one cluster quantized at a time; a plan's predicted
score is the sum over its clusters. What the plan does when all of them are
quantized together can be measured in the same unit.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.logger import get_logger

from ..quantization.plan import BitPlan, ClusterBits
from ..utils import write_json
from .solver import allocate_bits


@dataclass(frozen=True)
class CodingGain:
    """What the best bits could win over uniform bits, by a score table."""

    bits: float  # average
    am_gm_db: float  # less harm at best, with bits of any size and sign
    limited_db: float  # the same between the least and the most candidate
    insensitive: int  # clusters without measurable harm, taken as the least


def am_gm(sensitivities, parameters):
    """Arithmetic over geometric mean of the sensitivities of all values."""
    s, n = np.asarray(sensitivities, float), np.asarray(parameters, float)
    share = n / n.sum()
    return float(share @ s / np.exp(share @ np.log(s)))


def limited_bits(sensitivities, parameters, average_bits, least, most):
    """The best real-valued bits within limits, by reverse water-filling.

    Bits are log2(s / level) / 2 cut to the limits, with the level of noise
    that leaves the wanted average.
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


def coding_gain(table, bits) -> CodingGain:
    """The most that a plan of so many bits could win over uniform bits.

    Sensitivities are read from the table between the candidate nearest to the
    budget and the most bits, whose score is taken for the floor.

    Arguments
    ---------
    table : ScoreTable
        Scores at two candidates or more.
    bits : float
        Average bits, between the least and the most candidate.

    Example
    -------
    >>> from speechbrain_mpq.allocation.scores import ScoreTable
    >>> table = ScoreTable(  # sensitivities 256 and 1
    ...     {"a": {2: 160, 4: 10, 8: 0}, "b": {2: 0.625, 4: 0.0390625, 8: 0}},
    ...     {"a": {"a.weight": 10}, "b": {"b.weight": 10}},
    ... )
    >>> best = coding_gain(table, 4)  # 6 and 2 bits: 128.5 / 16
    >>> round(best.am_gm_db, 2), round(best.limited_db, 2)
    (9.05, 9.05)
    >>> round(coding_gain(table, 3).limited_db, 2)  # 4 and 2 bits
    5.77
    """
    least, most = table.candidate_bits[0], table.candidate_bits[-1]
    if least == most:
        raise ValueError("a coding gain needs scores at two candidates or more")
    if not least <= bits <= most:
        raise ValueError(
            f"average bits must lie in {least} to {most}, the candidates of "
            f"the score table, not {bits!r}"
        )
    raw = _sensitivities(table, bits)
    sensitive = raw[raw > 0]
    if not sensitive.size:
        return CodingGain(bits, 0.0, 0.0, len(raw))
    # The least of the others keeps the ratio finite, and on the safe side.
    s = np.where(raw > 0, raw, sensitive.min())
    n = list(table.parameters.values())
    limited = limited_bits(s, n, bits, least, most)
    uniform, best = (
        n @ (s * 4.0**-b) for b in (np.full(len(s), bits), limited)
    )
    return CodingGain(
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


def uniform_plan(table, bits):
    """The plan that gives every cluster of a score table the same bits."""
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
    """The score of a whole plan, if the harm of its clusters adds up."""
    if set(plan.clusters) != set(table.scores):
        odd = sorted(set(plan.clusters) ^ set(table.scores))
        raise ValueError(
            f"clusters of the plan or of the score table only: {odd[:3]}; "
            "give a plan for the network that was scored"
        )
    base = table.details.get("given_score", 0.0)
    unknown = {c.bits for c in plan.clusters.values()} - set(
        table.candidate_bits
    )
    if unknown:
        raise ValueError(
            f"the plan has {sorted(unknown)} bits, which were not scored, only "
            f"{list(table.candidate_bits)}; score again with them"
        )
    return base + sum(
        table.scores[name][cluster.bits] - base
        for name, cluster in plan.clusters.items()
    )


def planned_gain_db(table, plan):
    """How far a plan stays below uniform bits, by the table's own scores.

    The uniform plan has the average bits of the plan. Between two candidates
    the logarithm of its score is interpolated: a bit is worth a factor.

    Returns
    -------
    gain : float or None
        In dB; None where a predicted score is not above 0, as can happen with
        signed scores and with those given other bits.
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
    prefix="",
):
    """Compares what a score table says of plans with what they do."""
    if table.method != scorer.method:
        raise ValueError(
            f"the table was scored by {table.method!r}, the plans would be "
            f"measured by {scorer.method!r}: give a scorer of the same kind"
        )
    scored = set(table.candidate_bits)
    rows = []
    for name, plan in plans.items():
        all_scored = all(c.bits in scored for c in plan.clusters.values())
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
                "predicted": predicted_score(table, plan)
                if all_scored
                else None,
                "measured": measured,
            }
        )
    return rows


logger = get_logger(__name__)
BUDGETS = 13  # points of the predicted curve


def expected_gain(table, plan, bits=None):
    """The most that mixed precision can win here, and what a plan wins."""
    if bits is None:
        least, most = table.candidate_bits[0], table.candidate_bits[-1]
        bits = min(max(plan.average_bits, least), most)
    best, planned = coding_gain(table, bits), planned_gain_db(table, plan)
    # Clusters that score zero count in the plan alone, which may gain more.
    most = max(best.limited_db, planned or 0.0)
    sentence = (
        "Over uniform precision of the same bytes these scores put the most "
        f"that mixed precision can gain at about {most:.1f} dB"
    )
    if planned is not None:
        sentence += f"; this plan gains {planned:.1f} dB"
    return {**asdict(best), "planned_db": planned}, sentence


def write_expected_gain(folder, table, plan, bits, min_bits):
    """Write ceiling.json and pareto.json of a plan, and log the coding gain."""
    gain, sentence = expected_gain(table, plan, bits)
    logger.info(sentence)
    usable = [b for b in table.candidate_bits if b >= min_bits]
    # Closer where bits are few, as on the plot's axis: chords hide curves.
    budgets = np.geomspace(usable[0], usable[-1], BUDGETS)
    curve = [
        allocate_bits(table, average_bits=float(b), min_bits=min_bits)
        for b in budgets
    ]
    pareto = {
        "points": [_point(table, one) for one in curve],
        "chosen": _point(table, plan),
    }
    write_json(Path(folder, "ceiling.json"), gain)
    write_json(Path(folder, "pareto.json"), pareto)
    return gain


def write_additivity(folder, table, plan, scorer, network, values, **where):
    """Write additivity.json: predicted and measured scores of some plans.

    Processes share the passes; the main one writes.
    """
    plans = {
        f"uniform {bits}": uniform_plan(table, bits)
        for bits in table.candidate_bits
    }
    rows = predicted_and_measured(
        scorer,
        network,
        *values,
        table=table,
        plans={"chosen": plan, **plans},
        **where,
    )
    if if_main_process():
        write_json(Path(folder, "additivity.json"), rows)


def _point(table, plan):
    """A plan as a point of the predicted curve."""
    return {
        "bytes": plan.bytes,
        "average_bits": plan.average_bits,
        "score": predicted_score(table, plan),
    }
