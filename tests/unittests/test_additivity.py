"""Predicted scores of plans against measured ones."""

import json

import pytest
import torch
import torch.nn as nn

from speechbrain_mpq.allocation.additivity import (
    planned_gain_db,
    predicted_and_measured,
    predicted_score,
    uniform_plan,
)
from speechbrain_mpq.allocation.kl import KLScores
from speechbrain_mpq.allocation.mask_error import MaskErrorScores
from speechbrain_mpq.allocation.scores import ScoreTable
from speechbrain_mpq.allocation.solver import allocate_bits

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
            {"mask_net.0": {3: 1, 8: 0}, "mask_net.2": {3: 0, 8: 0}},
            table.tensors,
        ),
        budget_bytes=given.bytes + 20,
    )
    assert one_changed.clusters["mask_net.0"].bits == 8
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


def test_bad_input(parallel):
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
