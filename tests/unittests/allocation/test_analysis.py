"""The ceiling, against direct minimization and against solved plans.

Predicted scores of plans against measured ones.

What a score table foresees, as files.
"""

import json

import numpy as np
import pytest
import torch
import torch.nn as nn
from scipy.optimize import minimize

from speechbrain_mpq.allocation.analysis import (
    am_gm,
    coding_gain,
    limited_bits,
    planned_gain_db,
    predicted_and_measured,
    predicted_score,
    uniform_plan,
    write_additivity,
    write_expected_gain,
)
from speechbrain_mpq.allocation.output_scores import KLScores, MaskErrorScores
from speechbrain_mpq.allocation.scores import ScoreTable
from speechbrain_mpq.allocation.solver import allocate_bits

ALL_BITS = tuple(range(1, 17))


def make_table(sensitivities, sizes, bits=ALL_BITS, floor=0.0):
    """Scores that follow the model of rounding."""
    names = [f"c{i}" for i in range(len(sizes))]
    return ScoreTable(
        {
            name: {b: floor + float(n * s * 4.0**-b) for b in bits}
            for name, s, n in zip(names, sensitivities, sizes)
        },
        {name: {f"{name}.weight": int(n)} for name, n in zip(names, sizes)},
    )


def random_model(seed, spread=2.0, clusters=6):
    """Sensitivities over some orders of magnitude, and sizes."""
    rng = np.random.default_rng(seed)
    sensitivities = np.exp(spread * rng.normal(size=clusters))
    return sensitivities, rng.integers(5, 50, clusters)


def best_by_descent(s, n, average, least, most):
    """Least damage of real-valued bits within limits, by a general solver."""
    found = minimize(
        lambda b: np.log(n @ (s * 4.0**-b)),
        np.full(len(s), float(average)),
        bounds=[(least, most)] * len(s),
        constraints={"type": "eq", "fun": lambda b: n @ (b - average)},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return np.exp(found.fun)


@pytest.mark.parametrize("seed", range(5))
def test_am_gm_is_what_the_best_bits_win(seed):
    s, n = random_model(seed)
    best = best_by_descent(s, n, 4, -100, 100)
    gain = n @ (s * 4.0**-4) / best
    assert am_gm(s, n) == pytest.approx(gain, rel=1e-4)
    table = make_table(s, n)
    assert coding_gain(table, 4).am_gm_db == pytest.approx(10 * np.log10(gain))


@pytest.mark.parametrize("seed", range(5))
def test_limited_bits_are_the_best_within_limits(seed):
    s, n = random_model(seed, spread=5)
    for average in (2.0, 2.5, 4.0, 7.5, 8.0):
        bits = limited_bits(s, n, average, 2, 8)
        assert ((bits >= 2) & (bits <= 8)).all()
        assert n @ bits / n.sum() == pytest.approx(average)
        best = best_by_descent(s, n, average, 2, 8)
        assert n @ (s * 4.0**-bits) == pytest.approx(best, rel=1e-3)


def test_no_plan_wins_more_than_the_ceiling_and_fine_ones_reach_it():
    rng = np.random.default_rng(0)
    s = 4.0 ** rng.normal(size=200)
    table = make_table(s, rng.integers(800, 1000, 200))
    for bits in (2.5, 4, 6):
        plan = allocate_bits(table, average_bits=bits, min_bits=1)
        best = coding_gain(table, bits)
        gain = planned_gain_db(table, plan)
        assert gain <= best.limited_db <= best.am_gm_db + 1e-9
        # Whole bits cost something: 0.26 dB by theory, evenly spread.
        assert gain == pytest.approx(best.limited_db, abs=0.5)


def test_equal_sensitivities_leave_nothing_to_win():
    table = make_table([3.0] * 4, [1, 10, 100, 1000])
    best = coding_gain(table, 4)
    assert best.am_gm_db == pytest.approx(0, abs=1e-9)
    assert best.limited_db == pytest.approx(0, abs=1e-9)
    assert best.insensitive == 0


def test_a_common_floor_does_not_matter():
    s, n = random_model(0)
    with_floor = make_table(s, n, bits=(2, 4, 8), floor=100.0)
    plain = make_table(s, n, bits=(2, 4, 8))
    assert coding_gain(with_floor, 4).am_gm_db == pytest.approx(
        coding_gain(plain, 4).am_gm_db
    )


def test_insensitive_clusters_are_counted_and_bounded():
    table = make_table([4.0, 1.0, 0.0], [10, 10, 10], bits=(2, 4, 8))
    best = coding_gain(table, 4)
    assert best.insensitive == 1
    expected = 10 * np.log10(am_gm([4.0, 1.0, 1.0], [1, 1, 1]))
    assert best.am_gm_db == pytest.approx(expected)
    nothing = make_table([0.0, 0.0], [10, 10])
    assert coding_gain(nothing, 4).limited_db == 0
    assert coding_gain(nothing, 4).insensitive == 2
    signed = ScoreTable(
        {"a": {2: -1.0, 4: 0.0}, "b": {2: 1.0, 4: 0.0}},
        {"a": {"a.weight": 8}, "b": {"b.weight": 8}},
        signed=True,
    )
    assert coding_gain(signed, 3).insensitive == 1


def test_bad_input():
    with pytest.raises(ValueError, match="two candidates"):
        coding_gain(make_table([1.0], [1], bits=(4,)), 4)
    for bits in (1, 9, float("nan")):
        with pytest.raises(ValueError, match="2 to 8"):
            coding_gain(make_table([1.0], [1], bits=(2, 8)), bits)


BITS = (2, 3, 4, 8)


class Sum(nn.Module):
    """Layers side by side: on inputs of their own, their errors add up."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        """Concatenated outputs, one channel of [items, channels, frames]
        each."""
        parts = [
            layer(x[:, [index]]) for index, layer in enumerate(self.layers)
        ]
        return torch.cat(parts, 1)


@pytest.fixture
def parallel():
    """A network whose clusters do not meet, and its data."""
    torch.manual_seed(0)
    convs = [nn.Conv1d(1, 6, 3, padding=1, bias=False) for _ in range(4)]
    return Sum(convs), torch.randn(3, 4, 20), torch.ones(3, 24, 20)


def test_independent_errors_add_up(parallel):
    network, *data = parallel
    scorer = MaskErrorScores(BITS)
    table = scorer(network, *data, progress=False)
    plans = {
        "mixed": allocate_bits(table, average_bits=3.4),
        "uniform 3": uniform_plan(table, 3),
        "uniform 6": uniform_plan(table, 6),
    }
    rows = predicted_and_measured(
        scorer, network, *data, table=table, plans=plans
    )
    assert [row["plan"] for row in rows] == list(plans)
    for row in rows[:2]:
        assert row["measured"] == pytest.approx(row["predicted"], rel=1e-5)
    assert rows[2]["predicted"] is None and rows[2]["measured"] > 0
    assert rows[2]["average_bits"] == 6
    assert rows[2]["bytes"] == plans["uniform 6"].bytes
    json.dumps(rows, allow_nan=False)


def test_prediction_is_exact_around_the_given_plan():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.Conv1d(8, 2, 1))
    inputs = torch.randn(4, 3, 10)
    alone = KLScores(BITS)(network, inputs, progress=False)
    given = uniform_plan(alone, 3)
    table = KLScores(BITS, given=given)(network, inputs, progress=False)
    one_changed = allocate_bits(  # one cluster at 8 bits
        ScoreTable(
            {"0": {3: 1, 8: 0}, "2": {3: 0, 8: 0}},
            table.tensors,
        ),
        budget_bytes=given.bytes + 20,
    )
    assert one_changed.clusters["0"].bits == 8
    for plan in (given, one_changed):
        measured = KLScores().measure(network, plan, inputs)
        assert predicted_score(table, plan) == pytest.approx(measured, rel=1e-5)
    assert predicted_score(alone, given) != pytest.approx(
        KLScores().measure(network, given, inputs), rel=1e-3
    )


def test_gain_in_decibels_by_hand():
    table = ScoreTable(
        {"a": {2: 16.0, 4: 1.0, 6: 0.1}, "b": {2: 0.4, 4: 0.3, 6: 0.2}},
        {"a": {"a.weight": 80}, "b": {"b.weight": 80}},
    )
    plan = allocate_bits(table, average_bits=4)
    assert plan.clusters["a"].bits == 6 and plan.clusters["b"].bits == 2
    # Uniform 4 bits: 1.3. The plan: 0.1 + 0.4.
    assert planned_gain_db(table, plan) == pytest.approx(4.1497, abs=1e-4)
    between = allocate_bits(table, average_bits=3)
    assert between.average_bits == 3
    # Uniform 3 bits: between 16.4 and 1.3; the plan: 1 + 0.4.
    uniform = (16.4 * 1.3) ** 0.5
    gain = planned_gain_db(table, between)
    assert 10 ** (gain / 10) == pytest.approx(uniform / 1.4)


def test_no_gain_in_decibels_of_scores_at_or_below_zero():
    table = ScoreTable(
        {"a": {2: -1.0, 4: 0.5}}, {"a": {"a.weight": 8}}, signed=True
    )
    assert planned_gain_db(table, uniform_plan(table, 2)) is None
    assert planned_gain_db(table, uniform_plan(table, 4)) is None


def test_bad_plans(parallel):
    network, *data = parallel
    table = ScoreTable({"a": {2: 1.0}}, {"a": {"a.weight": 8}}, method="other")
    plan = uniform_plan(table, 2)
    with pytest.raises(ValueError, match=r"\[3\] bits, which were not scored"):
        predicted_score(table, uniform_plan(table, 3))
    other = ScoreTable({"b": {2: 1.0}}, {"b": {"b.weight": 8}})
    with pytest.raises(ValueError, match="only: .'a', 'b'"):
        predicted_score(other, plan)
    with pytest.raises(ValueError, match="'other'.*same kind"):
        predicted_and_measured(
            KLScores(), network, data[0], table=table, plans={"one": plan}
        )


@pytest.fixture
def scored():
    """A network whose two layers matter very differently, and its scores."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv1d(8, 8, 1, bias=False),
        torch.nn.Conv1d(8, 8, 1, bias=False),
    )
    network[0].weight.data[:, 1:] *= 0.01
    data = torch.randn(4, 8, 20), torch.ones(4, 8, 20)
    scorer = MaskErrorScores((2, 3, 4, 8))
    return scorer, network, data, scorer(network, *data, progress=False)


def test_ceiling_bounds_what_the_plan_wins(scored, tmp_path):
    table = scored[-1]
    plan = allocate_bits(table, average_bits=4)
    foreseen = write_expected_gain(tmp_path, table, plan, bits=4, min_bits=2)
    assert json.loads((tmp_path / "ceiling.json").read_text()) == foreseen
    assert 0 <= foreseen["limited_db"] <= foreseen["am_gm_db"] + 1e-9


def test_predicted_curve_falls_with_the_bytes(scored, tmp_path):
    table = scored[-1]
    plan = allocate_bits(table, average_bits=3)
    write_expected_gain(tmp_path, table, plan, bits=3, min_bits=2)
    curve = json.loads((tmp_path / "pareto.json").read_text())
    points = curve["points"]
    assert [p["bytes"] for p in points] == sorted(p["bytes"] for p in points)
    scores = [p["score"] for p in points]
    assert scores == sorted(scores, reverse=True)
    assert curve["chosen"]["bytes"] == plan.bytes


def test_additivity_has_the_chosen_and_the_uniform_plans(scored, tmp_path):
    scorer, network, data, table = scored
    plan = allocate_bits(table, average_bits=4)
    where = {"include": ["*"], "exclude": [], "prefix": ""}
    write_additivity(tmp_path, table, plan, scorer, network, data, **where)
    rows = json.loads((tmp_path / "additivity.json").read_text())
    assert [row["plan"] for row in rows] == [
        *("chosen", "uniform 2", "uniform 3", "uniform 4", "uniform 8"),
    ]
    fine = rows[-1]  # small damages add up
    assert fine["measured"] == pytest.approx(fine["predicted"], rel=0.2)
