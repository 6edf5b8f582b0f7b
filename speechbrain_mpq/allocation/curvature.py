"""Curvature of a network's mean loss by each of its weights."""

from contextlib import contextmanager

import torch

from .chain import evaluating
from .differences import difference_traces
from .hutchinson import block_traces


def network_traces(
    network,
    inputs,
    loss,
    weights,
    probes,
    distribution="gaussian",
    seed=0,
    chunk=1,
    progress=False,
    differences=False,
):
    """Traces of the mean loss's Hessian, one for each tensor (Eq. 10).

    The network is in eval mode meanwhile: batch normalization has fixed
    statistics, and items do not depend on each other.

    Arguments
    ---------
    network : torch.nn.Module
        Left as it was found.
    inputs : torch.Tensor
        [items, ...]; chunks of it are moved to the network's device.
    loss : callable
        `loss(output, items)`: the summed loss of an output, a scalar that can
        be differentiated twice; `items` is the slice of the inputs.
    weights : list of torch.Tensor
        Parameters of the network; only they get probes.
    probes : int
        Probes of each chunk, 2 or more.
    distribution : str
        "gaussian" or "rademacher".
    seed : int
        Of the probes.
    chunk : int
        Items that share a probe.
    progress : bool
        Shows a progress bar.
    differences : bool
        From differences of first gradients, for losses that cannot be
        differentiated twice (see `difference_traces`).

    Returns
    -------
    estimates : torch.Tensor
        [probes, tensors], float64; see `block_traces`.

    Example
    -------
    >>> network = torch.nn.Conv1d(1, 1, 1)
    >>> def loss(output, items):
    ...     return output.square().sum() / 2
    >>> inputs = torch.tensor([1.0, 2.0, 3.0, 0.0]).view(2, 1, 2)
    >>> network_traces(  # (1 + 4 + 9 + 0) / 2 items and (1 + 1 + 1 + 1) / 2
    ...     network, inputs, loss, list(network.parameters()), 500
    ... ).mean(0).round()
    tensor([7., 2.], dtype=torch.float64)
    """
    if not len(inputs):
        raise ValueError("scoring needs at least one item of input")

    def summand(start):
        items = slice(start, min(start + chunk, len(inputs)))
        value = loss(network(inputs[items].to(weights[0].device)), items)
        _check_loss(value)
        return value / len(inputs)

    losses = [
        lambda start=start: summand(start)
        for start in range(0, len(inputs), chunk)
    ]
    with evaluating(network), _differentiable(network, weights):
        if differences:
            return difference_traces(
                losses, weights, probes, distribution, seed, progress
            )
        return block_traces(
            losses,
            [[weight] for weight in weights],
            probes,
            distribution,
            seed,
            progress,
        )


@contextmanager
def _differentiable(network, weights):
    """Gradients for these weights only; the old flags come back."""
    flags = [(weight, weight.requires_grad) for weight in network.parameters()]
    network.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for weight, flag in flags:
            weight.requires_grad_(flag)


def _check_loss(value):
    """Refuses what autograd would refuse less clearly."""
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise TypeError(
            "the loss must return one tensor of one value, the sum over its "
            f"items, not {value!r}"
        )
    if not value.requires_grad:
        raise ValueError(
            "the loss has no gradient by the network's weights: compute it "
            "from the output without detach() or torch.no_grad()"
        )
