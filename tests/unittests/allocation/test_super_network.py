"""Mixtures of candidates: the identity of weights and outputs, gradients."""

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrize

from speechbrain_mpq.allocation.super_network import (
    BitChoice,
    WeightedCandidates,
)
from speechbrain_mpq.lobes.models.tcn import ChannelAffine

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
    choice = BitChoice(3)
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
    choice = BitChoice(3).double()
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


def test_draws_are_gumbel_and_stay_until_the_next():
    choice = BitChoice(2)
    choice.logits.data.copy_(torch.tensor([1.0, 0.0]))
    choice.temperature.fill_(0.01)  # nearly one-hot
    generator = torch.Generator().manual_seed(3)
    picked = []
    for _ in range(3000):
        choice.draw(generator)
        first = choice.weights()[0].item()
        assert choice.weights()[0].item() == first
        picked.append(first)
    # The Gumbel-max trick: candidate 0 wins with its softmax probability.
    assert sum(picked) / 3000 == pytest.approx(0.731, abs=0.03)


def test_all_is_frozen_but_the_choice_and_travels_through_a_checkpoint():
    torch.manual_seed(0)
    choice, other_choice = BitChoice(2), BitChoice(2)
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
