"""Squared gradients of training: the formula, the hooks, bad input."""

import copy

import pytest
import torch
import torch.nn as nn

from speechbrain_mpq.allocation.fisher import (
    SquaredGradients,
    second_order_increase,
)
from speechbrain_mpq.quantization.fake_quant import LearnedStep
from speechbrain_mpq.quantization.quant_api import cluster_quantized, quantize_


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(3, 4, 3, padding=1), nn.PReLU(), nn.Conv1d(4, 2, 1)
    )


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 2, 3, 7, generator=generator)


def train(model, watched, inputs):
    for x in inputs:
        model.zero_grad()
        model(x).square().mean().backward()
        watched.end_step()


def test_damage_is_exact_for_a_quadratic_loss():
    torch.manual_seed(0)
    curvature, optimum = torch.rand(6), torch.randn(6)
    quantized = optimum.round()

    def loss(w):
        return (curvature * (w - optimum).square()).sum().item() / 2

    measured = second_order_increase(curvature, optimum, quantized)
    expected = loss(quantized) - loss(optimum)
    assert measured == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bits", [2, 8])
def test_means_are_the_squared_gradients_of_the_quantized_values(network, bits):
    """A plain model that holds the quantized values has the same gradients."""
    quantize_(network, bits, estimator=LearnedStep)
    plain = nn.Sequential(
        nn.Conv1d(3, 4, 3, padding=1), nn.PReLU(), nn.Conv1d(4, 2, 1)
    )
    with torch.no_grad():
        for layer, source in zip(plain, network):
            for name, parameter in layer.named_parameters():
                parameter.copy_(getattr(source, name))
    watched = SquaredGradients(network)
    train(network, watched, batches(4))
    expected = {name: 0.0 for name, _ in plain.named_parameters()}
    for x in batches(4):
        plain.zero_grad()
        plain(x).square().mean().backward()
        for name, parameter in plain.named_parameters():
            expected[name] = expected[name] + parameter.grad.square() / 4
    assert watched.mean().keys() == expected.keys()
    for name, squares in watched.mean().items():
        torch.testing.assert_close(squares, expected[name])


def test_table_is_the_sum_over_the_cluster_written_out(network):
    plain = copy.deepcopy(network)
    quantize_(network, 16)
    watched = SquaredGradients(network)
    train(network, watched, batches(3))
    table = watched.table((2, 4))
    assert table.method == "fisher" and table.details == {"steps": 3}
    assert table.tensors["0"] == {"0.weight": 36, "0.bias": 4}
    for cluster, row in table.scores.items():
        for bits, score in row.items():
            before = plain.get_submodule(cluster).state_dict()
            before = {name: value.clone() for name, value in before.items()}
            with cluster_quantized(plain, cluster, bits):
                after = plain.get_submodule(cluster).state_dict()
                expected = sum(
                    second_order_increase(
                        watched.mean()[f"{cluster}.{name}"],
                        before[name],
                        after[name],
                    )
                    for name in before
                )
            assert score == pytest.approx(expected)


def test_slices_and_other_tables_are_scored_as_they_are():
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    kind = {"codebook": "midrise", "granularity": "channel"}
    quantize_(layer, 8, rows=2, **kind)
    watched = SquaredGradients(layer)
    x = torch.randn(6)
    layer(x).square().sum().backward()
    watched.end_step()
    table = watched.table((1.6, 2))
    assert list(table.scores) == [".[0:2]", ".[2:4]", "."]
    assert table.codebook == "midrise" and table.scales[".[0:2]"] == 2
    rows = layer.parametrizations.weight.original.detach()[2:4]
    plain = nn.Linear(6, 2, bias=False)
    plain.weight.data.copy_(rows)
    quantize_(plain, 2, **kind)
    curvature = watched.mean()["weight[2:4]"]
    expected = second_order_increase(curvature, rows, plain.weight.detach())
    assert table.scores[".[2:4]"][2] == pytest.approx(expected)


def test_several_reads_in_a_step_add_up_before_they_are_squared():
    layer = nn.Linear(1, 1, bias=False)
    quantize_(layer, 8)
    watched = SquaredGradients(layer)
    (layer(torch.tensor([2.0])) + layer(torch.tensor([3.0]))).backward()
    watched.end_step()
    assert watched.mean()["weight"].item() == 25


def test_table_follows_the_weights_as_they_train():
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([[1.0, -1.0, 1.0, 1.0]]))
    quantize_(layer, 16)
    watched = SquaredGradients(layer)
    layer(torch.ones(4)).backward()
    watched.end_step()
    assert watched.table((2,)).scores["."][2] == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        layer.parametrizations.weight.original[0, 0] = 0.5
    assert watched.table((2,)).scores["."][2] > 0.01


def test_evaluation_is_not_watched_and_closing_ends_it(network):
    quantize_(network, 4)
    watched = SquaredGradients(network)
    with torch.no_grad():
        network(batches(1)[0])
    assert not watched.sums
    with pytest.raises(RuntimeError, match="train first"):
        watched.table((2, 4))
    train(network, watched, batches(1))
    before = watched.mean()
    watched.close()
    train(network, watched, batches(1))
    assert watched.sums.keys() == before.keys()
    assert torch.equal(watched.sums["2.weight"], before["2.weight"])


def test_nan_in_the_gradient_is_an_error(network):
    quantize_(network, 4)
    watched = SquaredGradients(network)
    train(network, watched, batches(1) * float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        watched.table((2, 4))
