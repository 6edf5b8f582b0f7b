"""Super-network of TDNN-F: one-hot choices are networks of their own."""

import itertools
from pathlib import Path

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

from speechbrain_mpq.lobes.models.tdnnf import TDNNF, orthogonality_error
from speechbrain_mpq.lobes.models.tdnnf_supernet import (
    choose,
    layer_parameters,
    mix,
    parameter_costs,
    supernet_,
    uniform_bottleneck,
)

CANDIDATES = [2, 4, 6, 9]
CHOICE = [0, 3, 1, 2, 1]
STRIDES = [1, 1, 0, 3, 3]


def small(bottlenecks, **options):
    options = {"size": 24, "strides": STRIDES, "prefinal": 8} | options
    return TDNNF(5, 6, bottlenecks=bottlenecks, **options)


@pytest.fixture
def supernet():
    torch.manual_seed(0)
    model = supernet_(small([6] * 5), CANDIDATES)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    for head in (model.chain, model.xent):
        torch.nn.init.normal_(head.output.weight)
    return model


def derived(supernet, choice):
    """The network of a choice, by slices of the shared matrices."""
    bottlenecks = [CANDIDATES[index] for index in choice]
    state = supernet.state_dict()
    for i, n in enumerate(bottlenecks):
        linear = state[f"layers.{i}.linear.weight"]
        affine = state[f"layers.{i}.affine.weight"]
        state[f"layers.{i}.linear.weight"] = linear[:n]
        state[f"layers.{i}.affine.weight"] = affine[:, :n]
    model = small(bottlenecks)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("training", [False, True])
def test_one_hot_is_the_derived_network_bit_for_bit(supernet, training):
    model = derived(supernet, CHOICE).train(training)
    supernet.train(training)
    choose(supernet, CHOICE)
    feats = torch.randn(3, 31, 5)
    outputs = [net(feats, heads=True) for net in (supernet, model)]
    for mine, expected in zip(*outputs):
        assert torch.equal(mine, expected)
    for mine, _ in outputs:
        mine.square().sum().backward()
    for i, layer in enumerate(model.layers):
        n = CANDIDATES[CHOICE[i]]
        gradient = supernet.layers[i].affine.weight.grad
        assert torch.equal(gradient[:, :n], layer.affine.weight.grad)
        assert not gradient[:, n:].any()


def test_mixture_is_the_sum_over_candidates(supernet):
    """One layer against four layers with slices of its matrices."""
    layer = supernet.layers[1].eval()
    weights = torch.tensor([0.1, 0.4, 0.2, 0.3])
    x = torch.randn(2, 24, 20)
    expected = 0
    for index, weight in enumerate(weights):
        one = derived(supernet, [index] * 5).layers[1].eval()
        one.bypass = 0
        expected = expected + weight * one(x)
    expected = expected + layer.bypass * x[:, :, 1:-1]
    layer.mixture = lambda: weights
    torch.testing.assert_close(layer(x), expected)


def test_mixture_of_one_is_the_choice(supernet):
    supernet.eval()
    feats = torch.randn(2, 31, 5)
    choose(supernet, CHOICE)
    expected = supernet(feats)
    one_hot = torch.eye(len(CANDIDATES))
    mix(supernet, [one_hot[index].clone for index in CHOICE])
    torch.testing.assert_close(supernet(feats), expected)


def test_constraint_of_the_large_matrix_is_that_of_every_candidate(supernet):
    for _ in range(400):
        supernet.constrain()
    for layer, n in itertools.product(supernet.layers, CANDIDATES):
        assert orthogonality_error(layer.linear.weight[:n].flatten(1)) < 1e-3
    torch.nn.init.normal_(supernet.layers[0].linear.weight)
    error = orthogonality_error(supernet.layers[0].linear.weight.flatten(1))
    for _ in range(400):
        supernet.constrain()
    matrix = supernet.layers[0].linear.weight.flatten(1)
    assert orthogonality_error(matrix) < 1e-3 < error


def test_costs_are_those_of_built_networks(supernet):
    costs, others = parameter_costs(supernet)
    for choice in ([0] * 5, [3] * 5, CHOICE):
        network = small([CANDIDATES[i] for i in choice]).without_xent()
        counted = sum(p.numel() for p in network.parameters())
        assert others + sum(costs[range(5), choice]).item() == counted
    layers = small([4] * 5).layers
    for layer, stride in zip(layers, STRIDES):
        counted = sum(p.numel() for p in layer.parameters())
        assert counted == layer_parameters(24, 4, stride)


def test_costs_of_the_paper():
    """PipeGumbel of its table, by the indices of eight candidates."""
    path = "recipes/Switchboard/ASR/TDNNF/hparams/models/tdnnf.yaml"
    with open(Path(__file__).parents[3] / path, encoding="utf-8") as fin:
        model = load_hyperpyyaml(fin, {"bottlenecks": [160] * 14})["model"]
    supernet_(model, [25, 50, 80, 100, 120, 160, 200, 240])
    costs, others = parameter_costs(model)
    others += sum(p.numel() for p in model.xent.parameters())
    choice = [2, 3, 2, 0, 2, 2, 2, 1, 2, 1, 0, 3, 5, 5]
    assert others + costs[range(14), choice].sum() == 12_469_008
    assert others + costs[:, 5].sum() == 18_751_248


def test_uniform_network_of_the_same_size(supernet):
    costs, _ = parameter_costs(supernet)
    assert uniform_bottleneck(supernet, int(costs[:, 2].sum())) == 6
    assert uniform_bottleneck(supernet, int(costs[:, 2].sum()) + 3) == 6


@pytest.mark.parametrize(
    "candidates, message",
    [
        ([4, 2, 6], "whole numbers that increase"),
        ([4, 4], "whole numbers that increase"),
        ([4], "two bottlenecks or more"),
        ([], "two bottlenecks or more"),
        ([0, 4], "whole numbers"),
        ([2.5, 4], "whole numbers"),
        ([4, 30], "candidate 30 is more than the 24 dimensions"),
    ],
)
def test_candidates_that_are_none(candidates, message):
    with pytest.raises(ValueError, match=message):
        supernet_(small([4] * 5), candidates)
