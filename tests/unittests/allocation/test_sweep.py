"""Scores given other bits, against quantizing the whole network by hand."""

import copy
import time

import pytest
import torch
import torch.nn as nn

from speechbrain_mpq.allocation.output_scores import (
    KLScores,
    MaskErrorScores,
    bernoulli_kl,
    weighted_error,
)
from speechbrain_mpq.allocation.solver import allocate_bits
from speechbrain_mpq.quantization.plan import BitPlan
from speechbrain_mpq.quantization.quant_api import quantize_

BITS = (2, 4, 8)


@pytest.fixture
def network():
    """Four stages, one of two sublayers."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), nn.PReLU(6))
    inner[1].weight.data.uniform_()
    stages = nn.Conv1d(5, 6, 1), nn.ReLU(), inner, nn.Conv1d(6, 4, 1)
    return nn.Sequential(*stages).eval()


@pytest.fixture
def inputs():
    """[items, channels, frames]"""
    return torch.randn(5, 5, 9, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def weights():
    """[items, bins, frames]"""
    return torch.rand(5, 2, 9, generator=torch.Generator().manual_seed(2))


def output_at(network, inputs, plan_or_bits):
    """The output of a copy that `quantize_` has quantized."""
    quantized = copy.deepcopy(network)
    quantize_(quantized, plan_or_bits)
    with torch.no_grad():
        return quantized(inputs)


def bits_with(plan, cluster, bits):
    """The plan with one cluster at other bits."""
    changed = BitPlan.uniform({cluster: plan.clusters[cluster]}, bits).clusters
    return BitPlan(plan.clusters | changed, plan.rest_parameters)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_scores_given_a_plan_are_those_of_whole_plans(
    network, inputs, weights, granularity
):
    plain = MaskErrorScores(BITS, granularity=granularity)
    alone = plain(network, inputs, weights, progress=False)
    plan = allocate_bits(alone, average_bits=3)
    assert len({cluster.bits for cluster in plan.clusters.values()}) > 1
    scores = MaskErrorScores(BITS, granularity=granularity, chunk=2, given=plan)
    table = scores(network, inputs, weights, progress=False)
    reference = network(inputs).detach()
    energy = weighted_error(0 * reference, reference, weights)

    def witness(plan):
        quantized = copy.deepcopy(network)
        quantize_(quantized, plan, granularity=granularity)
        output = quantized(inputs).detach()
        return (weighted_error(reference, output, weights) / energy).item()

    for cluster in plan.clusters:
        for bits in BITS:
            expected = witness(bits_with(plan, cluster, bits))
            found = table.scores[cluster][bits]
            assert found == pytest.approx(expected, rel=1e-4)
    expected = pytest.approx(witness(plan), rel=1e-4)
    assert table.details["given_score"] == expected
    assert plain.measure(network, plan, inputs, weights) == expected


def test_slices_and_midrise_tables(network, inputs, weights):
    settings = {"codebook": "midrise", "rows": 3}
    scores = MaskErrorScores((1.6, 2, 3), **settings)
    table = scores(network, inputs, weights, progress=False)
    assert "0[0:3]" in table.scores and table.codebook == "midrise"
    plan = allocate_bits(table, average_bits=2.2, min_bits=1.6)
    given = MaskErrorScores((1.6, 2, 3), given=plan, **settings)
    around = given(network, inputs, weights, progress=False)
    reference = network(inputs).detach()
    energy = weighted_error(0 * reference, reference, weights)
    quantized = copy.deepcopy(network)
    quantize_(quantized, plan)
    output = quantized(inputs).detach()
    expected = (weighted_error(reference, output, weights) / energy).item()
    for name, cluster in plan.clusters.items():
        found = around.scores[name][cluster.bits]
        assert found == pytest.approx(expected, rel=1e-4)
    measured = scores.measure(network, plan, inputs, weights)
    assert measured == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="same codebook"):
        MaskErrorScores(rows=3).measure(network, plan, inputs, weights)


def test_given_bits_need_not_be_candidates(network, inputs):
    table = KLScores((2, 8), given=3)(network, inputs, progress=False)
    reference = network(inputs).detach()
    uniform = allocate_bits(
        KLScores((3,))(network, inputs, progress=False), average_bits=3
    )
    for name in uniform.clusters:
        output = output_at(network, inputs, bits_with(uniform, name, 8))
        expected = bernoulli_kl(reference, output).mean().item()
        assert table.scores[name][8] == pytest.approx(expected, rel=1e-4)
    given = bernoulli_kl(reference, output_at(network, inputs, 3)).mean().item()
    assert table.details["given_score"] == pytest.approx(given, rel=1e-4)
    measured = KLScores().measure(network, 3, inputs)
    assert measured == pytest.approx(given, rel=1e-4)


def test_clusters_that_a_plan_leaves_out_stay_in_full_precision(
    network, inputs
):
    alone = KLScores((2,))(network, inputs, progress=False)
    plan = allocate_bits(alone, average_bits=2)
    name = "2.0"
    only = BitPlan({name: plan.clusters[name]})
    table = KLScores((2,), given=only)(network, inputs, progress=False)
    score = pytest.approx(alone.scores[name][2], rel=1e-6)
    assert table.scores[name][2] == table.details["given_score"] == score
    assert "given_score" not in alone.details


def test_network_is_left_as_it_was(network, inputs, weights):
    network.train()
    state = copy.deepcopy(network.state_dict())
    scores = MaskErrorScores((2, 4), given=2)
    scores(network, inputs, weights, progress=False)
    scores.measure(network, 4, inputs, weights)
    with pytest.raises(ValueError, match="bins"):
        scores(network, inputs, torch.rand(5, 3, 9), progress=False)
    with pytest.raises(ValueError, match="bins"):
        scores.measure(network, 4, inputs, torch.rand(5, 3, 9))
    assert all(module.training for module in network.modules())
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name])


def test_stages_in_front_run_once_in_full_precision_and_once_given(
    network, inputs
):
    batches = []
    network[0].register_forward_hook(
        lambda module, given, output: batches.append(len(output))
    )
    KLScores((2, 4, 8), given=4)(network, inputs, progress=False)
    # Both twice, to tell how long it takes; its own cluster at 3 candidates.
    assert batches == [5] * (2 * 2 + 3)


def test_bad_given_bits(network, inputs):
    for bad in (2.5, 0, 17, "4", True):
        with pytest.raises(ValueError, match="bits"):
            KLScores(given=bad)
    other = nn.Sequential(nn.Conv1d(5, 4, 1))
    table = KLScores((2,))(other, inputs, prefix="mask_nets", progress=False)
    plan = allocate_bits(table, average_bits=2)
    for call in (
        lambda: KLScores(given=plan)(network, inputs, progress=False),
        lambda: KLScores().measure(network, plan, inputs),
    ):
        with pytest.raises(ValueError, match=r"mask_nets\.0.*near misses"):
            call()
    with pytest.raises(ValueError, match="at least one item"):
        KLScores().measure(network, 2, inputs[:0])


def test_time_is_told_before_it_begins(network, inputs, caplog):
    """By passes of the first chunk, and its cheapest cluster."""
    passes = []
    network[-1].register_forward_hook(lambda *_: passes.append(1))
    scores = KLScores((2, 4, 8), chunk=1)
    seconds = scores.expected_seconds(network, inputs)
    assert seconds > 0
    # The last stage at three candidates, and again to see how long it takes.
    assert len(passes) == 2 + 3 + 3
    with caplog.at_level("INFO"):
        scores(network, inputs, progress=False)
    assert "Scoring" in caplog.text and "candidates on 5 items" in caplog.text


def test_slow_layers_are_what_takes_time(inputs):
    class Slow(nn.Conv1d):
        def forward(self, x):
            time.sleep(0.02)
            return super().forward(x)

    network = nn.Sequential(nn.Conv1d(5, 4, 1), Slow(4, 4, 1))
    # Each chunk once, and two clusters at two candidates: the slow layer runs
    # twice for its own, and once for what is before it.
    seconds = KLScores((2, 4), chunk=5).expected_seconds(network, inputs)
    assert seconds > 0.02 * (1 + 2 + 1)
