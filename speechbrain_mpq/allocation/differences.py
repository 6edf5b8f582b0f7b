"""Traces of the Hessian from differences of first gradients.

For losses that autograd cannot differentiate twice: CTC, and recurrent layers
in fused kernels. Two gradients on both sides of the weights make a product of
the Hessian with a probe:

    H z = (g(w + h z) - g(w - h z)) / 2 h + O(h^2)

Kinks, as of a ReLU, count with the curvature that they have over the step,
where a second derivative does not see them.
"""

from contextlib import contextmanager

import torch
from tqdm import tqdm

from .hutchinson import PILOTS, BalancedProbes

STEP = 0.01  # of a tensor's root mean square; a 4-bit table rounds by more
SMALLEST = 0.1  # of all weights' root mean square, for tensors of zeros


def difference_traces(
    losses, weights, probes, distribution="rademacher", seed=0, progress=False
):
    """Traces of the diagonal blocks of a sum's Hessian (Eq. 10).

    Arguments
    ---------
    losses : sequence of callable
        Each computes one summand, a scalar tensor, from the weights.
    weights : list of torch.Tensor
        They require gradients; each is a block. Their values come back.
    probes : int
        Probes of each summand; each costs two gradients.
    distribution : str
        "gaussian" or "rademacher".
    seed : int
        Of the probes.
    progress : bool
        Shows a progress bar.

    Returns
    -------
    estimates : torch.Tensor
        [probes, blocks], float64: independent draws around the traces.

    Example
    -------
    >>> x = torch.ones(3, requires_grad=True)
    >>> y = torch.ones(1, requires_grad=True)
    >>> losses = [lambda: (x**2).sum(), lambda: 5 * y.square().sum()]
    >>> difference_traces(losses, [x, y], 2).mean(0).round(decimals=3)
    tensor([ 6., 10.], dtype=torch.float64)
    """
    drawn = BalancedProbes([[w.shape] for w in weights], distribution, seed)
    lengths = _lengths(weights)
    totals = torch.zeros(probes, len(weights), dtype=torch.float64)

    def estimate(loss):
        step = STEP * (lengths / drawn.scales).min().item()
        probe = [z.to(w) for z, w in zip(drawn.draw(), weights)]
        return drawn.estimates(_forms(loss, weights, probe, step))

    steps = PILOTS + probes * len(losses)
    with tqdm(total=steps, desc="Hessian", disable=not progress) as bar:
        for index, loss in enumerate(losses):
            for _ in range(PILOTS if index == 0 else 0):
                estimate(loss)
                bar.update()
            for row in totals:
                row += estimate(loss)
                bar.update()
    return totals


def _lengths(weights):
    """What a step is relative to, [weights]: the root mean squares."""
    squares = [weight.detach().double().square() for weight in weights]
    total = sum(square.sum().item() for square in squares)
    count = sum(weight.numel() for weight in weights)
    least = max(SMALLEST * (total / count) ** 0.5, 1e-6)
    return torch.tensor([max(s.mean().item() ** 0.5, least) for s in squares])


def _forms(loss, weights, probe, step):
    """z'Hz of every weight's own part of the probe, [weights]."""
    ahead, behind = (
        _gradients_at(loss, weights, probe, side * step) for side in (1, -1)
    )
    return torch.stack(
        [
            (z.double() * (a.double() - b)).sum().cpu() / (2 * step)
            for z, a, b in zip(probe, ahead, behind)
        ]
    )


def _gradients_at(loss, weights, probe, step):
    """Gradients with the weights moved along the probe."""
    with _moved(weights, probe, step):
        return torch.autograd.grad(loss(), weights, materialize_grads=True)


@contextmanager
def _moved(weights, probe, step):
    """Weights moved along a probe; the old values come back bit-exact."""
    saved = [weight.detach().clone() for weight in weights]
    try:
        for weight, z in zip(weights, probe):
            weight.data.add_(z, alpha=step)
        yield
    finally:
        for weight, value in zip(weights, saved):
            weight.data.copy_(value)
