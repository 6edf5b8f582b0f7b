"""Scores without data: what they promise, and the plans that come of them."""

import statistics

import pytest
import torch
import torch.nn as nn

from speechbrain_mpq.allocation.baselines import (
    RandomScores,
    ReversedScores,
    SizeScores,
    StoredScores,
    WeightErrorScores,
    expected_noise,
)
from speechbrain_mpq.allocation.solver import allocate_bits
from speechbrain_mpq.quantization.quant_api import quantize_

BITS = (2, 3, 4, 6, 8)


@pytest.fixture
def network():
    """Forty clusters of 16 to 1600 parameters."""
    torch.manual_seed(0)
    convs = [
        nn.Conv1d(4, 4 * (1 + index % 20) ** 2 // 4, 1, bias=False)
        for index in range(40)
    ]
    return nn.Sequential(*convs)


def bits_of(plan):
    """Cluster -> bits."""
    return {name: cluster.bits for name, cluster in plan.clusters.items()}


def test_noise_falls_by_six_decibels_a_bit():
    noises = [expected_noise(7, 0.3, bits) for bits in (2, 3, 4)]
    assert noises[0] / noises[1] == noises[1] / noises[2] == 4
    assert noises[0] == pytest.approx(7 * 0.3 / 16)


def test_random_plans_have_equal_bytes_and_other_bits(network):
    tables = [RandomScores(BITS, seed)(network) for seed in (0, 0, 1)]
    plans = [allocate_bits(table, average_bits=4) for table in tables]
    assert tables[0] == tables[1]
    assert bits_of(plans[0]) != bits_of(plans[2])
    uniform = allocate_bits(tables[0], average_bits=4, candidate_bits=(4,))
    for plan in plans:
        assert uniform.bytes - 16 <= plan.bytes <= uniform.bytes


def test_random_bits_spread_as_told_and_ignore_the_size(network):
    ideal, sizes = [], []
    for seed in range(50):
        table = RandomScores((2,), seed, spread=0.7)(network)
        for name, row in table.scores.items():
            # The bits at which this cluster's damage is 1 a parameter.
            damage = torch.tensor(row[2] / table.parameters[name])
            ideal.append(2 + damage.log2().item() / 2)
            sizes.append(table.parameters[name])
    assert statistics.stdev(ideal) == pytest.approx(0.7, rel=0.05)
    assert abs(statistics.correlation(ideal, sizes)) < 0.05


@pytest.mark.parametrize("largest_first", [True, False])
def test_bits_follow_the_size(largest_first):
    # Four classes of clusters with 4096 parameters each class.
    sizes = [4096] + [1024] * 4 + [256] * 16 + [64] * 64
    network = nn.Sequential(*(nn.PReLU(size) for size in sizes))
    table = SizeScores(tuple(range(1, 9)), largest_first)(network)
    plan = allocate_bits(table, average_bits=4, min_bits=1)
    means = [
        statistics.mean(
            c.bits for c in plan.clusters.values() if c.parameters == size
        )
        for size in (64, 256, 1024, 4096)
    ]
    # Half a bit for each doubling: 2.5, 3.5, 4.5, 5.5, and whole bits only.
    expected = [2.5, 3.5, 4.5, 5.5]
    assert means == pytest.approx(
        expected if largest_first else expected[::-1], abs=0.5
    )


def test_weight_error_is_that_of_the_quantized_network(network):
    table = WeightErrorScores((2, 4))(network, prefix="", progress=False)
    share = WeightErrorScores((2, 4), normalized=True)(
        network, prefix="", progress=False
    )
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    quantize_(network, 2)
    for name in table.scores:
        weight = before[f"{name}.weight"]
        quantized = network.get_submodule(name).weight
        error = (quantized - weight).square().sum().item()
        energy = weight.square().sum().item()
        assert table.scores[name][2] == pytest.approx(error, rel=1e-4)
        assert share.scores[name][2] == pytest.approx(error / energy, rel=1e-4)


def test_tensors_of_a_cluster_count_together_and_by_channel():
    layer = nn.Linear(2, 2)
    layer.weight.data.copy_(torch.tensor([[1.0, 1.0], [8.0, 8.0]]))
    layer.bias.data.copy_(torch.tensor([1.0, 3.0]))
    network = nn.Sequential(layer)
    one = WeightErrorScores((2,))(network, progress=False)
    # The matrix becomes 0, 0, 8, 8, the bias 0, 3.
    assert one.scores == {"0": {2: 3.0}}
    each = WeightErrorScores((2,), granularity="channel")(
        network, progress=False
    )
    assert each.scores == {"0": {2: 1.0}}  # only the bias
    assert each.scales == {"0": 3}
    share = WeightErrorScores((2,), normalized=True)(network, progress=False)
    assert share.scores["0"][2] == pytest.approx(3 / (130 + 10))


def test_slices_are_clusters_of_their_own():
    network = nn.Sequential(nn.Conv1d(1, 2, 1, bias=False))
    network[0].weight.data.copy_(torch.tensor([[[1.0]], [[3.0]]]))
    scores = WeightErrorScores((2,), codebook="midrise", rows=1)
    table = scores(network, progress=False)
    assert table.tensors["0[1:2]"] == {"0.weight[1:2]": 1}
    assert table.scores["0[1:2]"][2] == pytest.approx(0, abs=1e-9)
    assert table.codebook == "midrise"
    whole = WeightErrorScores((2,))(network, progress=False)
    assert whole.scores["0"][2] == 1


def test_a_cluster_of_zeros_has_no_error():
    network = nn.Sequential(nn.Conv1d(2, 2, 1, bias=False))
    network[0].weight.data.zero_()
    for normalized in (True, False):
        table = WeightErrorScores((2, 4), normalized)(network, progress=False)
        assert table.scores == {"0": {2: 0.0, 4: 0.0}}


@pytest.mark.parametrize(
    "scores", [RandomScores, SizeScores, WeightErrorScores]
)
def test_same_call_as_other_scores(network, scores):
    scorer = scores((2, 4))
    assert scorer.needs == ()
    table = scorer(
        network,
        include=["*"],
        exclude=["0.*"],
        prefix="",
        progress=False,
    )
    assert len(table.scores) == 39 and table.candidate_bits == (2, 4)
    assert table.rest_parameters == network[0].weight.numel()
    assert table.method
    with pytest.raises(ValueError, match="candidate bits"):
        scores((2, 4.5))
    with pytest.raises(ValueError, match="net_mask"):
        scorer(network, include=["net_mask.*"], progress=False)


def test_reversed_scores_give_the_least_needy_the_most_bits(network):
    scores = RandomScores(BITS, seed=3)
    forward, backward = scores(network), ReversedScores(BITS, scores)(network)
    plans = [
        bits_of(allocate_bits(table, average_bits=4))
        for table in (forward, backward)
    ]
    rank = sorted(
        forward.scores,
        key=lambda n: forward.scores[n][2] / forward.parameters[n],
    )

    def mean_bits(plan, names):
        return statistics.fmean(plan[name] for name in names)

    least, most = rank[:10], rank[-10:]
    assert mean_bits(plans[0], least) < mean_bits(plans[0], most) - 1
    assert mean_bits(plans[1], least) > mean_bits(plans[1], most) + 1
    # Twice around is where it began.
    twice = ReversedScores(BITS, ReversedScores(BITS, scores))(network)
    for name, row in twice.scores.items():
        assert row == pytest.approx(forward.scores[name])


def test_stored_scores_give_the_same_plans_and_other_budgets(network, tmp_path):
    made = WeightErrorScores(BITS)(network, progress=False)
    made.save(tmp_path / "scores.json")
    stored = StoredScores(BITS, tmp_path / "scores.json")(network)
    assert stored == made
    few = StoredScores((2, 4), tmp_path / "scores.json")(network)
    assert few.candidate_bits == (2, 4)
    assert allocate_bits(few, average_bits=3) == allocate_bits(
        made, average_bits=3, candidate_bits=(2, 4)
    )
    dealt = ReversedScores(BITS, file=tmp_path / "scores.json")(network)
    again = ReversedScores(BITS, WeightErrorScores(BITS))(
        network, progress=False
    )
    assert dealt.scores == again.scores


def test_stored_scores_of_something_else_are_refused(network, tmp_path):
    path = tmp_path / "scores.json"
    with pytest.raises(ValueError, match="no file .*name the scores.json"):
        StoredScores(BITS, path)
    SizeScores(BITS)(network).save(path)
    with pytest.raises(ValueError, match="of another model or scheme"):
        StoredScores(BITS, path)(network[:3])
    with pytest.raises(ValueError, match="codebook midtread"):
        StoredScores(BITS, path, codebook="midrise")(network)
    with pytest.raises(ValueError, match=r"no scores at \[5\] bits"):
        StoredScores((2, 5), path)(network)
