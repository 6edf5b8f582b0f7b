"""Loss scores: the fast sweep against full passes."""

import copy

import pytest
import torch
import torch.nn as nn

from speechbrain_mpq.allocation.loss import LossScores
from speechbrain_mpq.allocation.solver import allocate_bits
from speechbrain_mpq.quantization.quantizer import cluster_quantized


@pytest.fixture
def network():
    """Four stages, left in training mode."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv1d(3, 4, 1), nn.PReLU(), nn.BatchNorm1d(4), nn.Conv1d(4, 2, 1)
    )
    network[2].running_mean.normal_()
    return network.train()


@pytest.fixture
def inputs():
    """[items, channels, frames]"""
    return torch.randn(7, 3, 9, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def loss():
    """Summed squared error in dB."""
    generator = torch.Generator().manual_seed(2)
    targets = torch.randn(7, 2, 9, generator=generator)

    def loss(output, items):
        noise = (output - targets[items]).square().sum((1, 2))
        return 10 * torch.log10(noise).sum()

    return loss


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_scores_are_those_of_full_passes(network, inputs, loss, chunk):
    scores = LossScores((2, 4), chunk=chunk)
    table = scores(network, inputs, loss, prefix="", progress=False)
    assert table.signed and table.method == "loss_increase"
    network = copy.deepcopy(network).eval()
    with torch.no_grad():
        before = loss(network(inputs), slice(7))
        for cluster, row in table.scores.items():
            for bits in (2, 4):
                with cluster_quantized(network, cluster, bits):
                    after = loss(network(inputs), slice(7))
                expected = (after - before).item() / 7
                assert row[bits] == pytest.approx(expected, abs=1e-5)
    assert list(table.scores) == ["0", "1", "2", "3"]


def test_quantization_that_helps_scores_below_zero(inputs):
    network = nn.Sequential(nn.Conv1d(3, 1, 1, bias=False))
    network[0].weight.data.copy_(torch.tensor([1.0, 0.1, 0.1])[:, None])

    def loss(output, items):  # the best weights are 1, 0 and 0
        return (output - inputs[items, :1]).square().sum()

    table = LossScores((2, 8))(network, inputs, loss, progress=False)
    row = table.scores["mask_net.0"]
    assert row[2] < -abs(row[8])
    assert table.details["items"] == 7
    # The solver gives spare bytes to bits that are not scored better.
    plan = allocate_bits(table, average_bits=8)
    assert plan.clusters["mask_net.0"].bits == 8


def test_plans_are_measured_in_the_unit_of_the_scores(network, inputs, loss):
    scores = LossScores((2, 4), given=4)
    table = scores(network, inputs, loss, prefix="", progress=False)
    measured = scores.measure(network, 4, inputs, loss, prefix="")
    assert table.details["given_score"] == pytest.approx(measured, abs=1e-5)
    for row in table.scores.values():  # at 4 bits all are
        assert row[4] == pytest.approx(measured, abs=1e-5)


def test_network_is_left_as_it_was(network, inputs, loss):
    state = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    LossScores((2,))(network, inputs, loss, progress=False)
    assert [module.training for module in network.modules()] == modes
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name])


def test_bad_input(network, inputs, loss):
    with pytest.raises(ValueError, match="candidate bits"):
        LossScores((2, 4.5))
    scores = LossScores((2,))
    with pytest.raises(ValueError, match="at least one item"):
        scores(network, inputs[:0], loss)
    with pytest.raises(ValueError, match="mask_net.0 at 2 bits is nan"):
        scores(network, inputs * float("nan"), loss, progress=False)
