"""Output scores: the formulas, and the fast sweep against full passes."""

import copy

import pytest
import torch
import torch.nn as nn
from torch.distributions import Bernoulli, kl_divergence

from speechbrain_mpq.allocation.kl import (
    KLScores,
    bernoulli_kl,
    one_sided_kl,
)
from speechbrain_mpq.allocation.mask_error import (
    MaskErrorScores,
    weighted_error,
)
from speechbrain_mpq.quantization.quantizer import cluster_quantized


class Block(nn.Module):
    """Two sublayers and a skip connection."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x):
        """Apply to [items, channels, frames]."""
        return x + self.norm(self.conv(x))


class Wrapped(nn.Module):
    """The same network as no chain."""

    def __init__(self, network):
        super().__init__()
        self.inner = network

    def forward(self, x):
        """Apply to [items, channels, frames]."""
        return self.inner(x)


@pytest.fixture
def network():
    """Five stages, one without weights, left in training mode."""
    torch.manual_seed(0)
    stages = {
        "conv_in": nn.Conv1d(5, 6, 1),
        "block_0": Block(6),
        "relu": nn.ReLU(),
        "block_1": Block(6),
        "conv_out": nn.Conv1d(6, 4, 1),
    }
    network = nn.Sequential()
    for name, stage in stages.items():
        network.add_module(name, stage)
    for block in (network.block_0, network.block_1):
        block.norm.running_mean.normal_()
        block.norm.running_var.uniform_(0.5, 2)
    return network.train()


@pytest.fixture
def inputs():
    """[items, channels, frames]"""
    return torch.randn(7, 5, 9, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def weights():
    """[items, bins, frames]"""
    return torch.rand(7, 2, 9, generator=torch.Generator().manual_seed(2))


def slow_outputs(network, inputs, clusters, candidates):
    """Full-precision output, and one for each cluster and candidate."""
    network = copy.deepcopy(network).eval()
    outputs = {}
    with torch.no_grad():
        reference = network(inputs)
        for cluster in clusters:
            for bits in candidates:
                with cluster_quantized(network, cluster, bits):
                    outputs[cluster, bits] = network(inputs)
    return reference, outputs


def test_bernoulli_kl_is_that_of_the_distributions():
    p, q = torch.randn(2, 1000, dtype=torch.float64) * 4
    expected = kl_divergence(Bernoulli(logits=p), Bernoulli(logits=q))
    torch.testing.assert_close(bernoulli_kl(p, q), expected)


def test_bernoulli_kl_of_small_changes_and_extremes():
    p = torch.randn(1000, dtype=torch.float64)
    # Second order: half the Fisher information times the change squared.
    expected = torch.sigmoid(p) * torch.sigmoid(-p) * 1e-5**2 / 2
    torch.testing.assert_close(
        bernoulli_kl(p, p + 1e-5), expected, rtol=1e-3, atol=1e-15
    )
    assert (bernoulli_kl(p, p) == 0).all()
    far = torch.tensor([-500.0, -500.0, 500.0, 0.0])
    other = torch.tensor([-500.0, 500.0, -500.0, 500.0])
    expected = torch.tensor(
        [0.0, 500.0, 500.0, 250.0 - torch.tensor(2.0).log()]
    )
    torch.testing.assert_close(
        bernoulli_kl(far, other), expected.double(), rtol=1e-6, atol=0
    )


def test_one_sided_kl_is_the_printed_sum_and_no_divergence():
    p, q = torch.randn(2, 1000, dtype=torch.float64)
    big_p, big_q = torch.sigmoid(p), torch.sigmoid(q)
    expected = big_p * torch.log(big_p / big_q)
    torch.testing.assert_close(one_sided_kl(p, q), expected)
    other = (1 - big_p) * torch.log((1 - big_p) / (1 - big_q))
    torch.testing.assert_close(expected + other, bernoulli_kl(p, q))
    assert (one_sided_kl(p, p + 1) < 0).all()


@pytest.mark.parametrize("form", ["bernoulli", "one_sided"])
def test_kl_scores_are_those_of_full_passes(network, inputs, form):
    function = {"bernoulli": bernoulli_kl, "one_sided": one_sided_kl}[form]
    table = KLScores((2, 4), form)(network, inputs, prefix="", progress=False)
    assert list(table.scores) == [
        "conv_in",
        "block_0.conv",
        "block_0.norm",
        "block_1.conv",
        "block_1.norm",
        "conv_out",
    ]
    reference, outputs = slow_outputs(network, inputs, table.scores, (2, 4))
    for (cluster, bits), output in outputs.items():
        expected = function(reference, output).mean().item()
        assert table.scores[cluster][bits] == pytest.approx(expected, rel=1e-4)
    assert table.details["items"] == 7 and table.details["seconds"] >= 0


def test_one_sided_scores_may_be_negative(inputs):
    network = nn.Sequential(nn.Conv1d(5, 1, 1, bias=False))
    network[0].weight.data.copy_(torch.tensor([1.0, 1, 1, 1, 9])[:, None])
    inputs = inputs.abs()
    inputs[:, -1] = 0  # at 2 bits, alpha is 9: all other weights become 0
    table = KLScores((2,), "one_sided")(network, -inputs, progress=False)
    assert table.signed and table.scores["mask_net.0"][2] < 0


def test_mask_error_scores_are_those_of_full_passes(network, inputs, weights):
    scores = MaskErrorScores((2, 8))
    table = scores(network, inputs, weights, prefix="", progress=False)
    reference, outputs = slow_outputs(network, inputs, table.scores, (2, 8))
    twice = torch.cat([weights, weights], 1)  # both groups of channels
    energy = (twice * reference**2).sum()
    for (cluster, bits), output in outputs.items():
        expected = (twice * (output - reference) ** 2).sum() / energy
        assert table.scores[cluster][bits] == pytest.approx(
            expected.item(), rel=1e-3
        )


def test_scores_do_not_depend_on_the_chunk(network, inputs, weights):
    for scores, more in (
        (KLScores, ()),
        (MaskErrorScores, (weights,)),
    ):
        one, three, all_items = (
            scores((2,), chunk=chunk)(network, inputs, *more, progress=False)
            for chunk in (1, 3, 100)
        )
        for cluster, row in all_items.scores.items():
            assert one.scores[cluster] == pytest.approx(row, rel=1e-4)
            assert three.scores[cluster] == pytest.approx(row, rel=1e-4)


def test_any_module_and_shared_stages_work_by_full_passes(network, inputs):
    chain = KLScores((2,))(network, inputs, progress=False)
    whole = KLScores((2,))(Wrapped(network), inputs, progress=False)
    for cluster, row in chain.scores.items():
        other = whole.scores[cluster.replace("mask_net.", "mask_net.inner.")]
        assert row == pytest.approx(other, rel=1e-4)
    block = network.block_0
    network = nn.Sequential(network.conv_in, block, nn.ReLU(), block)
    before = block.conv.weight.clone()
    table = KLScores((2,))(network, inputs, prefix="", progress=False)
    assert torch.equal(block.conv.weight, before)
    reference, outputs = slow_outputs(network, inputs, table.scores, (2,))
    for (cluster, bits), output in outputs.items():
        expected = bernoulli_kl(reference, output).mean().item()
        assert table.scores[cluster][bits] == pytest.approx(expected, rel=1e-4)


def test_stages_before_the_changed_one_are_not_run_again(network, inputs):
    batches = {name: [] for name, _ in network.named_children()}
    for name, stage in network.named_children():
        stage.register_forward_hook(
            lambda module, given, output, name=name: batches[name].append(
                len(output)
            )
        )
    KLScores((2, 4, 8))(network, inputs, progress=False)
    # Once in full precision; its own cluster at three candidates.
    assert batches["conv_in"] == [7] * 4
    # Five clusters lie before it, three candidates of each side by side.
    assert batches["conv_out"] == [7] + [21] * 5 + [7] * 3


def test_network_is_left_as_it_was(network, inputs):
    network.block_1.eval()
    state = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    KLScores((2, 4))(network, inputs, progress=False)
    with pytest.raises(ValueError):
        MaskErrorScores((2,))(network, inputs, torch.rand(7, 3, 9))
    assert [module.training for module in network.modules()] == modes
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name])
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


def test_table_counts_tensors_scales_and_the_rest(network, inputs):
    table = KLScores((2,))(
        network,
        inputs,
        include=["mask_net.*"],
        exclude=["*norm*", "*.conv_in.bias"],
        progress=False,
    )
    assert table.tensors["mask_net.conv_in"] == {"mask_net.conv_in.weight": 30}
    assert table.parameters["mask_net.conv_out"] == 28
    assert table.scales["mask_net.conv_out"] == 2
    assert table.rest_parameters == 6 + 2 * 12
    total = sum(p.numel() for p in network.parameters())
    assert sum(table.parameters.values()) + table.rest_parameters == total
    table = KLScores((2,), granularity="channel")(
        network, inputs, progress=False
    )
    assert table.scales["mask_net.conv_out"] == 4 + 1  # and the bias


def test_weighted_error_ignores_what_has_no_weight():
    reference, output = torch.zeros(1, 4, 3), torch.ones(1, 4, 3)
    output[:, :, 1] = 1e6
    weights = torch.ones(1, 2, 3)
    weights[:, :, 1] = 0
    assert weighted_error(reference, output, weights).item() == 8


def test_bad_input(network, inputs, weights):
    with pytest.raises(ValueError, match="form"):
        KLScores(form="two_sided")
    with pytest.raises(ValueError, match="candidate bits"):
        KLScores((2, 4.5))
    with pytest.raises(ValueError, match="at least one item"):
        KLScores((2,))(network, inputs[:0])
    with pytest.raises(ValueError, match="mask_nett"):
        KLScores((2,))(network, inputs, include=["mask_nett.*"])
    with pytest.raises(ValueError, match="mask_net.conv_in at 2 bits"):
        KLScores((2,))(network, inputs * float("nan"), progress=False)
    scores = MaskErrorScores((2,))
    with pytest.raises(ValueError, match="7 items"):
        scores(network, inputs, weights[:3], progress=False)
    with pytest.raises(ValueError, match="8 frames"):
        scores(network, inputs, weights[..., :8], progress=False)
    with pytest.raises(ValueError, match="3 bins"):
        scores(network, inputs, torch.rand(7, 3, 9), progress=False)
    with pytest.raises(ValueError, match="all zero"):
        scores(network, inputs, 0 * weights, progress=False)
    with pytest.raises(TypeError, match="one tensor, not tuple"):
        KLScores((2,))(nn.LSTM(9, 3), inputs, progress=False)
