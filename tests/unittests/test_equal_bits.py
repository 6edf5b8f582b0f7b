"""Clusters that share one bit width."""

import itertools

import pytest

from speechbrain_mpq import allocate_bits
from speechbrain_mpq.allocation.equal_bits import equal_groups
from speechbrain_mpq.allocation.scores import ScoreTable

NAMES = ["0.q", "0.k", "0.v", "0.out", "1.q", "1.k", "1.v"]
SCORES = [
    [9.0, 3.0, 0.1],
    [0.5, 0.4, 0.3],
    [4.0, 1.0, 0.0],
    [7.0, 0.2, 0.1],
    [1.0, 0.9, 0.0],
    [2.0, 0.1, 0.0],
    [0.3, 0.2, 0.1],
]
BITS = (2, 4, 8)


def table(sizes=(64, 32, 48, 16, 64, 32, 80)):
    """Scores of seven clusters of different sizes."""
    return ScoreTable(
        {n: dict(zip(BITS, row)) for n, row in zip(NAMES, SCORES)},
        {n: {f"{n}.weight": size} for n, size in zip(NAMES, sizes)},
    )


def brute_force(scores, budget, groups):
    """Least summed score of all plans with equal bits in each group."""
    best = float("inf")
    for choice in itertools.product(range(3), repeat=len(groups)):
        index = {n: i for group, i in zip(groups, choice) for n in group}
        size = sum(scores.parameters[n] * BITS[index[n]] / 8 + 4 for n in NAMES)
        if size <= budget:
            total = sum(scores.scores[n][BITS[index[n]]] for n in NAMES)
            best = min(best, total)
    return best


@pytest.mark.parametrize("budget", [150, 180, 220, 300])
@pytest.mark.parametrize("rules", [[], ["qkv"], ["qkv", "*.out"], ["1.*"]])
def test_plan_is_the_best_of_all_with_equal_bits(budget, rules):
    scores = table()
    groups = equal_groups(NAMES, rules)
    plan = allocate_bits(scores, budget_bytes=budget, equal_bits=rules)
    found = sum(scores.scores[n][c.bits] for n, c in plan.clusters.items())
    assert found == pytest.approx(brute_force(scores, budget, groups))
    for group in groups:
        assert len({plan.clusters[name].bits for name in group}) == 1
    assert list(plan.clusters) == NAMES


def test_equal_bits_cost_score():
    free = allocate_bits(table(), budget_bytes=180)
    assert len({free.clusters[f"0.{n}"].bits for n in "qkv"}) > 1


def test_gates_and_slices():
    clusters = ["rnn.0.w[0:4]", "rnn.0.w[4:8]", "rnn.0.u", "rnn.1.w", "rnn.1.u"]
    assert equal_groups(clusters, "gates") == [clusters[:3], clusters[3:]]


def test_overlapping_rules_become_one_group():
    assert equal_groups(NAMES, ["qkv", "*.q"]) == [
        ["0.q", "0.k", "0.v", "1.q", "1.k", "1.v"],
        ["0.out"],
    ]


@pytest.mark.parametrize("rule", ["gates", "3.*", "qvk"])
def test_rules_that_find_nothing_are_refused(rule):
    with pytest.raises(ValueError, match=f"equal_bits: .*{rule[:3]}"):
        equal_groups(NAMES, [rule])
