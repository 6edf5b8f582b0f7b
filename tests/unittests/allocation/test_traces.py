"""Trace estimates by random probes, against exact traces of small matrices.

Hessian traces from differences of first gradients.
"""

import pytest
import torch

from speechbrain_mpq.allocation.traces import (
    BalancedProbes,
    block_traces,
    difference_traces,
    quadratic_forms,
)


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
