"""Output scores: the formulas, and the fast sweep against full passes.

Loss scores: the fast sweep against full passes.

Scores around the plan they lead to, against the rounds done by hand.
"""

import copy

import pytest
import torch
import torch.nn as nn
from torch.distributions import Bernoulli, kl_divergence

from speechbrain_mpq.allocation.output_scores import (
    KLScores,
    LossScores,
    MaskErrorScores,
    RefinedScores,
    bernoulli_kl,
    one_sided_kl,
    weighted_error,
)
from speechbrain_mpq.allocation.solver import allocate_bits
from speechbrain_mpq.quantization.quant_api import cluster_quantized


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
    assert table.signed and table.scores["0"][2] < 0


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
        other = whole.scores[f"inner.{cluster}"]
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
    # In full precision, twice to tell how long all will take; its own cluster
    # at three candidates.
    assert batches["conv_in"] == [7] * (2 + 3)
    # Five clusters lie before it, three candidates of each side by side.
    # The cheapest, its own, is run twice as well.
    assert sorted(batches["conv_out"]) == [7] * (2 + 2 * 3) + [21] * 5


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
        include=["*"],
        exclude=["*norm*", "conv_in.bias"],
        progress=False,
    )
    assert table.tensors["conv_in"] == {"conv_in.weight": 30}
    assert table.parameters["conv_out"] == 28
    assert table.scales["conv_out"] == 2
    assert table.rest_parameters == 6 + 2 * 12
    total = sum(p.numel() for p in network.parameters())
    assert sum(table.parameters.values()) + table.rest_parameters == total
    table = KLScores((2,), granularity="channel")(
        network, inputs, progress=False
    )
    assert table.scales["conv_out"] == 4 + 1  # and the bias


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
    with pytest.raises(ValueError, match="conv_in at 2 bits"):
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


@pytest.fixture
def loss_network():
    """Four stages, left in training mode."""
    torch.manual_seed(0)
    loss_network = nn.Sequential(
        nn.Conv1d(3, 4, 1), nn.PReLU(), nn.BatchNorm1d(4), nn.Conv1d(4, 2, 1)
    )
    loss_network[2].running_mean.normal_()
    return loss_network.train()


@pytest.fixture
def loss_inputs():
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
def test_scores_are_those_of_full_passes(
    loss_network, loss_inputs, loss, chunk
):
    scores = LossScores((2, 4), chunk=chunk)
    table = scores(loss_network, loss_inputs, loss, prefix="", progress=False)
    assert table.signed and table.method == "loss_increase"
    loss_network = copy.deepcopy(loss_network).eval()
    with torch.no_grad():
        before = loss(loss_network(loss_inputs), slice(7))
        for cluster, row in table.scores.items():
            for bits in (2, 4):
                with cluster_quantized(loss_network, cluster, bits):
                    after = loss(loss_network(loss_inputs), slice(7))
                expected = (after - before).item() / 7
                assert row[bits] == pytest.approx(expected, abs=1e-5)
    assert list(table.scores) == ["0", "1", "2", "3"]


def test_quantization_that_helps_scores_below_zero(loss_inputs):
    loss_network = nn.Sequential(nn.Conv1d(3, 1, 1, bias=False))
    loss_network[0].weight.data.copy_(torch.tensor([1.0, 0.1, 0.1])[:, None])

    def loss(output, items):  # the best weights are 1, 0 and 0
        return (output - loss_inputs[items, :1]).square().sum()

    table = LossScores((2, 8))(loss_network, loss_inputs, loss, progress=False)
    row = table.scores["0"]
    assert row[2] < -abs(row[8])
    assert table.details["items"] == 7
    # The solver gives spare bytes to bits that are not scored better.
    plan = allocate_bits(table, average_bits=8)
    assert plan.clusters["0"].bits == 8


def test_plans_are_measured_in_the_unit_of_the_scores(
    loss_network, loss_inputs, loss
):
    scores = LossScores((2, 4), given=4)
    table = scores(loss_network, loss_inputs, loss, prefix="", progress=False)
    measured = scores.measure(loss_network, 4, loss_inputs, loss, prefix="")
    assert table.details["given_score"] == pytest.approx(measured, abs=1e-5)
    for row in table.scores.values():  # at 4 bits all are
        assert row[4] == pytest.approx(measured, abs=1e-5)


def test_network_is_left_as_it_was_by_the_loss(loss_network, loss_inputs, loss):
    state = copy.deepcopy(loss_network.state_dict())
    modes = [module.training for module in loss_network.modules()]
    LossScores((2,))(loss_network, loss_inputs, loss, progress=False)
    assert [module.training for module in loss_network.modules()] == modes
    for name, value in loss_network.state_dict().items():
        assert torch.equal(value, state[name])


def test_bad_loss(loss_network, loss_inputs, loss):
    with pytest.raises(ValueError, match="candidate bits"):
        LossScores((2, 4.5))
    scores = LossScores((2,))
    with pytest.raises(ValueError, match="at least one item"):
        scores(loss_network, loss_inputs[:0], loss)
    with pytest.raises(ValueError, match="0 at 2 bits is nan"):
        scores(loss_network, loss_inputs * float("nan"), loss, progress=False)


BITS = (2, 3, 4, 6)


@pytest.fixture
def refined_network():
    """Eight layers in which errors pile up and pass one another."""
    torch.manual_seed(1)
    stages = []
    for _ in range(8):
        stages += [nn.Conv1d(6, 6, 3, padding=1, bias=False), nn.Tanh()]
        stages[-2].weight.data *= 3
    return nn.Sequential(*stages)


@pytest.fixture
def refined_inputs():
    """[items, channels, frames]"""
    return torch.randn(4, 6, 30, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("average_bits", [2.5, 3])
def test_rounds_are_those_done_by_hand(
    refined_network, refined_inputs, average_bits
):
    scores = KLScores(BITS)
    refined = RefinedScores(scores, average_bits, rounds=2)
    table = refined(refined_network, refined_inputs, progress=False)
    by_hand, given = [], None
    for _ in range(3):
        scores = KLScores(BITS, given=given)
        one = scores(refined_network, refined_inputs, progress=False)
        given = allocate_bits(one, average_bits=average_bits)
        by_hand.append(
            (scores.measure(refined_network, given, refined_inputs), one)
        )
    measured = [error for error, _ in by_hand]
    assert len(set(measured)) == 3  # every round has another plan
    assert table.details["measured_plans"] == measured
    best = measured.index(min(measured))
    assert table.details["round"] == best
    assert table.scores == by_hand[best][1].scores
    assert table.method == "bernoulli_kl"


def test_plan_of_the_table_is_never_worse_than_that_of_the_first(
    refined_network, refined_inputs
):
    scores = KLScores(BITS)
    for bits in (2.5, 3):
        refined = RefinedScores(scores, average_bits=bits, rounds=1)
        table = refined(refined_network, refined_inputs, progress=False)
        plan = allocate_bits(table, average_bits=bits)
        error = scores.measure(refined_network, plan, refined_inputs)
        assert error == min(table.details["measured_plans"])
    assert scores.base_plan is None  # the user's own object is left alone


def test_a_plan_that_comes_back_ends_it(refined_inputs):
    refined_network = nn.Sequential(nn.Conv1d(6, 4, 1))
    refined = RefinedScores(KLScores(BITS), average_bits=3, rounds=9)
    table = refined(refined_network, refined_inputs, progress=False)
    assert len(table.details["measured_plans"]) == 1
    assert table.details["round"] == 0
    assert refined.needs == ("inputs",)


def test_bad_rounds(refined_network, refined_inputs):
    with pytest.raises(ValueError, match="at least 1 round"):
        RefinedScores(KLScores(), average_bits=3, rounds=0)
    with pytest.raises(ValueError, match="out of reach"):
        RefinedScores(KLScores(BITS), average_bits=7)(
            refined_network, refined_inputs, progress=False
        )
