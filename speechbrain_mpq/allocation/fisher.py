"""Sensitivity from the gradients that training makes anyway.

To second order, quantizing weights w to q raises the loss by half the sum of
h (q - w)^2, where h is the diagonal of its Hessian. The mean squared gradient
E[g^2] of the mini-batches stands in for h, as in natural-gradient methods: it
is never negative, costs no further pass, and follows the model as it trains.
Its unit is not the loss's, which one table does not need.
"""

from functools import partial

import torch

from ..quantization.codebook import fit_scale
from ..quantization.plan import bit_plan
from ..quantization.tensors import named_tensors
from .scores import ScoreTable, check_candidates
from .sharing import process, share


def second_order_increase(curvature, weight, quantized):
    """Half the sum of h (q - w)^2."""
    error = (quantized - weight).double()
    return (curvature.double() * error.square()).sum().item() / 2


class SquaredGradients:
    """Mean squared gradients of all quantized tensors of a model in training.

    The gradient is that of the quantized value, so that weights beyond the
    end of a codebook count as well.

    Arguments
    ---------
    model : torch.nn.Module
        Quantized model; it is watched from now on.

    Example
    -------
    >>> from speechbrain_mpq import quantize_
    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[0.6, -0.2]]))
    >>> _ = quantize_(layer, 8)
    >>> gradients = SquaredGradients(layer)
    >>> for x in ([1.0, 0.0], [3.0, 2.0]):
    ...     layer(torch.tensor(x)).sum().backward()
    ...     gradients.end_step()
    >>> gradients.mean()
    {'weight': tensor([[5., 2.]])}
    >>> table = gradients.table((1, 8))  # 1 bit: (0.4, -0.4)
    >>> round(table.scores["."][1], 3)  # (5 + 2) x 0.2^2 / 2
    0.14
    """

    def __init__(self, model):
        self.model = model
        self.steps = 0
        self.sums = {}
        self._pending = {}
        self._tensors = {
            name: tensor
            for name, tensor in named_tensors(model).items()
            if tensor.fake_quantize
        }
        self._hooks = [
            tensor.fake_quantize.register_forward_hook(
                partial(self._watch, name)
            )
            for name, tensor in self._tensors.items()
        ]

    def _watch(self, name, quantizer, inputs, output):
        """Forward hook: ask for the gradient of the quantized value."""
        if output.requires_grad:
            output.register_hook(partial(self._add, name))

    def _add(self, name, gradient):
        """A module may read its weight several times in one step."""
        before = self._pending.get(name, 0)
        self._pending[name] = before + gradient.detach()

    def end_step(self):
        """Squares the gradient of the step that was just made."""
        for name, gradient in self._pending.items():
            self.sums[name] = self.sums.get(name, 0) + gradient.square()
        self._pending.clear()
        self.steps += 1

    def forget_overflow(self):
        """Drops what overflowed in a step that a gradient scaler skipped.

        To be called before ``end_step`` of the next one. Where the optimizer's
        own gradients are not finite either, there was no such step.
        """
        trained = [t.parameter.grad for t in self._tensors.values()]
        trained = [gradient for gradient in trained if gradient is not None]
        seen = self._pending.values()
        if not _all_finite(seen) and _all_finite(trained):
            self._pending.clear()

    def close(self):
        """Stops watching."""
        while self._hooks:
            self._hooks.pop().remove()

    def restart(self):
        """Forgets all steps, as after the model has changed much."""
        self.steps = 0
        self.sums = {}

    def mean(self):
        """E[g^2] by tensor name, over all steps and processes."""
        if not self.steps:
            raise RuntimeError("no step to take the mean of: train first")
        mean = {name: total / self.steps for name, total in self.sums.items()}
        _, count = process()
        if count > 1:
            for squares in mean.values():
                torch.distributed.all_reduce(squares)
                squares /= count
        return mean

    def table(self, candidate_bits):
        """Scores of all clusters, from the gradients seen so far."""
        candidate_bits = check_candidates(candidate_bits)
        squares = self.mean()
        unseen = sorted(set(self._tensors) - set(squares))
        if unseen:
            raise ValueError(
                f"{unseen[0]} and {len(unseen) - 1} more had no gradient in "
                f"{self.steps} steps: leave out what the loss does not reach, "
                "or decide after more steps"
            )
        plan = bit_plan(self.model)

        def damages(name):
            return [
                sum(
                    second_order_increase(
                        squares[tensor],
                        self._tensors[tensor].weight,
                        self._quantized(tensor, bits),
                    )
                    for tensor in plan.clusters[name].tensors
                )
                for bits in candidate_bits
            ]

        sizes = {
            name: {t: squares[t].numel() for t in cluster.tensors}
            for name, cluster in plan.clusters.items()
        }
        costs = {name: sum(row.values()) for name, row in sizes.items()}
        scores = {
            name: dict(zip(candidate_bits, row))
            for name, row in share(costs, damages).items()
        }
        return ScoreTable(
            scores,
            sizes,
            scales={name: c.scales for name, c in plan.clusters.items()},
            rest_parameters=plan.rest_parameters,
            method="fisher",
            details={"steps": self.steps},
            codebook=plan.codebook,
        )

    def _quantized(self, name, bits):
        """A weight at other bits than it has now."""
        tensor = self._tensors[name]
        with torch.no_grad():
            return fitted(tensor, bits)(tensor.weight)


def _all_finite(tensors):
    """Whether no tensor has NaN or infinity."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def fitted(tensor, bits):
    """A quantizer like a tensor's own at other bits, its scale fitted.

    Arguments
    ---------
    tensor : NamedTensor
        Quantized tensor; its weight is taken as it is now.
    bits : int or float
        Other bits.

    Returns
    -------
    quantizer : FakeQuantize
        Of the class, codebook and granularity of the tensor's own.

    Example
    -------
    >>> from speechbrain_mpq import quantize_
    >>> layer = torch.nn.PReLU(2)
    >>> _ = layer.weight.data.copy_(torch.tensor([0.3, -0.5]))
    >>> _ = quantize_(layer, 8)
    >>> fitted(named_tensors(layer)["weight"], 1).alpha.item()
    0.4000000059604645
    """
    own = tensor.fake_quantize
    shape = tuple(own.alpha.shape)
    alpha = fit_scale(tensor.weight, bits, codebook=own.codebook, shape=shape)
    quantizer = type(own)(bits, alpha)
    quantizer.set_codebook(own.codebook)
    return quantizer
