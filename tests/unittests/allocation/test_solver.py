"""Plans under a budget, against all plans and dynamic programming.

Clusters that share one bit width.
"""

import itertools
import math
import time

import numpy as np
import pytest

from speechbrain_mpq.allocation.scores import ScoreTable
from speechbrain_mpq.allocation.solver import allocate_bits, equal_groups

BITS = (2, 4, 8, 16)


def make_table(scores, sizes, **more):
    """A table of one-tensor clusters from arrays."""
    names = [f"c{i}" for i in range(len(sizes))]
    return ScoreTable(
        {n: dict(zip(BITS, map(float, row))) for n, row in zip(names, scores)},
        {n: {f"{n}.weight": int(size)} for n, size in zip(names, sizes)},
        **more,
    )


def random_table(rng, clusters, spread=3.0):
    """Falling scores over many orders of magnitude, some of them not."""
    sizes = rng.integers(1, 400, clusters)
    level = np.exp(rng.normal(size=(clusters, 1)) * spread)
    noise = np.exp(rng.normal(size=(clusters, 4)))
    return make_table(level * noise * 4.0 ** -np.array(BITS), sizes)


def bits_of(plan):
    """Cluster -> bits."""
    return {name: cluster.bits for name, cluster in plan.clusters.items()}


def size_of(table, cluster, bits):
    """Bytes of a one-tensor cluster with one scale."""
    return math.ceil(table.parameters[cluster] * bits / 8) + 4


def score_of(table, bits):
    """Summed score of a plan, where fewer bits stand in for more."""
    return sum(
        min(score for b, score in table.scores[c].items() if b <= bits[c])
        for c in table.scores
    )


def least_score(table, budget):
    """The best of all plans, by trying them."""
    names = list(table.scores)
    scores = []
    for row in itertools.product(BITS, repeat=len(names)):
        bits = dict(zip(names, row))
        if sum(size_of(table, c, b) for c, b in bits.items()) <= budget:
            scores.append(score_of(table, bits))
    return min(scores)


def random_budget(table, rng):
    """Bytes between those of the smallest and the largest plan."""
    ends = [sum(size_of(table, c, b) for c in table.scores) for b in (2, 16)]
    return int(rng.integers(ends[0], ends[1] + 1))


@pytest.mark.parametrize("seed", range(10))
def test_no_plan_is_better(seed):
    rng = np.random.default_rng(seed)
    table = random_table(rng, int(rng.integers(1, 5)))
    budget = random_budget(table, rng)
    plan = allocate_bits(table, budget_bytes=budget)
    assert plan.bytes <= budget
    best = least_score(table, budget)
    assert score_of(table, bits_of(plan)) == pytest.approx(best, rel=1e-8)


@pytest.mark.parametrize("seed", range(10))
def test_no_spare_byte_could_still_buy_bits(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, size=(5, 4))  # small integers: many ties
    table = make_table(scores, rng.integers(1, 60, 5))
    budget = random_budget(table, rng)
    plan = allocate_bits(table, budget_bytes=budget)
    assert score_of(table, bits_of(plan)) == least_score(table, budget)
    for name, bits in bits_of(plan).items():
        for more in BITS[BITS.index(bits) + 1 :]:
            step = size_of(table, name, more) - size_of(table, name, bits)
            assert plan.bytes + step > budget


def test_medium_instance_against_dynamic_programming():
    rng = np.random.default_rng(5)
    table = random_table(rng, 40)
    names = list(table.scores)
    for budget in (random_budget(table, rng) for _ in range(3)):
        best = np.zeros(budget + 1)  # least score with so many bytes
        for name in names:
            new = np.full(budget + 1, np.inf)
            for b in BITS:
                size = size_of(table, name, b)
                if size <= budget:
                    shifted = best[: budget + 1 - size] + table.scores[name][b]
                    new[size:] = np.minimum(new[size:], shifted)
            best = new
        plan = allocate_bits(table, budget_bytes=budget)
        assert plan.bytes <= budget
        found = score_of(table, bits_of(plan))
        assert found == pytest.approx(best[-1], rel=1e-8)


def test_small_scores_count_beside_huge_ones():
    # Any plan that saves on "huge" is out; between the others a trillionth
    # of its score decides.
    table = make_table([[1e6, 0, 0, 0], [2e-6] * 4, [1e-6, 0, 0, 0]], [80] * 3)
    plan = allocate_bits(table, budget_bytes=40 + 40 + 20 + 3 * 4)
    assert bits_of(plan) == {"c0": 4, "c1": 2, "c2": 4}


def test_all_zero_scores_fill_the_budget():
    table = make_table(np.zeros((3, 4)), [8, 80, 800])
    budget = 8 + 20 + 800 + 12
    plan = allocate_bits(table, budget_bytes=budget)
    assert bits_of(plan) == {"c0": 8, "c1": 2, "c2": 8}


def test_spare_bytes_go_to_bits_that_are_scored_worse():
    table = make_table([[0.2, 0.1, 0.3, 0.1]], [80])
    assert bits_of(allocate_bits(table, budget_bytes=84)) == {"c0": 8}


def test_negative_scores_of_a_signed_method():
    table = make_table(
        [[0.1, -0.5, -0.2, 0], [3, 2, 1, 0]], [80] * 2, signed=True
    )
    assert bits_of(allocate_bits(table, budget_bytes=40 + 80 + 8)) == {
        "c0": 4,
        "c1": 8,
    }


@pytest.mark.parametrize("average", [2, 4, 8, 16, 2.5, 3.3, 5])
def test_average_bits_is_a_uniform_plans_budget(average):
    rng = np.random.default_rng(0)
    table = random_table(rng, 30)
    plan = allocate_bits(table, average_bits=average)
    low, high = (
        sum(size_of(table, c, b) for c in table.scores)
        for b in (math.floor(average), math.ceil(average))
    )
    budget = low + (average % 1) * (high - low)
    assert plan.bytes <= budget + 1e-6
    assert plan.bytes > budget - 400 * 2 / 8  # no cluster's next step fits
    if average in BITS:
        uniform = dict.fromkeys(table.scores, average)
        assert score_of(table, bits_of(plan)) <= score_of(table, uniform)


def test_plan_knows_its_clusters_and_the_rest():
    table = ScoreTable(
        {"norm": {2: 1.0, 4: 0.0}},
        {"norm": {"norm.weight": 8, "norm.bias": 8}},
        rest_parameters=5,
    )
    plan = allocate_bits(table, budget_bytes=8 + 8 + 20)
    cluster = plan.clusters["norm"]
    assert (cluster.bits, cluster.parameters) == (4, 16)
    assert list(cluster.tensors) == ["norm.weight", "norm.bias"]
    assert plan.rest_parameters == 5
    assert plan.bytes == 36
    assert allocate_bits(table, budget_bytes=35).clusters["norm"].bits == 2


def test_several_scales_a_tensor_cost_their_bytes():
    table = make_table([[3, 2, 1, 0]], [80], scales={"c0": 10})
    assert allocate_bits(table, average_bits=4).bytes == 40 + 4 * 10


def test_min_bits_and_fewer_candidates():
    table = make_table([[3, 2, 1, 0], [0, 0, 0, 0]], [80, 80])
    plan = allocate_bits(table, budget_bytes=40 + 80 + 8, min_bits=4)
    assert bits_of(plan) == {"c0": 8, "c1": 4}
    plan = allocate_bits(table, average_bits=4, candidate_bits=(4, 16))
    assert bits_of(plan) == {"c0": 4, "c1": 4}
    with pytest.raises(ValueError, match=r"\[6\] were not scored"):
        allocate_bits(table, average_bits=4, candidate_bits=(4, 6))
    with pytest.raises(ValueError, match="min_bits=16"):
        allocate_bits(table, average_bits=4, candidate_bits=(4,), min_bits=16)


THREE_LEVELS = ScoreTable(
    {
        "a": {1: 9.0, 1.6: 3.0, 2: 2.9, 3: 0.0},
        "b": {1: 9.0, 1.6: 6.0, 2: 0.1, 3: 0.0},
    },
    {"a": {"a.weight": 40}, "b": {"b.weight": 41}},
    codebook="midrise",
)


def test_three_levels_are_a_candidate_with_bytes_of_its_own():
    # 8 + 11 bytes and two scales: 10 + 11 would cost two more.
    plan = allocate_bits(THREE_LEVELS, budget_bytes=8 + 11 + 8, min_bits=1.6)
    assert bits_of(plan) == {"a": 1.6, "b": 2}
    assert plan.bytes == 27 and plan.codebook == "midrise"
    plan = allocate_bits(THREE_LEVELS, budget_bytes=5 + 11 + 8, min_bits=1)
    assert bits_of(plan) == {"a": 1, "b": 2}
    with pytest.raises(ValueError, match="out of reach: with 2 to 3 bits"):
        allocate_bits(THREE_LEVELS, budget_bytes=27)


def test_average_bits_of_1_6_is_that_uniform_plans_budget():
    plan = allocate_bits(THREE_LEVELS, average_bits=1.6, min_bits=1.6)
    assert bits_of(plan) == {"a": 1.6, "b": 1.6}
    assert plan.bytes == 8 + 9 + 8  # 41 values fill nine bytes
    with pytest.raises(ValueError, match=r"25 bytes \(1.6 bits"):
        allocate_bits(THREE_LEVELS, average_bits=1.5, min_bits=1.6)


@pytest.mark.parametrize(
    "budget",
    [
        {"budget_bytes": 43},
        {"budget_bytes": 329},
        {"average_bits": 1},
        {"average_bits": 1.5},
        {"average_bits": 17},
        {"average_bits": -3},
    ],
)
def test_budget_out_of_reach_states_both_limits(budget):
    table = make_table([[3, 2, 1, 0]] * 2, [80, 80])
    message = r"48 bytes \(2 bits .* 328 bytes \(16 bits"
    with pytest.raises(ValueError, match=message):
        allocate_bits(table, **budget)
    assert allocate_bits(table, budget_bytes=48).average_bits == 2
    assert allocate_bits(table, budget_bytes=328).average_bits == 16


@pytest.mark.parametrize(
    "budget",
    [
        {},
        {"average_bits": 4, "budget_bytes": 100},
        {"average_bits": float("nan")},
        {"budget_bytes": float("inf")},
        {"average_bits": "4"},
        {"average_bits": True},
    ],
)
def test_no_budget(budget):
    with pytest.raises(ValueError, match="budget"):
        allocate_bits(make_table([[3, 2, 1, 0]], [80]), **budget)


@pytest.mark.parametrize("scores", ["proportional", "equal"])
def test_ties_without_end_take_no_minutes(scores, caplog):
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 40000, 60)
    rows = 4.0 ** -np.array(BITS) * sizes[:, None]
    if scores == "equal":
        rows = np.tile(16.0 - np.array(BITS), (60, 1))
    table = make_table(rows, sizes)
    started = time.perf_counter()
    plan = allocate_bits(table, average_bits=4.3)
    assert time.perf_counter() - started < 30
    assert plan.average_bits == pytest.approx(4.3, abs=0.1)
    stated = [record for record in caplog.records if "equally" in record.msg]
    assert len(stated) == (scores == "proportional")


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


EQUAL_BITS = (2, 4, 8)


def table(sizes=(64, 32, 48, 16, 64, 32, 80)):
    """Scores of seven clusters of different sizes."""
    return ScoreTable(
        {n: dict(zip(EQUAL_BITS, row)) for n, row in zip(NAMES, SCORES)},
        {n: {f"{n}.weight": size} for n, size in zip(NAMES, sizes)},
    )


def brute_force(scores, budget, groups):
    """Least summed score of all plans with equal bits in each group."""
    best = float("inf")
    for choice in itertools.product(range(3), repeat=len(groups)):
        index = {n: i for group, i in zip(groups, choice) for n in group}
        size = sum(
            scores.parameters[n] * EQUAL_BITS[index[n]] / 8 + 4 for n in NAMES
        )
        if size <= budget:
            total = sum(scores.scores[n][EQUAL_BITS[index[n]]] for n in NAMES)
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


def test_the_solver_prints_nothing(capfd):
    rng = np.random.default_rng(1)  # ties, at which HiGHS prints past options
    sizes = rng.integers(10, 100000, rng.integers(20, 120)).tolist()
    rows = {
        f"c{i}": {
            bits: rng.choice([1, 1, 1.0000001]) * 2.0 ** (-2 * bits) * size
            for bits in (2, 3, 4, 6, 8, 16)
        }
        for i, size in enumerate(sizes)
    }
    tensors = {f"c{i}": {f"c{i}.w": n} for i, n in enumerate(sizes)}
    allocate_bits(ScoreTable(rows, tensors), average_bits=3.3)
    print("seen")
    assert capfd.readouterr().out.split() == ["seen"]
