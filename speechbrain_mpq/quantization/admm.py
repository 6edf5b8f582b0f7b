"""ADMM estimation of a quantized parameter, attached as a parametrization.

The float weight and its quantized copy are separate variables that training
draws together; `admm_steps` has the formulas, `brains.admm` the schedule.
"""

import torch

from .admm_steps import ROUNDS, codebook_step, dual_step
from .codebook import dequantize
from .fake_quant import FakeQuantize


class ADMM(FakeQuantize):
    """A float weight and its quantized copy, the parts of an ADMM problem.

    In training mode the weight is read in full precision, as the primal
    problem has it. In evaluation mode it is read quantized: as its projection
    f of T + lam once ADMM was started, rounded before.

    Arguments
    ---------
    bits : int
        Bits of one value, 1 to 16.
    alpha : torch.Tensor or float
        Scale to start from, broadcastable to the weight.
    rounds : int
        Most rounds of the codebook step.
    first_alpha : float or None
        Scale at which the first codebook step starts; 1 in the paper, from
        where it finds a good one with up to 3 bits only. None: the given one.

    Example
    -------
    >>> weight = torch.tensor([0.5, -0.75, 0.25])
    >>> admm = ADMM(2, 0.5)
    >>> admm.start(weight)
    >>> admm.train()(weight)
    tensor([ 0.5000, -0.7500,  0.2500])
    >>> admm.eval()(weight)
    tensor([ 0.6250, -0.6250,  0.0000])
    >>> admm.iterate(weight)
    >>> admm.dual
    tensor([-0.1250, -0.1250,  0.2500])
    """

    def __init__(self, bits, alpha, rounds=ROUNDS, first_alpha=None):
        super().__init__(bits, alpha)
        self.rounds = rounds
        self.first_alpha = first_alpha
        device = self.alpha.device
        self.register_buffer("started", torch.tensor(False, device=device))
        self._make_room(self.alpha)

    def _make_room(self, weight):
        """Buffers in the shape of a weight."""
        self.register_buffer("projection", torch.zeros_like(weight))
        self.register_buffer("dual", torch.zeros_like(weight))

    def right_inverse(self, weight):
        """What ``module.weight = value`` stores; ADMM has to start again."""
        self._make_room(weight.detach())
        self.started.fill_(False)
        return weight

    def set_scale(self, alpha):
        """Starts again from a newly fitted scale."""
        super().set_scale(alpha)
        self.started.fill_(False)

    def forward(self, weight):
        """The float weight in training mode, else the quantized one.

        Arguments
        ---------
        weight : torch.Tensor
            Float weight of any shape.

        Returns
        -------
        torch.Tensor
            Same shape and type.
        """
        if self.training:
            return weight
        return self.projection if self.started else super().forward(weight)

    def start(self, weight):
        """Begins with a codebook step and no dual variable.

        Arguments
        ---------
        weight : torch.Tensor
            Float weight T.
        """
        weight = weight.detach()
        if self.projection.shape != weight.shape:
            self._make_room(weight)
        if self.first_alpha is not None:
            self.alpha.fill_(self.first_alpha)
        self.dual.zero_()
        self._project(weight)
        self.started.fill_(True)

    def iterate(self, weight):
        """Codebook step, then dual step, for the float weight as it is now.

        Arguments
        ---------
        weight : torch.Tensor
            Float weight T.
        """
        weight = weight.detach()
        self._project(weight)
        self.dual.copy_(dual_step(self.dual, weight, self.projection))

    def _project(self, weight):
        """New scale and projection f of T + lam."""
        alpha, levels = codebook_step(
            weight + self.dual,
            self.stored_bits,
            self.alpha,
            self.rounds,
            self.codebook,
        )
        self.alpha.copy_(alpha)
        self.projection.copy_(dequantize(levels, self.alpha, weight.dtype))

    def finish(self, weight):
        """Replaces the float weight by its projection.

        From here on rounding gives, and packing stores, what was evaluated:
        levels of f are exact, those of T may be others until both agree.

        Arguments
        ---------
        weight : torch.nn.Parameter
            Float weight, overwritten.
        """
        if self.started:
            with torch.no_grad():
                weight.copy_(self.projection)
            self.dual.zero_()
            self.started.fill_(False)
