"""Architecture search: Eq. 11 by hand, a toy with a known answer, bad input."""

import math

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrize

from speechbrain_mpq.allocation.architecture_search import ArchitectureWeights
from speechbrain_mpq.allocation.nas import (
    NASScores,
    WeightedCandidates,
    size_penalty,
    super_network,
)
from speechbrain_mpq.allocation.scores import ScoreTable
from speechbrain_mpq.allocation.solver import allocate_bits
from speechbrain_mpq.lobes.models.tcn import ChannelAffine
from speechbrain_mpq.quantization.packing import save_packed
from speechbrain_mpq.quantization.quant_api import clusters, quantize_

LAYERS = {
    "conv": lambda: nn.Conv1d(4, 4, 1),
    "depthwise": lambda: nn.Conv1d(4, 4, 3, padding=2, dilation=2, groups=4),
    "prelu": lambda: nn.PReLU(),
    "prelu by channel": lambda: nn.PReLU(4),
    "affine": lambda: ChannelAffine(4),
    "batch norm": lambda: nn.BatchNorm1d(4).eval(),
}


def mixed(layer, versions, choice):
    """The layer as a mixture of other layers' parameters."""
    values = [dict(version.named_parameters()) for version in versions]
    for name in list(values[0]):
        mixture = WeightedCandidates([v[name] for v in values], choice)
        parametrize.register_parametrization(layer, name, mixture)
    return layer


@pytest.mark.parametrize("kind", LAYERS)
def test_mixing_weights_is_mixing_outputs(kind):
    torch.manual_seed(0)
    versions = [LAYERS[kind]() for _ in range(3)]
    for version in versions:
        for parameter in version.parameters():
            parameter.data.normal_()
    choice = ArchitectureWeights(3)
    choice.logits.data.normal_()
    x = torch.randn(2, 4, 9)
    shares = choice.weights().detach()
    expected = sum(a * version(x) for a, version in zip(shares, versions))
    output = mixed(LAYERS[kind](), versions, choice)(x)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_gradient_of_the_logits_is_that_of_finite_differences(temperature):
    torch.manual_seed(0)
    layers = [nn.Conv1d(2, 2, 1).double() for _ in range(3)]
    choice = ArchitectureWeights(3).double()
    choice.temperature.fill_(temperature)
    choice.draw(torch.Generator().manual_seed(0))
    choice.logits.data.normal_()
    layer = mixed(nn.Conv1d(2, 2, 1).double(), layers, choice)
    x = torch.randn(1, 2, 5, dtype=torch.float64)

    def loss():
        return layer(x).pow(3).sum()

    loss().backward()
    for i, slope in enumerate(choice.logits.grad):
        step = torch.zeros(3, dtype=torch.float64)
        step[i] = 1e-5
        choice.logits.data += step
        above = loss().item()
        choice.logits.data -= 2 * step
        below = loss().item()
        choice.logits.data += step
        assert slope.item() == pytest.approx((above - below) / 2e-5, rel=1e-6)


def test_all_is_frozen_but_the_choice_and_travels_through_a_checkpoint():
    torch.manual_seed(0)
    choice, other_choice = ArchitectureWeights(2), ArchitectureWeights(2)
    versions = [nn.PReLU(4), nn.PReLU(4)]
    versions[1].weight.data.normal_()
    layer = mixed(nn.PReLU(4), versions, choice)
    layer(torch.randn(2, 4, 3)).sum().backward()
    assert choice.logits.grad.any()
    assert layer.parametrizations.weight.original.grad is None
    choice.logits.data.copy_(torch.tensor([0.5, -2.0]))
    choice.draw(torch.Generator().manual_seed(1))
    other = mixed(nn.PReLU(4), [versions[0]] * 2, other_choice)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)


BITS = (2, 4, 8)


def make_network():
    """Three equal convolutions; the output hangs on the second above all."""
    torch.manual_seed(0)
    network = nn.Sequential()
    for name in ("first", "second", "third"):
        network.add_module(name, nn.Conv1d(8, 8, 1))
    for convolution in network:
        identity = torch.eye(8)[:, :, None]
        noise = torch.randn(8, 8, 1)
        convolution.weight.data.copy_(identity + 0.02 * noise)
        convolution.bias.data.zero_()
    network.second.weight.data += 0.5 * torch.randn(8, 8, 1)
    return network


@pytest.fixture
def prototypes(tmp_path):
    """Packed folders of the network at 2, 4 and 8 bits, biases left alone."""
    folders = {}
    for bits in BITS:
        model = make_network()
        quantize_(model, bits, exclude=["*.bias"])
        folders[bits] = save_packed(model, tmp_path / str(bits)).parent
    return folders


@pytest.fixture
def inputs():
    return torch.randn(12, 8, 6, generator=torch.Generator().manual_seed(1))


def distance(inputs):
    """Loss: the summed squared error against the float network, by item."""
    network = make_network()

    def loss(output, items):
        return (output - network(inputs[items])).square().mean((1, 2)).sum()

    return loss


def search(prototypes, inputs, **settings):
    settings = {"lr": 20.0, "beta": 0.05, "shares": "mean"} | settings
    return NASScores(BITS, **settings)(
        make_network(),
        inputs,
        distance(inputs),
        prototypes,
        exclude=["*.bias"],
        progress=False,
    )


def test_penalty_is_that_of_the_equation_written_out():
    torch.manual_seed(0)
    weights = torch.rand(5, 3).softmax(1)
    shares = torch.rand(5)
    expected = weighted = 0.0
    for cluster in range(5):
        for n, a in zip(BITS, weights[cluster].tolist()):
            expected += a * math.sqrt(n)
            weighted += shares[cluster].item() * a * math.sqrt(n)
    assert size_penalty(weights, BITS).item() == pytest.approx(expected)
    measured = size_penalty(weights, BITS, shares).item()
    assert measured == pytest.approx(weighted)


def test_one_step_is_gradient_descent_on_equation_11(prototypes, inputs):
    """Loss and penalty are differentiated together, numerically."""
    beta, lr = 0.3, 0.7
    table = search(
        prototypes, inputs, beta=beta, shares="sum", lr=lr, epochs=1, batch=12
    )
    float_network, loss = make_network(), distance(inputs)
    members = clusters(float_network, exclude=["*.bias"])
    values = []
    for bits in BITS:
        model = make_network()
        quantize_(model, bits, exclude=["*.bias"])
        values.append(
            {
                f"{name}.{key}": getattr(layer, key).detach()
                for name, layer in model.named_children()
                for key in ("weight", "bias")
            }
        )
    with super_network(float_network, members, values) as choices:

        def objective():
            with torch.no_grad():
                value = loss(float_network(inputs), slice(0, 12)) / 12
                a = torch.stack([choice.weights() for choice in choices])
                return (value + beta * size_penalty(a, BITS)).item()

        for (cluster, learned), choice in zip(
            table.details["weights"].items(), choices
        ):
            slopes = []
            for i in range(len(BITS)):
                choice.noise[i] = 0.05
                above = objective()
                choice.noise[i] = -0.05
                slopes.append((above - objective()) / 0.1)
                choice.noise[i] = 0
            expected = (-lr * torch.tensor(slopes)).softmax(0)
            assert learned == pytest.approx(expected.tolist(), abs=2e-3), (
                cluster
            )


@pytest.mark.parametrize("gumbel", [False, True])
def test_the_cluster_that_matters_gets_the_bits(prototypes, inputs, gumbel):
    table = search(prototypes, inputs, gumbel=gumbel, epochs=20, batch=4)
    assert table.method == ("gumbel_nas" if gumbel else "nas")
    plan = allocate_bits(table, average_bits=3)
    bits = {name: entry.bits for name, entry in plan.clusters.items()}
    assert bits["second"] > bits["first"]
    assert bits["second"] > bits["third"]
    assert plan.bytes <= 3 * (3 * 64 // 8 + 4) + 3 * 8 * 4  # biases in float
    history = table.details["history"]
    assert len(history) == 20
    assert history[-1]["entropy"] < history[0]["entropy"] <= math.log2(3)


def test_a_penalty_that_outweighs_the_loss_is_warned_of(
    prototypes, inputs, caplog
):
    search(prototypes, inputs, beta=0.0, epochs=1)
    assert "outweighs" not in caplog.text
    table = search(prototypes, inputs, beta=2.0, epochs=4, shares="sum")
    assert "outweighs" in caplog.text
    for cluster, weights in table.details["weights"].items():
        assert weights[0] > 0.9
        assert sum(weights) == pytest.approx(1)
        scores = [-math.log(weight) for weight in weights]
        assert list(table.scores[cluster].values()) == pytest.approx(scores)


def test_same_seed_same_table_and_it_is_saved(prototypes, inputs, tmp_path):
    first, second, other = (
        search(prototypes, inputs, gumbel=True, seed=seed, epochs=2, batch=4)
        for seed in (1, 1, 2)
    )
    assert first.scores == second.scores != other.scores
    first.save(tmp_path / "scores.json")
    assert ScoreTable.load(tmp_path / "scores.json").scores == first.scores


def test_network_is_left_as_it_was(prototypes, inputs):
    network = make_network().train()
    before = {n: p.clone() for n, p in network.named_parameters()}
    NASScores(BITS, epochs=1)(
        network,
        inputs,
        distance(inputs),
        prototypes,
        exclude=["*.bias"],
        progress=False,
    )
    assert network.training
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad and parameter.grad is None


def test_what_is_in_no_cluster_follows_its_module_or_is_the_mean():
    network = nn.Sequential(nn.Conv1d(1, 1, 1), nn.PReLU())
    members = {"0": ["0.weight"]}
    values = [
        {
            "0.weight": torch.full((1, 1, 1), x),
            "0.bias": torch.tensor([x]),
            "1.weight": torch.tensor([x]),
        }
        for x in (1.0, 2.0)
    ]
    with super_network(network, members, values) as (choice,):
        choice.noise[0] = math.log(3)  # a = (3/4, 1/4)
        assert network[0].bias.item() == pytest.approx(1.25)
        assert network[0].weight.item() == pytest.approx(1.25)
        assert network[1].weight.item() == 1.5
        assert not parametrize.is_parametrized(network[1])
        named = network.named_parameters()
        trained = [name for name, p in named if p.requires_grad]
        assert all(name.endswith("logits") for name in trained)


def test_bad_prototypes(prototypes, inputs, tmp_path):
    def refused(folders, network=None):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            NASScores(BITS, epochs=1)(
                network or make_network(),
                inputs,
                distance(inputs),
                folders,
                exclude=["*.bias"],
                progress=False,
            )
        return str(caught.value)

    for nothing in (None, {}):
        assert "prototypes of [2, 4, 8] bits" in refused(nothing)
    message = refused({**prototypes, 4: tmp_path / "nowhere"})
    assert "nowhere" in message and "--bits 4" in message
    message = refused({**prototypes, 4: prototypes[8]})
    assert "it has [8]" in message and str(prototypes[8]) in message
    other = make_network()
    other.third = nn.Conv1d(8, 9, 1)
    message = refused(prototypes, other)
    assert "another architecture" in message and "third.weight" in message
    assert str(prototypes[2]) in message
    deeper = make_network()
    deeper.add_module("fourth", nn.Conv1d(8, 8, 1))
    assert "fourth.weight is missing" in refused(prototypes, deeper)


def test_bad_settings(prototypes, inputs):
    with pytest.raises(ValueError, match="shares"):
        NASScores(shares="all")
    with pytest.raises(ValueError, match="temperature"):
        NASScores(temperature=(1.0, 0.0))
    with pytest.raises(ValueError, match="at least one item"):
        search(prototypes, inputs[:0])
    with pytest.raises(ValueError, match="finite"):
        search(prototypes, inputs * float("nan"))
