"""Hessian traces from differences of first gradients."""

import torch

from speechbrain_mpq.allocation.differences import difference_traces


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
