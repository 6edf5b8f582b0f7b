"""The best bit plan that a size budget allows.

A budget is bits on average or bytes. Clusters may have to get equal bits: a
row of the table for all of them. Hardware and fused kernels want one width for
what they read together: query, key and value of an attention layer, or the
input and recurrent weights of a gated layer. Parameters that one module owns
(`in_proj_weight`, all weights of a torch.nn.LSTM) are one cluster and share
their bits anyway.
"""

import ctypes
import logging
import math
import os
import re
import sys
from bisect import bisect_left
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import eye_array, kron

from ..quantization.codebook import MAX_BITS, check_bits
from ..quantization.groups import split_name
from ..quantization.plan import FLOAT_BYTES, BitPlan, ClusterBits
from ..quantization.tensors import near_misses
from .scores import check_candidates

UNITS = {
    "bit": None,
    "bits": None,
    "b": 1,
    "byte": 1,
    "bytes": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}


MOST_BITS = 32  # above it a bare number means bytes
# Names of sibling modules that belong together, by the name of the rule.
SIBLINGS = {
    "qkv": (
        {"q", "k", "v"},
        {"query", "key", "value"},
        {"q_proj", "k_proj", "v_proj"},
        {"q_lin", "k_lin", "v_lin"},
        {"linear_q", "linear_k", "linear_v"},
        {"query_proj", "key_proj", "value_proj"},
        {"to_q", "to_k", "to_v"},
        {"wq", "wk", "wv"},
    ),
    "gates": (
        {"w", "u"},  # SpeechBrain's LiGRU and SLi-GRU
        {"ih", "hh"},
        {"i2h", "h2h"},
        {"x2h", "h2h"},
    ),
}
logger = logging.getLogger(__name__)
COST_UNIT = 1e4  # HiGHS stops at a gap of 1e-6: 1e-10 of the best sum
STDOUT = 1  # file descriptor
POSIX = os.name == "posix"
NODE_LIMIT = 1000  # usually it needs a few; many only to tell ties apart


def parse_budget(budget):
    """Arguments of `allocate_bits` for a budget."""
    unit = ""
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)\s*", budget)
        if not match or match[2] and match[2].lower() not in UNITS:
            raise ValueError(_message(budget))
        budget, unit = float(match[1]), match[2].lower()
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise ValueError(_message(budget))
    if not 0 < budget < float("inf"):
        raise ValueError(_message(budget))
    if unit and UNITS[unit]:
        return {"budget_bytes": int(budget * UNITS[unit])}
    if budget > MOST_BITS and not unit:
        return {"budget_bytes": int(budget)}
    whole = int(budget) if budget == int(budget) else budget
    return {"average_bits": whole}


def over_budget(stored, budget):
    """Tells where files take more than was asked for; empty where they do not.

    What entropy coding takes is known of rounded weights only, and calibrated
    rounding and training change it after the plan is made.

    Arguments
    ---------
    stored : int
        Bytes of the files.
    budget : int, float or str
        As for `parse_budget`.

    Returns
    -------
    str

    Example
    -------
    >>> over_budget(1022, "1000 B")
    '1022 bytes are more than the 1000 that were asked for: ask for 22 less'
    >>> over_budget(1000, "1000 B"), over_budget(1000, "4 bit")
    ('', '')
    """
    most = parse_budget(budget).get("budget_bytes", stored)
    if stored <= most:
        return ""
    return (
        f"{stored} bytes are more than the {most} that were asked for: ask "
        f"for {stored - most} less"
    )


def _message(budget):
    """How a budget is to be written."""
    return (
        f"budget {budget!r} is not understood: give bits on average such as 4 "
        'or "2.5 bit", or bytes such as 350000 or "350 KiB"'
    )


def equal_groups(clusters, rules):
    """Groups of clusters that must get equal bits."""
    names = list(clusters)
    group_of = {name: {name} for name in names}
    for rule in [rules] if isinstance(rules, str) else rules:
        for together in _matches(names, rule):
            merged = set().union(*(group_of[name] for name in together))
            group_of.update(dict.fromkeys(merged, merged))
    groups = {id(group): group for group in map(group_of.get, names)}
    return [[n for n in names if n in group] for group in groups.values()]


def _merged_rows(rows, names, groups):
    """Sums of the rows of every group."""
    index = {name: number for number, name in enumerate(names)}
    return np.array([rows[[index[n] for n in g]].sum(0) for g in groups])


def _matches(names, rule):
    """Sets of clusters that a rule puts together; it must find some."""
    if rule not in SIBLINGS:
        matching = [name for name in names if fnmatchcase(name, rule)]
        if not matching:
            raise ValueError(
                f"equal_bits: {rule!r} matches no cluster and is none of "
                f"{list(SIBLINGS)}{near_misses(rule, names)}"
            )
        return [matching]
    families = {}
    for name in names:
        parent, _, last = split_name(name)[0].rpartition(".")
        for kind, siblings in enumerate(SIBLINGS[rule]):
            if last in siblings:
                family = families.setdefault((parent, kind), {})
                family.setdefault(last, []).append(name)
    matching = [
        [name for members in family.values() for name in members]
        for (_, kind), family in families.items()
        if set(family) == SIBLINGS[rule][kind]
    ]
    if not matching:
        raise ValueError(
            f"equal_bits: no modules stand beside each other as {rule!r} "
            f"expects ({', '.join(map(str, map(sorted, SIBLINGS[rule])))}): "
            "what one module owns has equal bits already; for others give a "
            "pattern on the names of clusters"
        )
    return matching


def allocate_bits(
    table,
    *,
    average_bits=None,
    budget_bytes=None,
    min_bits=2,
    candidate_bits=None,
    equal_bits=(),
) -> BitPlan:
    """The plan with the least summed score that fits into the budget.

    A multiple-choice knapsack, solved exactly, except where very many plans
    are all but equal: there the search ends early, with a warning that states
    how far from the best the plan can be at most. More bits are never scored
    worse: where a table says so it is noise, or one error hiding another, and
    the score of fewer bits stands for both. That leaves the least sum as it
    was, and lets bytes that are to spare be spent on bits that are not scored
    better: in the plan no cluster can be raised any further.

    Arguments
    ---------
    table : ScoreTable
        Scores of all clusters.
    average_bits : float
        The budget as that of the uniform plan of so many bits, or between
        two uniform plans: of integers, and of 1.6 bits where that is a
        candidate. Give this or `budget_bytes`.
    budget_bytes : int
        Most bytes of the plan, with scales and parameters left alone.
    min_bits : int or float
        Least bits of any cluster, 1.6 included.
    candidate_bits : sequence of int or float
        Some of the table's candidates; all if not given.
    equal_bits : sequence of str
        Clusters that must share one bit width (see `equal_groups`).

    Example
    -------
    >>> from speechbrain_mpq.allocation.scores import ScoreTable
    >>> table = ScoreTable(
    ...     {"a": {2: 9.0, 4: 1.0, 8: 0.0}, "b": {2: 0.2, 4: 0.1, 8: 0.0}},
    ...     {"a": {"a.weight": 16}, "b": {"b.weight": 32}},
    ... )
    >>> plan = allocate_bits(table, average_bits=3)
    >>> {name: cluster.bits for name, cluster in plan.clusters.items()}
    {'a': 4, 'b': 2}
    >>> plan.bytes  # 16 x 4 / 8 + 32 x 2 / 8 + 2 scales of 4
    24
    """
    bits = _usable_bits(table, min_bits, candidate_bits)
    choices = [[_cluster(table, c, b) for b in bits] for c in table.scores]
    sizes = np.array([[choice.bytes for choice in row] for row in choices])
    rest = FLOAT_BYTES * table.rest_parameters
    budget = _budget(table, average_bits, budget_bytes)
    if 0 <= budget < rest:
        raise ValueError(
            f"a budget of {budget} bytes is less than the {rest} bytes of the "
            f"{table.rest_parameters} parameters that stay in full precision: "
            "exclude fewer, or raise the budget"
        )
    lowest, highest = sizes[:, 0].sum() + rest, sizes[:, -1].sum() + rest
    if not lowest <= budget <= highest:
        raise ValueError(
            f"a budget of {budget} bytes is out of reach: with {bits[0]} to "
            f"{bits[-1]} bits this model takes {lowest} bytes ({bits[0]} bits "
            f"on average) to {highest} bytes ({bits[-1]} bits on average)"
        )
    scores = np.array([[row[b] for b in bits] for row in table.scores.values()])
    names = list(table.scores)
    groups = equal_groups(names, equal_bits)
    chosen = _knapsack(
        _merged_rows(scores, names, groups),
        _merged_rows(sizes, names, groups),
        budget - rest,
    )
    column = {n: i for group, i in zip(groups, chosen) for n in group}
    plan = {name: row[column[name]] for name, row in zip(names, choices)}
    return BitPlan(plan, table.rest_parameters, table.codebook)


def _usable_bits(table, min_bits, candidate_bits):
    """Candidates that were scored, are wanted and are not too few bits."""
    if candidate_bits is None:
        candidate_bits = table.candidate_bits
    bits = check_candidates(candidate_bits)
    unknown = sorted(set(bits) - set(table.candidate_bits))
    if unknown:
        raise ValueError(
            f"candidate bits {unknown} were not scored, only "
            f"{list(table.candidate_bits)}; score again with them"
        )
    usable = tuple(b for b in bits if b >= check_bits(min_bits))
    if not usable:
        raise ValueError(
            f"no candidate of {list(bits)} reaches min_bits={min_bits}"
        )
    return usable


def _cluster(table, cluster, bits):
    """A cluster at some bits; it knows its bytes."""
    return ClusterBits.of(table.tensors[cluster], table.scales[cluster], bits)


def _budget(table, average_bits, budget_bytes):
    """The budget in bytes, whichever way it was given."""
    if (average_bits is None) == (budget_bytes is None):
        raise ValueError("give either average_bits or budget_bytes")
    budget = budget_bytes if average_bits is None else average_bits
    if isinstance(budget, bool | str) or not math.isfinite(budget):
        raise ValueError(f"a budget must be a finite number, not {budget!r}")
    if average_bits is None:
        return math.floor(budget_bytes)
    within = min(max(average_bits, 1), MAX_BITS)
    widths = sorted({*range(1, MAX_BITS + 1), *table.candidate_bits})
    low = max(bits for bits in widths if bits <= within)
    high = min(bits for bits in widths if bits >= within)
    below, above = (
        sum(_cluster(table, cluster, bits).bytes for cluster in table.scores)
        for bits in (low, high)
    )
    parameters = sum(table.parameters.values())
    share = (within - low) / (high - low or 1)
    between = share * (above - below)
    beyond = (average_bits - within) * parameters / 8
    # The tiny term keeps 2.3 from losing a byte to its binary form.
    packed = below + math.floor(between + beyond + 1e-6)
    return packed + FLOAT_BYTES * table.rest_parameters


def _knapsack(scores, sizes, budget):
    """Index of the candidate of each cluster; rows are clusters."""
    scores = np.minimum.accumulate(scores, axis=1)
    costs = scores - scores[:, -1:]
    unit = _min_max_cost(costs, sizes, budget)
    # The best sum lies between this and this times the number of clusters:
    # whatever costs more alone is out, and no small score drowns.
    allowed = costs <= unit * len(costs)
    costs = np.where(allowed, costs * (COST_UNIT / (unit or 1.0)), 0.0)
    choice = _solve(costs, sizes, budget, allowed)
    return _fill_budget(choice, sizes, budget)


def _fill_budget(choice, sizes, budget):
    """Raise clusters, by the largest step that fits, until none does."""
    rows = np.arange(len(sizes))
    raised = np.arange(sizes.shape[1])
    while True:
        used = sizes[rows, choice]
        spare = budget - used.sum()
        assert spare >= 0, f"the plan is {-spare} bytes over the budget"
        steps = sizes - used[:, None]
        possible = (raised > choice[:, None]) & (steps <= spare)
        if not possible.any():
            return choice
        row, column = divmod(
            np.where(possible, steps, -1).argmax(), len(raised)
        )
        choice[row] = column


def _min_max_cost(costs, sizes, budget):
    """Least cost that all clusters can stay within under the budget."""

    def affordable(cost):
        return np.where(costs <= cost, sizes, np.inf).min(1).sum() <= budget

    levels = np.unique(costs)
    return levels[bisect_left(levels, True, key=affordable)]


def _solve(costs, sizes, budget, allowed):
    """One allowed candidate a cluster with the least cost in the budget."""
    clusters, candidates = costs.shape
    one_each = kron(eye_array(clusters), np.ones((1, candidates)))
    with _quiet():
        result = milp(
            costs.ravel(),
            integrality=np.ones(costs.size),
            bounds=Bounds(0, allowed.ravel().astype(float)),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(sizes.reshape(1, -1), -np.inf, budget),
            ],
            options={"mip_rel_gap": 0, "node_limit": NODE_LIMIT},
        )
    if result.x is None:
        raise RuntimeError(f"scipy's milp found no plan: {result.message}")
    if not result.success:
        logger.warning(
            "Very many bit plans are almost equally good; the one taken is at "
            f"most {result.mip_gap:.2g} of its summed score above the best"
        )
    return result.x.reshape(costs.shape).argmax(1)


@contextmanager
def _quiet():
    """Nothing on standard output: HiGHS prints there past its options."""
    with suppress(AttributeError, ValueError):  # none there, or closed
        sys.stdout.flush()
    try:
        kept = os.dup(STDOUT)
    except OSError:  # closed
        yield
        return
    flush = getattr(ctypes.CDLL(None), "fflush", None) if POSIX else None
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        # C has a buffer of its own.
        if flush:
            flush(None)
        os.dup2(nowhere, STDOUT)
        yield
    finally:
        if flush:
            flush(None)
        os.dup2(kept, STDOUT)
        os.close(kept)
        os.close(nowhere)
