"""The steps of ADMM estimation: primal, codebook and dual.

Equations are those of Section IV of "Mixed precision low-bit quantization of
neural network language models for speech recognition" (TASLP 2021). T are the
float weights, f their quantized copy, lam the scaled dual variable and g the
penalty of the augmented Lagrangian

    L(T, f, lam) = F(T) + g/2 ||T - f + lam||^2 - g/2 ||lam||^2

which is lowered in T by gradient steps on the task's loss F, in f by fitting
scale and codebook entries to T + lam, and raised in lam.

ADMM estimation of a quantized parameter, attached as a parametrization.

The float weight and its quantized copy are separate variables that training
draws together; `admm_steps` has the formulas, `brains.admm` the schedule.
"""

import math

import torch

from .codebook import dequantize, largest_level, nearest_levels
from .fake_quant import FakeQuantize

ROUNDS = 20  # of the alternation between scale and codebook entries


def augmented_gradient(gradient, weight, projection, dual, penalty):
    """Gradient of the augmented Lagrangian: dF/dT + g (T - f + lam).

    Arguments
    ---------
    gradient : torch.Tensor
        Gradient of the task's loss at the float weights.
    weight : torch.Tensor
        Float weights T.
    projection : torch.Tensor
        Quantized weights f.
    dual : torch.Tensor
        Scaled dual variable lam.
    penalty : float
        Weight g of the penalty.

    Returns
    -------
    torch.Tensor

    Example
    -------
    >>> gradient, weight = torch.tensor([1.0]), torch.tensor([0.75])
    >>> projection, dual = torch.tensor([0.5]), torch.tensor([-0.125])
    >>> augmented_gradient(gradient, weight, projection, dual, penalty=2.0)
    tensor([1.2500])
    """
    return gradient + penalty * (weight - projection + dual)


def proximal_step(weight, projection, dual, penalty):
    """The x with the least ||x - T||^2 + g ||x - f + lam||^2.

    The penalty's share of a step, solved exactly: unlike a gradient step on
    it, it never goes beyond f - lam, however large the penalty.

    Arguments
    ---------
    weight : torch.Tensor
        Float weights T after a step on the task's loss alone.
    projection : torch.Tensor
        Quantized weights f.
    dual : torch.Tensor
        Scaled dual variable lam.
    penalty : float
        Weight g of the penalty, relative to that of the step.

    Returns
    -------
    torch.Tensor

    Example
    -------
    >>> weight, zero = torch.tensor([0.75]), torch.zeros(1)
    >>> proximal_step(weight, torch.tensor([0.25]), zero, penalty=1.0)
    tensor([0.5000])
    >>> proximal_step(weight, torch.tensor([0.25]), zero, penalty=1e9)
    tensor([0.2500])
    """
    share = penalty / (1 + penalty)
    return weight - share * (weight - projection + dual)


def codebook_step(target, bits, alpha, rounds=ROUNDS, codebook="midtread"):
    """Scale and levels with a small ||target - alpha V||, by alternation.

    In turn, every weight takes its nearest level V and the scale becomes
    <target, V> / <V, V>, until it stays. No round raises the error, but where
    it ends depends on the scale to start from; ``codebook.fit_scale`` looks
    for the best of all ends.

    Arguments
    ---------
    target : torch.Tensor
        T + lam, of any shape.
    bits : int or float
        Bits of one value, 1 to 16, or 1.6.
    alpha : torch.Tensor
        Scale to start from, the last one or, as in the paper, 1. One, or one
        for each entry of the target's first dimension. It is lowered to the
        largest magnitude first, which no best scale exceeds: beyond twice
        that every level is 0, and the formula has no value.
    rounds : int
        Most rounds.
    codebook : str
        Kind of the table, "midtread" (Eq. 7) or "midrise".

    Returns
    -------
    alpha : torch.Tensor
        In the shape that it had; 0 for a target of zeros.
    levels : torch.Tensor
        Whole numbers in the target's shape, as floats.

    Example
    -------
    >>> target = torch.tensor([0.5, -1.0, 1.5])
    >>> codebook_step(target, 3, torch.tensor(0.25))
    (tensor(0.5000), tensor([ 1., -2.,  3.]))
    >>> codebook_step(target, 2, torch.tensor(1.0))
    (tensor(1.2500), tensor([ 0., -1.,  1.]))
    """
    rows = target.detach().double().reshape(max(alpha.numel(), 1), -1)
    peak = rows.abs().amax(1, keepdim=True)
    scale = alpha.detach().double().reshape(-1, 1)
    # A tensor that was all zero has scale 0 and may have left zero since.
    scale = torch.where(scale > 0, scale, peak / largest_level(bits, codebook))
    scale = torch.minimum(scale, peak)
    levels = None
    for _ in range(rounds):
        last, levels = levels, nearest_levels(rows, bits, scale, codebook)
        if last is not None and torch.equal(levels, last):
            break
        power = levels.square().sum(1, keepdim=True)
        cross = (rows * levels).sum(1, keepdim=True)
        scale = torch.where(power > 0, cross / power.clamp_min(1), scale)
    # Nearest for the stored scale and weights, whatever their types.
    alpha = scale.reshape(alpha.shape).to(alpha)
    return alpha, nearest_levels(target.detach(), bits, alpha, codebook)


def dual_step(dual, weight, projection):
    """The dual variable after its step: lam + T - f.

    Arguments
    ---------
    dual : torch.Tensor
        Scaled dual variable lam.
    weight : torch.Tensor
        Float weights T.
    projection : torch.Tensor
        Their quantized copy f, after its own step.

    Returns
    -------
    torch.Tensor

    Example
    -------
    >>> weight, projection = torch.tensor([0.75]), torch.tensor([0.5])
    >>> dual_step(torch.tensor([-0.125]), weight, projection)
    tensor([0.1250])
    """
    return dual + weight - projection


def relative_distance(tensors, others):
    """||x - y|| / ||x|| over all tensors together.

    Between float weights and projections it is the primal residual, which
    ADMM brings to zero.

    Arguments
    ---------
    tensors : iterable of torch.Tensor
        x, in parts.
    others : iterable of torch.Tensor
        y, in the same parts.

    Returns
    -------
    float
        0 where x is zero and y too, infinite where only x is.

    Example
    -------
    >>> weights = [torch.tensor([3.0]), torch.tensor([0.0, 4.0])]
    >>> relative_distance(weights, [torch.tensor([3.0]), torch.zeros(2)])
    0.8
    """
    distance = power = 0.0
    for x, y in zip(tensors, others, strict=True):
        distance += (x.detach() - y.detach()).double().square().sum().item()
        power += x.detach().double().square().sum().item()
    if power == 0:
        return math.inf if distance else 0.0
    return math.sqrt(distance / power)


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
