"""ADMM estimation of a quantized weight, attached as a parametrization.

The float weight and its quantized copy are separate variables that training
draws together. Equations are those of Section IV of "Mixed precision low-bit
quantization of neural network language models for speech recognition" (TASLP
2021). T are the float weights, f their quantized copy, lam the scaled dual
variable and g the penalty of the augmented Lagrangian

    L(T, f, lam) = F(T) + g/2 ||T - f + lam||^2 - g/2 ||lam||^2

which is lowered in T by gradient steps on the task's loss F, in f by fitting
scale and codebook entries to T + lam, and raised in lam.
"""

import math
from collections import defaultdict

import torch

from .codebook import (
    dequantize,
    fit_scale,
    largest_level,
    nearest_levels,
    rows_by_scale,
)
from .fake_quant import FakeQuantize

ROUNDS = 20  # of the alternation between scale and codebook entries


def augmented_gradient(gradient, weight, projection, dual, penalty):
    """Gradient of the augmented Lagrangian: dF/dT + g (T - f + lam)."""
    return gradient + penalty * (weight - projection + dual)


def proximal_step(weight, projection, dual, penalty):
    """The x with the least ||x - T||^2 + g ||x - f + lam||^2.

    The penalty's share of a step, solved exactly: unlike a gradient step on
    it, it never goes beyond f - lam, however large the penalty.
    """
    share = penalty / (1 + penalty)
    return weight - share * (weight - projection + dual)


def codebook_step(target, bits, alpha, rounds=ROUNDS, codebook="midtread"):
    """Scale and levels with a small ||target - alpha V||, by alternation.

    In turn, every weight takes its nearest level V and the scale becomes
    <target, V> / <V, V>, until it stays. No round raises the error, but where
    it ends depends on the scale to start from; ``codebook.fit_scale`` looks
    for the best of all ends.
    """
    rows = rows_by_scale(target.detach().double(), alpha.shape)
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
    """The dual variable after its step: lam + T - f."""
    return dual + weight - projection


def relative_distance(tensors, others):
    """||x - y|| / ||x|| over all tensors together.

    Between float weights and projections it is the primal residual, which
    ADMM brings to zero.
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

    needs_parameter = True  # that it can replace by its projection

    keeps_scale = False

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
        """The float weight in training mode, else the quantized one."""
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
        self.reset(weight)
        self._project(weight.detach())

    def reset(self, weight):
        """Room for the parts of a weight, no dual variable, the first scale.

        Arguments
        ---------
        weight : torch.Tensor
            Float weight T.
        """
        if self.projection.shape != weight.shape:
            self._make_room(weight.detach())
        if self.first_alpha is not None:
            self.alpha.fill_(self.first_alpha)
        self.dual.zero_()
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
        self.set_projection(alpha, levels)

    def set_projection(self, alpha, levels):
        """Takes the result of a codebook step.

        Arguments
        ---------
        alpha : torch.Tensor
        levels : torch.Tensor
            In the shape of the weight.
        """
        self.alpha.copy_(alpha)
        projection = dequantize(levels, self.alpha, self.projection.dtype)
        self.projection.copy_(projection)

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


def start_with_one_table(estimators, weights):
    """Begins as `ADMM.start`, with one table for all tensors of equal bits.

    Arguments
    ---------
    estimators : list of ADMM
        With a single scale each.
    weights : list of torch.Tensor
        Float weights T.

    Example
    -------
    >>> weights = [torch.tensor([1.0, 1.0]), torch.tensor([-4.0])]
    >>> both = [ADMM(1, 1.0), ADMM(1, 4.0)]
    >>> start_with_one_table(both, weights)
    >>> [estimator.eval()(w) for estimator, w in zip(both, weights)]
    [tensor([2., 2.]), tensor([-2.])]
    """
    for estimator, weight in zip(estimators, weights, strict=True):
        estimator.reset(weight)
    for members in _by_table(estimators, weights):
        first, _ = members[0]
        if first.first_alpha is None:
            target = torch.cat([(w + e.dual).flatten() for e, w in members])
            bits, codebook = first.stored_bits, first.codebook
            alpha = fit_scale(target, bits, codebook=codebook)
            for estimator, _ in members:
                estimator.alpha.copy_(alpha)
    _project_together(estimators, weights)


def iterate_with_one_table(estimators, weights):
    """As `ADMM.iterate`, with one table for all tensors of equal bits.

    Arguments
    ---------
    estimators : list of ADMM
        That `start_with_one_table` began.
    weights : list of torch.Tensor
        Float weights T as they are now.
    """
    _project_together(estimators, weights)
    for estimator, weight in zip(estimators, weights, strict=True):
        dual = dual_step(estimator.dual, weight.detach(), estimator.projection)
        estimator.dual.copy_(dual)


def _by_table(estimators, weights):
    """Estimators and their weights, those together that share a table."""
    groups = defaultdict(list)
    for estimator, weight in zip(estimators, weights, strict=True):
        table = estimator.stored_bits, estimator.codebook
        groups[table].append((estimator, weight.detach()))
    return groups.values()


def _project_together(estimators, weights):
    """One codebook step for all tensors of each table."""
    for members in _by_table(estimators, weights):
        first, _ = members[0]
        targets = [(w + e.dual).flatten() for e, w in members]
        alpha, levels = codebook_step(
            torch.cat(targets),
            first.stored_bits,
            first.alpha,
            first.rounds,
            first.codebook,
        )
        parts = levels.split([len(target) for target in targets])
        for (estimator, weight), own in zip(members, parts):
            estimator.set_projection(alpha, own.view_as(weight))
