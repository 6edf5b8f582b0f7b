"""Hessian scores: traces against the exact Hessian of tiny nets."""

import copy
import logging

import pytest
import torch
import torch.nn as nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from speechbrain_mpq.allocation.hessian import (
    BalancedProbes,
    HessianScores,
    block_traces,
    difference_traces,
    quadratic_forms,
)
from speechbrain_mpq.quantization.quant_api import cluster_quantized, clusters


def test_quadratic_forms_are_those_of_the_blocks():
    torch.manual_seed(4)
    matrix = torch.randn(5, 5, dtype=torch.float64)
    matrix = matrix + matrix.T
    x = torch.randn(2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, dtype=torch.float64, requires_grad=True)
    both = torch.cat([x, y])
    gradients = torch.autograd.grad(
        both @ matrix @ both / 2, (x, y), create_graph=True
    )
    probe = torch.randn(5, dtype=torch.float64)
    products = probe * (matrix @ probe)
    torch.testing.assert_close(
        quadratic_forms(gradients, (x, y), probe.split([2, 3])),
        torch.stack([products[:2].sum(), products[2:].sum()]),
    )


def test_parameters_without_curvature_have_no_trace():
    x, unused, linear, bent = (
        torch.ones(2, requires_grad=True) for _ in range(4)
    )
    losses = [lambda: (2 * linear + 3 * bent**2).sum()]
    traces = block_traces(
        losses, [[x, unused], [linear], [bent]], 3, "rademacher", seed=0
    )
    assert traces.tolist() == 3 * [[0.0, 0.0, 12.0]]
    losses = [lambda: linear.sum()]
    assert not block_traces(losses, [[linear]], 2, "gaussian", seed=0).any()


def test_balanced_probes_keep_flat_blocks_out_of_the_noise():
    """Coupled blocks of very different curvature, as in a real network."""
    torch.manual_seed(5)
    size, steepness = 20, 1e3
    root = torch.randn(2 * size, 2 * size, dtype=torch.float64)
    root[:, :size] *= steepness**0.5
    matrix = root.T @ root
    flat = matrix[size:, size:].trace().item()
    steep_x, flat_x = (
        torch.zeros(size, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )

    def loss():
        both = torch.cat([steep_x, flat_x])
        return both @ matrix @ both / 2

    probes = 200
    estimates = block_traces(
        [loss], [[steep_x], [flat_x]], probes, "gaussian", seed=0
    )[:, 1]
    assert estimates.mean().item() == pytest.approx(
        flat, abs=4 * estimates.std().item() / probes**0.5
    )
    plain = torch.randn(probes, 2 * size, dtype=torch.float64)
    products = (plain * (plain @ matrix))[:, size:].sum(1)
    assert estimates.std() < 0.2 * products.std()


def test_balanced_probes_scale_whole_blocks():
    probes = BalancedProbes([[(2,), (1, 3)], [(4,)]], "rademacher", seed=0)
    traces = probes.estimates(torch.tensor([60.0, 4.0, -0.25]))
    assert traces.tolist() == [64.0, -0.25]
    parts = probes.draw()
    assert [part.shape for part in parts] == [(2,), (1, 3), (4,)]
    assert parts[0].abs().tolist() == 2 * [1 / 8]
    assert parts[1].abs().tolist() == [3 * [1 / 8]]
    assert parts[2].abs().tolist() == 4 * [2.0]
    forms = torch.tensor([1.0, 0.0, float("nan")])
    assert probes.estimates(forms)[0] == 64.0
    assert probes.scales.isfinite().all()


def problem():
    """Weights, and a smooth loss of them for each of three inputs."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(4, 3, generator=generator).requires_grad_()
    second = torch.randn(1, 4, generator=generator).requires_grad_()
    bias = torch.zeros(4, requires_grad=True)
    inputs = torch.randn(3, 3, generator=generator)

    def loss(x, first, second, bias):
        return (second @ torch.tanh(first @ x + bias) - 1).square().sum()

    return loss, [first, second, bias], inputs


def test_traces_are_those_of_the_exact_hessian():
    loss, weights, inputs = problem()
    exact = torch.zeros(3)
    for x in inputs:
        blocks = torch.autograd.functional.hessian(
            lambda *values, x=x: loss(x, *values), tuple(weights)
        )
        for index, weight in enumerate(weights):
            count = weight.numel()
            block = blocks[index][index].reshape(count, count)
            exact[index] += block.trace()
    estimates = difference_traces(
        [lambda x=x: loss(x, *weights) for x in inputs], weights, 400
    )
    error = estimates.std(0) / 20
    assert (error < 0.1 * exact.abs()).all()
    assert ((estimates.mean(0) - exact).abs() < 4 * error).all()


def test_weights_come_back_bit_exact():
    loss, weights, inputs = problem()
    before = [weight.detach().clone() for weight in weights]
    difference_traces([lambda: loss(inputs[0], *weights)], weights, 3)
    for weight, value in zip(weights, before):
        assert torch.equal(weight, value)
        assert weight.grad is None


def test_a_weight_that_the_loss_ignores_has_no_curvature():
    loss, weights, inputs = problem()
    idle = torch.ones(2, requires_grad=True)
    traces = difference_traces(
        [lambda: loss(inputs[0], *weights)], [*weights, idle], 2
    )
    assert traces[:, 3].abs().max() == 0


@pytest.fixture
def network():
    """Convolutions, PReLU and a norm in training mode, double precision."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv1d(2, 3, 3, padding=1),
        nn.PReLU(),
        nn.BatchNorm1d(3),
        nn.Conv1d(3, 3, 3, padding=1, groups=3, bias=False),
        nn.PReLU(),
        nn.Conv1d(3, 2, 1),
    ).double()
    network[2].running_mean.normal_()
    network[2].running_var.uniform_(0.5, 2)
    return network.train()


@pytest.fixture
def inputs():
    """[items, channels, frames]"""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 2, 9, generator=generator, dtype=torch.float64)


@pytest.fixture
def loss():
    """A summed loss with a logarithm; its items are not convex."""
    generator = torch.Generator().manual_seed(2)
    targets = torch.randn(6, 2, 9, generator=generator, dtype=torch.float64)

    def loss(output, items):
        noise = (output - targets[items]).square().sum((1, 2))
        return 10 * torch.log10(noise).sum()

    return loss


def exact_traces(network, inputs, loss):
    """Trace of each cluster's block of the mean loss's whole Hessian."""
    network = copy.deepcopy(network).eval()
    weights = dict(network.named_parameters())

    def mean_loss(*values):
        output = functional_call(network, dict(zip(weights, values)), inputs)
        return loss(output, slice(0, len(inputs))) / len(inputs)

    blocks = hessian(mean_loss, tuple(weights.values()))
    traces = {}
    for cluster, names in clusters(network).items():
        indices = [list(weights).index(name) for name in names]
        traces[cluster] = sum(
            blocks[i][i].reshape(2 * [weights[name].numel()]).trace().item()
            for i, name in zip(indices, names)
        )
    return traces


def squared_errors(network, cluster, bits):
    """||f(w) - w||^2 of each tensor of one cluster."""
    network = copy.deepcopy(network)
    names = clusters(network)[cluster]
    before = {n: network.get_parameter(n).detach().clone() for n in names}
    with cluster_quantized(network, cluster, bits):
        return {
            name: (network.get_parameter(name) - old).square().sum().item()
            for name, old in before.items()
        }


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("chunk, probes", [(1, 60), (4, 150), (100, 400)])
def test_traces_are_the_exact_ones(
    network, inputs, loss, distribution, chunk, probes
):
    scores = HessianScores(
        (2,), probes=probes, distribution=distribution, chunk=chunk
    )
    table = scores(network, inputs, loss, prefix="", progress=False)
    exact = exact_traces(network, inputs, loss)
    assert list(table.scores) == list(exact) == ["0", "1", "2", "3", "4", "5"]
    for cluster, row in table.details["traces"].items():
        error = row["standard_error"]
        assert abs(row["trace"] - exact[cluster]) < 4 * error
        assert error < 0.5 * abs(exact[cluster])


def test_a_diagonal_hessian_is_exact_with_rademacher_probes(network, inputs):
    scores = HessianScores(
        (2,), probes=2, trace="average", distribution="rademacher"
    )
    curvatures = {"0": 4.0, "1": 0.5, "2": 3e-6, "3": 1e6, "4": 1.0, "5": 7.0}
    members = clusters(network)

    def loss(output, items):
        squares = sum(
            curvature * network.get_parameter(name).square().sum() / 2
            for cluster, curvature in curvatures.items()
            for name in members[cluster]
        )
        return squares * len(output)

    table = scores(network, inputs, loss, prefix="", progress=False)
    for cluster, row in table.details["traces"].items():
        expected = curvatures[cluster] * table.parameters[cluster]
        assert row["trace"] == pytest.approx(expected, rel=1e-12)
        assert row["standard_error"] <= 1e-12 * expected
        assert table.scores[cluster][2] == pytest.approx(
            curvatures[cluster]
            * sum(squared_errors(network, cluster, 2).values())
        )


def test_score_is_trace_times_squared_error(network, inputs, loss):
    tables = {
        trace: HessianScores((2, 4), probes=5, trace=trace)(
            network, inputs, loss, prefix="", progress=False
        )
        for trace in ("average", "total")
    }
    total, average = tables["total"], tables["average"]
    assert total.details["traces"] == average.details["traces"]
    assert average.method == "average_hessian_trace"
    for cluster, row in total.details["traces"].items():
        tensors = total.tensors[cluster]
        own = {n: total.details["tensor_traces"][n] for n in tensors}
        assert row["trace"] == pytest.approx(
            sum(trace["trace"] for trace in own.values())
        )
        for bits in (2, 4):
            errors = squared_errors(network, cluster, bits)
            assert total.scores[cluster][bits] == pytest.approx(
                max(row.values()) * sum(errors.values())
            )
            assert average.scores[cluster][bits] == pytest.approx(
                sum(
                    max(own[name].values()) / length * errors[name]
                    for name, length in tensors.items()
                )
            )


def test_average_trace_is_twice_the_cost_of_noise(network, inputs, loss):
    """White noise n adds E[n'Hn] / 2 = (Tr(H) / parameters) E|n|^2 / 2."""
    network[1] = network[4] = nn.Tanh()  # a kink has no second derivative
    weight = network.eval()[0].weight
    network[0].bias = None
    average = exact_traces(network, inputs, loss)["0"] / weight.numel()

    @torch.no_grad()
    def rise(noise):
        weight.add_(noise)
        after = loss(network(inputs), slice(6)) / 6
        weight.sub_(noise)
        return after - before

    with torch.no_grad():
        before = loss(network(inputs), slice(6)) / 6
    torch.manual_seed(3)
    ratios = []
    for _ in range(300):
        noise = 1e-3 * torch.randn_like(weight)
        both = rise(noise) + rise(-noise)  # free of the gradient
        ratios.append(both / (1e-6 * weight.numel()))
    ratios = torch.stack(ratios)
    error = ratios.std().item() / 300**0.5
    assert ratios.mean().item() == pytest.approx(average, abs=4 * error)
    assert error < 0.2 * abs(average)


def test_the_seed_makes_the_scores(network, inputs, loss):
    def traces(**settings):
        torch.rand(1)  # the global random numbers have no part in it
        scores = HessianScores((2,), probes=3, **settings)
        return scores(network, inputs, loss, progress=False).details["traces"]

    assert traces(seed=1) == traces(seed=1)
    assert traces(seed=1) != traces(seed=2)


def test_noise_and_negative_curvature_are_not_free(network, inputs, caplog):
    scores = HessianScores((2,), probes=3, trace="average")
    with caplog.at_level(logging.INFO):
        table = scores(
            network,
            inputs,
            lambda output, _: -output.square().sum(),
            prefix="",
            progress=False,
        )
    traces = table.details["traces"]
    for name in ("3", "5"):  # before them the network is not linear
        assert traces[name]["trace"] < 0 < traces[name]["standard_error"]
        assert all(score > 0 for score in table.scores[name].values())
    (weight,) = table.tensors["3"]
    expected = table.details["tensor_traces"][weight]["standard_error"] / 9
    error = squared_errors(network, "3", 2)[weight]
    assert table.scores["3"][2] == pytest.approx(expected * error)
    assert "standard error" in caplog.text
    assert "More probes" in caplog.text


def test_only_selected_parameters_are_probed(network, inputs, loss):
    table = HessianScores((2,), probes=2)(
        network,
        inputs,
        loss,
        include=["*"],
        exclude=["2.*", "*.bias"],
        progress=False,
    )
    assert table.tensors["0"] == {"0.weight": 18}
    assert "2" not in table.scores
    assert table.rest_parameters == 6 + 3 + 2
    table = HessianScores((2,), probes=2, granularity="channel")(
        network, inputs, loss, progress=False
    )
    assert table.scales["0"] == 3 + 1  # and the bias


def test_network_is_left_as_it_was(network, inputs, loss):
    network[5].eval()
    network[0].weight.requires_grad_(False)
    state = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    with torch.no_grad():
        HessianScores((2, 4), probes=2)(network, inputs, loss, progress=False)
    with pytest.raises(TypeError):
        HessianScores((2,))(network, inputs, lambda *_: 0.0, progress=False)
    assert [module.training for module in network.modules()] == modes
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name])
    for name, weight in network.named_parameters():
        assert weight.requires_grad == (name != "0.weight")
        assert weight.grad is None


def test_bad_input(network, inputs, loss):
    with pytest.raises(ValueError, match="trace must be one of"):
        HessianScores(trace="mean")
    with pytest.raises(ValueError, match="distribution"):
        HessianScores(distribution="uniform")
    for probes in (1, 2.5, True):
        with pytest.raises(ValueError, match="standard error"):
            HessianScores(probes=probes)
    with pytest.raises(ValueError, match="candidate bits"):
        HessianScores((2, 4.5))
    scores = HessianScores((2,), probes=2)
    with pytest.raises(ValueError, match="at least one item"):
        scores(network, inputs[:0], loss)
    with pytest.raises(ValueError, match="mask_nett"):
        scores(network, inputs, loss, include=["mask_nett.*"])
    with pytest.raises(ValueError, match="without detach"):
        scores(network, inputs, lambda y, _: y.detach().sum(), progress=False)
    with pytest.raises(TypeError, match="one value"):
        scores(network, inputs, lambda y, _: y, progress=False)
    with pytest.raises(ValueError, match="0 at 2 bits is nan"):
        scores(network, inputs * float("nan"), loss, progress=False)
