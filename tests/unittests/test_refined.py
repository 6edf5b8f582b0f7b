"""Scores around the plan they lead to, against the rounds done by hand."""

import pytest
import torch
import torch.nn as nn

from speechbrain_mpq.allocation.kl import KLScores
from speechbrain_mpq.allocation.refined import RefinedScores
from speechbrain_mpq.allocation.solver import allocate_bits

BITS = (2, 3, 4, 6)


@pytest.fixture
def network():
    """Eight layers in which errors pile up and pass one another."""
    torch.manual_seed(1)
    stages = []
    for _ in range(8):
        stages += [nn.Conv1d(6, 6, 3, padding=1, bias=False), nn.Tanh()]
        stages[-2].weight.data *= 3
    return nn.Sequential(*stages)


@pytest.fixture
def inputs():
    """[items, channels, frames]"""
    return torch.randn(4, 6, 30, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("average_bits", [2.5, 3])
def test_rounds_are_those_done_by_hand(network, inputs, average_bits):
    scores = KLScores(BITS)
    refined = RefinedScores(scores, average_bits, rounds=2)
    table = refined(network, inputs, progress=False)
    by_hand, given = [], None
    for _ in range(3):
        scores = KLScores(BITS, given=given)
        one = scores(network, inputs, progress=False)
        given = allocate_bits(one, average_bits=average_bits)
        by_hand.append((scores.measure(network, given, inputs), one))
    measured = [error for error, _ in by_hand]
    assert len(set(measured)) == 3  # every round has another plan
    assert table.details["measured_plans"] == measured
    best = measured.index(min(measured))
    assert table.details["round"] == best
    assert table.scores == by_hand[best][1].scores
    assert table.method == "bernoulli_kl"


def test_plan_of_the_table_is_never_worse_than_that_of_the_first(
    network, inputs
):
    scores = KLScores(BITS)
    for bits in (2.5, 3):
        refined = RefinedScores(scores, average_bits=bits, rounds=1)
        table = refined(network, inputs, progress=False)
        plan = allocate_bits(table, average_bits=bits)
        error = scores.measure(network, plan, inputs)
        assert error == min(table.details["measured_plans"])
    assert scores.given is None  # the user's own object is left alone


def test_a_plan_that_comes_back_ends_it(inputs):
    network = nn.Sequential(nn.Conv1d(6, 4, 1))
    refined = RefinedScores(KLScores(BITS), average_bits=3, rounds=9)
    table = refined(network, inputs, progress=False)
    assert len(table.details["measured_plans"]) == 1
    assert table.details["round"] == 0
    assert refined.needs == ("inputs",)


def test_bad_input(network, inputs):
    with pytest.raises(ValueError, match="at least 1 round"):
        RefinedScores(KLScores(), average_bits=3, rounds=0)
    with pytest.raises(ValueError, match="out of reach"):
        RefinedScores(KLScores(BITS), average_bits=7)(
            network, inputs, progress=False
        )
