"""What a score table foresees, before any training.

Three files for the report: how much mixed precision could win here at all
(ceiling.json), the predicted damage of every budget (pareto.json), and
whether the damages of the clusters add up (additivity.json).
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np
from speechbrain.utils.logger import get_logger

from ..allocation.additivity import (
    planned_gain_db,
    predicted_and_measured,
    predicted_score,
    uniform_plan,
)
from ..allocation.ceiling import ceiling
from ..allocation.solver import allocate_bits
from .files import write_json

logger = get_logger(__name__)

BUDGETS = 13  # points of the predicted curve


def foresee(table, plan, bits=None):
    """The most that mixed precision can win here, and what a plan wins.

    Arguments
    ---------
    table : ScoreTable
        Scores that are damages, at two candidates or more.
    plan : BitPlan
        What was chosen.
    bits : float or None
        The budget it was chosen for; None: what it has.

    Returns
    -------
    foreseen : dict
        The fields of `Ceiling`, and "planned_db".
    said : str
        The same as a sentence.
    """
    if bits is None:
        least, most = table.candidate_bits[0], table.candidate_bits[-1]
        bits = min(max(plan.average_bits, least), most)
    best, planned = ceiling(table, bits), planned_gain_db(table, plan)
    said = (
        "Against uniform precision of the same bytes, mixed precision can "
        f"save at most {best.limited_db:.1f} dB of damage by these scores"
    )
    if planned is not None:
        said += f"; this plan saves {planned:.1f} dB"
    return {**asdict(best), "planned_db": planned}, said


def write_outlook(folder, table, plan, bits, min_bits):
    """Write ceiling.json and pareto.json of a plan, and log the ceiling.

    Arguments
    ---------
    folder : str or Path
        Output folder of the experiment.
    table : ScoreTable
        Scores that are damages, which add up.
    plan : BitPlan
        What was chosen.
    bits : float
        The budget it was chosen for.
    min_bits : int
        Least bits of any cluster.

    Returns
    -------
    foreseen : dict
        Content of ceiling.json: the fields of `Ceiling`, and "planned_db".
    """
    foreseen, said = foresee(table, plan, bits)
    logger.info(said)
    usable = [b for b in table.candidate_bits if b >= min_bits]
    budgets = np.linspace(usable[0], usable[-1], BUDGETS)
    curve = [
        allocate_bits(table, average_bits=float(b), min_bits=min_bits)
        for b in budgets
    ]
    pareto = {
        "points": [_point(table, one) for one in curve],
        "chosen": _point(table, plan),
    }
    write_json(Path(folder, "ceiling.json"), foreseen)
    write_json(Path(folder, "pareto.json"), pareto)
    return foreseen


def write_additivity(folder, table, plan, scorer, network, values, **where):
    """Write additivity.json: predicted and measured damage of some plans.

    Arguments
    ---------
    folder : str or Path
        Output folder of the experiment.
    table : ScoreTable
        Made by the scorer.
    plan : BitPlan
        What was chosen.
    scorer : OutputScores
        Measures whole plans.
    network : torch.nn.Module
        Full-precision network, left as it was found.
    values : sequence
        The calibration values that the scorer needs.
    **where
        `include`, `exclude` and `prefix` of the scoring.
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
    write_json(Path(folder, "additivity.json"), rows)


def _point(table, plan):
    """A plan as a point of the predicted curve."""
    return {
        "bytes": plan.bytes,
        "average_bits": plan.average_bits,
        "score": predicted_score(table, plan),
    }
