"""Fake quantization of a weight: what estimators put in its place in training.

The float weight goes on being trained; whoever reads the weight sees its
quantized values. Bits, codebook and scale are buffers, or parameters where
they are trained: they travel through ordinary checkpoints.

``FakeQuantize`` keeps the fitted scale and is straight through.
``LearnedStep`` and ``LogStep`` train the scale with the gradients of learned
step size quantization (Esser et al., ICLR 2020), relative to the fitted one.
``LogStep`` trains its logarithm, so that what an ordinary optimizer does to a
parameter is right for it: weight decay pulls towards the fitted scale, no step
can make it negative, and one learning rate suits scales of any size.
"""

from functools import lru_cache

import numpy as np
import torch

from .codebook import (
    TERNARY_BITS,
    check_bits,
    check_codebook,
    dequantize,
    fit_scale,
    has_zero,
    largest_level,
    nearest_levels,
    rows_by_scale,
    table_bits,
)

# Of a weight's root mean square: a table that ends below it is replaced.
RESCALE_THRESHOLD = 0.5
_TINY = torch.finfo(torch.float32).tiny
_INFINITY = np.float32(np.inf)
# Found once: torch.ops looks for it at every call.
_HARDTANH_BACKWARD = torch.ops.aten.hardtanh_backward.default


class StraightThroughRounding(torch.autograd.Function):
    """Quantized values whose gradient is the weight's, unchanged.

    It is not cut where the table clips: a clipped weight must be able to come
    back, and the fitted scale clips few.
    """

    @staticmethod
    def forward(context, weight, quantized):
        """Passes the quantized values on."""
        return quantized.view_as(quantized)

    @staticmethod
    def backward(context, gradient):
        """Passes the gradient to the weight."""
        return gradient, None


class LearnedRounding(torch.autograd.Function):
    """The nearest table entries, with the gradients of learned steps.

    A weight inside the table follows its gradient, one beyond its ends none;
    the scale gets what rounding and clipping changed (Esser et al., ICLR
    2020). Little is computed and allocated, as this runs for every weight at
    every step, and nothing kept but what the module keeps anyway.

    Example
    -------
    >>> weight = torch.tensor([0.4, -0.1, 9.0], requires_grad=True)
    >>> log_scale = torch.tensor(0.5).log().requires_grad_()
    >>> table = log_scale.detach().exp(), 2, "midtread"
    >>> LearnedRounding.apply(weight, log_scale, *table).sum().backward()
    >>> weight.grad, log_scale.grad  # 0.5 x ((1 - 0.8) + (0 + 0.2) + 1)
    (tensor([1., 1., 0.]), tensor(0.7000))
    """

    @staticmethod
    def forward(context, weight, log_scale, alpha, bits, codebook):
        """Rounds to the table of scale alpha, whose logarithm is trained.

        Of ``log_scale`` only the gradient matters: it may lack a constant.
        """
        context.largest, zero = _table_ends(bits, codebook)
        largest = context.largest
        if zero:
            levels = _steps(weight, alpha).round_().clamp_(-largest, largest)
            # Adding turns -0 into 0, also where alpha is 0.
            levels = levels.mul_(alpha.to(levels)).add_(0.0)
        else:
            levels = nearest_levels(weight, bits, alpha, codebook)
            levels = levels.mul_(alpha.to(levels))
        quantized = levels.to(weight.dtype)
        context.save_for_backward(weight, quantized, alpha)
        return quantized

    @staticmethod
    def backward(context, gradient):
        """Gives the gradients of the weight and of the scale's logarithm."""
        weight, quantized, alpha = context.saved_tensors
        by_scale = None
        by_weight = _inside(gradient, weight, context.largest, alpha)
        if context.needs_input_grad[1]:
            # By the entry, less what follows the weight.
            by_scale = _products(gradient, quantized, alpha.shape)
            by_scale -= _products(by_weight, weight, alpha.shape)
            if by_scale.dtype != alpha.dtype:
                by_scale = by_scale.to(alpha)
        return by_weight, by_scale, None, None, None


def _inside(gradient, weight, largest, alpha):
    """A gradient, zero where the weight is beyond the ends of its table."""
    plain = weight.dtype == gradient.dtype == alpha.dtype == torch.float32
    if weight.is_cpu and plain and not alpha.dim():
        # In one go: several times as fast as a comparison and a choice. It
        # leaves out the ends, which belong to the table.
        end = np.float32(alpha.item() * largest)
        end = float(np.nextafter(end, _INFINITY))
        return _HARDTANH_BACKWARD(gradient, weight, -end, end)
    inside = weight.abs() <= largest * alpha
    return torch.where(inside, gradient, 0.0)


@lru_cache
def _table_ends(bits, codebook):
    """The largest level of a table, and whether it has a zero."""
    return largest_level(bits, codebook), has_zero(bits, codebook)


def _steps(weight, alpha):
    """A weight in units of alpha; a new tensor."""
    if weight.dtype == alpha.dtype == torch.float32:
        return weight / alpha.clamp_min(_TINY)
    # Half floats are too coarse to divide in.
    work = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return work / alpha.to(work).clamp_min(torch.finfo(work.dtype).tiny)


def _products(one, other, shape):
    """Sum of products for each scale."""
    if not one.dtype == other.dtype == torch.float32:
        one, other = one.float(), other.float()
    if not shape:
        if one.dim() != 1:
            one, other = one.reshape(-1), other.reshape(-1)
        return torch.dot(one, other)
    return (one * other).sum_to_size(shape)


class FakeQuantize(torch.nn.Module):
    """Rounds a weight to its codebook, with a straight-through gradient.

    Arguments
    ---------
    bits : int or float
        Bits of one value, 1 to 16, or 1.6.
    alpha : torch.Tensor or float
        Scale, broadcastable to the weight.
    codebook : str
        "midtread" or "midrise".

    Example
    -------
    >>> weight = torch.tensor([0.6, -0.1, 9.0], requires_grad=True)
    >>> quantized = FakeQuantize(2, 0.5)(weight)
    >>> quantized.detach()
    tensor([0.5000, 0.0000, 0.5000])
    >>> quantized.sum().backward()
    >>> weight.grad
    tensor([1., 1., 1.])
    >>> FakeQuantize(2, 0.25, "midrise")(weight).detach()
    tensor([ 0.7500, -0.2500,  0.7500])
    """

    keeps_scale = True  # training leaves the scale as it was fitted

    def __init__(self, bits, alpha, codebook="midtread"):
        super().__init__()
        alpha = torch.as_tensor(alpha, dtype=torch.float32)
        ternary = torch.tensor(check_bits(bits) == TERNARY_BITS)
        bits = torch.tensor(table_bits(bits), dtype=torch.int32)
        midrise = torch.tensor(check_codebook(codebook) == "midrise")
        entropy = torch.tensor(codebook == "entropy")
        self.register_buffer("bits", bits.to(alpha.device))
        self.register_buffer("ternary", ternary.to(alpha.device))
        self.register_buffer("midrise", midrise.to(alpha.device))
        self.register_buffer("entropy", entropy.to(alpha.device))
        self.register_buffer("alpha", alpha.detach().clone())

    @property
    def stored_bits(self):
        """Bits that a value takes in a file: ``bits``, or 1.6."""
        return TERNARY_BITS if self.ternary else int(self.bits)

    @property
    def codebook(self):
        """Kind of the quantization table."""
        if self.entropy:
            return "entropy"
        return "midrise" if self.midrise else "midtread"

    def levels(self, weight):
        """The weight's nearest levels in the table, in units of alpha.

        Arguments
        ---------
        weight : torch.Tensor
            Float weight of any shape.

        Returns
        -------
        torch.Tensor
            Whole numbers as floats.
        """
        bits, alpha = self.stored_bits, self.alpha
        return nearest_levels(weight, bits, alpha, self.codebook)

    def forward(self, weight):
        """The quantized weight of a float one, of any and the same shape."""
        with torch.no_grad():
            levels = self.levels(weight)
            quantized = dequantize(levels, self.alpha, weight.dtype)
        if not (weight.requires_grad and torch.is_grad_enabled()):
            return quantized
        return StraightThroughRounding.apply(weight, quantized)

    def right_inverse(self, weight):
        """What ``module.weight = value`` stores: the float value itself."""
        return weight

    def set_scale(self, alpha):
        """Starts again from a newly fitted scale."""
        self.alpha.copy_(alpha)

    def set_codebook(self, codebook):
        """Takes the values from another kind of table from now on."""
        self.midrise.fill_(check_codebook(codebook) == "midrise")
        self.entropy.fill_(codebook == "entropy")
        if self.entropy and not self.keeps_scale:
            raise ValueError(
                f"{type(self).__name__} trains scales, and those of the "
                "entropy codebook set what a weight costs: use StraightThrough "
                "or PostTraining with it"
            )

    def extra_repr(self):
        """Shown by ``print(model)``."""
        return (
            f"bits={self.stored_bits}, scales={self.alpha.numel()}, "
            f"codebook={self.codebook}"
        )

    def refit(self, weight):
        """Fits the scale anew to a float weight.

        Arguments
        ---------
        weight : torch.Tensor
            Float values.
        """
        bits, codebook = self.stored_bits, self.codebook
        shape = tuple(self.alpha.shape)
        self.set_scale(fit_scale(weight, bits, codebook=codebook, shape=shape))

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        """Checkpoints from before there was a choice of tables have Eq. 7's."""
        for name in ("ternary", "midrise", "entropy"):
            state_dict.setdefault(prefix + name, torch.tensor(False))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


StraightThrough = FakeQuantize  # the name it has as an estimator


class LearnedStep(FakeQuantize):
    """Trains the scale with the weights, relative to the fitted one.

    Arguments are those of `FakeQuantize`.

    Example
    -------
    >>> weight = torch.tensor([0.4, -0.1, 9.0], requires_grad=True)
    >>> learned = LearnedStep(2, 0.5)
    >>> learned(weight).sum().backward()
    >>> weight.grad  # none where the table ends
    tensor([1., 1., 0.])
    >>> learned.stretch.grad  # 0.5 x ((1 - 0.8) + (0 + 0.2) + 1)
    tensor(0.7000)
    """

    keeps_scale = False

    def __init__(self, bits, alpha, codebook="midtread"):
        super().__init__(bits, alpha, codebook)
        fitted = self.alpha
        del self.alpha
        self.register_buffer("fitted", fitted)
        self.stretch = torch.nn.Parameter(torch.ones_like(fitted))

    @property
    def alpha(self):
        """The scale as it is now; never negative."""
        return self.fitted * self.stretch.abs()

    def set_scale(self, alpha):
        """Starts again from a newly fitted scale."""
        self.fitted.copy_(alpha)
        self.stretch.data.fill_(1)

    def forward(self, weight):
        """The quantized weight of a float one, of any and the same shape."""
        # The gradients of `LearnedRounding`, but with autograd's rounding, to
        # which published results go back.
        alpha = self.alpha
        with torch.no_grad():
            levels = self.levels(weight)
            quantized = dequantize(levels, alpha, weight.dtype)
            largest = largest_level(self.stored_bits, self.codebook)
        # Inside the table a weight follows its gradient and the scale gets
        # what rounding changed; beyond its ends the scale gets all of it.
        steps = weight / alpha.clamp_min(torch.finfo(alpha.dtype).tiny)
        inside = steps.clamp(-largest, largest)
        smooth = (inside + (levels - inside).detach()) * alpha
        return quantized + (smooth - smooth.detach()).to(weight.dtype)


class LogStep(FakeQuantize):
    """Trains the logarithm of the scale with the weights.

    A tensor that is all zero when its scale is fitted, as a bias before
    training, has no scale yet. It gets one as soon as it has values, and again
    whenever these have outgrown the table.

    Arguments are those of `FakeQuantize`.

    Example
    -------
    >>> weight = torch.tensor([0.4, -0.1, 9.0], requires_grad=True)
    >>> learned = LogStep(2, 0.5)
    >>> learned(weight).sum().backward()
    >>> weight.grad, learned.log_stretch.grad  # 0.5 x 1.4
    (tensor([1., 1., 0.]), tensor(0.7000))
    >>> bias = torch.zeros(2)
    >>> learned = LogStep(2, 0.0)
    >>> learned(bias).detach()
    tensor([0., 0.])
    >>> learned(bias + 0.3).detach()
    tensor([0.3000, 0.3000])
    """

    keeps_scale = False

    def __init__(self, bits, alpha, codebook="midtread"):
        super().__init__(bits, alpha, codebook)
        fitted = self.alpha
        del self.alpha
        self.register_buffer("fitted", fitted)
        self.register_buffer("late", torch.zeros((), dtype=torch.bool))
        self.log_stretch = torch.nn.Parameter(torch.zeros_like(fitted))
        self._note_late()
        self._known = {}

    @property
    def alpha(self):
        """The scale as it is now."""
        return self.fitted * self.log_stretch.exp()

    @property
    def stored_bits(self):
        """Bits that a value takes in a file."""
        return self._table()[0]

    @property
    def codebook(self):
        """Kind of the quantization table."""
        return self._table()[1]

    def set_scale(self, alpha):
        """Starts again from a newly fitted scale."""
        self.fitted.copy_(alpha)
        self.log_stretch.data.zero_()
        self._note_late()

    def set_codebook(self, codebook):
        """Takes the values from another kind of table from now on."""
        super().set_codebook(codebook)
        self._known = {}

    def forward(self, weight):
        """The quantized weight of a float one, of any and the same shape."""
        if self.is_uninitialized and self.training:
            self._fit_late(weight.detach())
        alpha = self.fitted * self.log_stretch.detach().exp()
        table = alpha, *self._table()
        return LearnedRounding.apply(weight, self.log_stretch, *table)

    def _table(self):
        """Bits and codebook, without asking the device at every step."""
        if not self._known:
            bits = FakeQuantize.stored_bits.fget(self)
            kind = FakeQuantize.codebook.fget(self)
            self._known = {"bits": bits, "codebook": kind}
        return self._known["bits"], self._known["codebook"]

    def _note_late(self):
        """Remember whether some values have no scale yet."""
        self.is_uninitialized = bool((self.fitted == 0).any())
        self.late.fill_(self.is_uninitialized)

    @torch.no_grad()
    def _fit_late(self, weight):
        """Fit the scales that a weight has outgrown."""
        bits, codebook = self._table()
        values = rows_by_scale(weight.float(), self.fitted.shape)
        rms = values.norm(dim=1) / values.shape[1] ** 0.5
        end = largest_level(bits, codebook) * self.alpha
        outgrown = end < RESCALE_THRESHOLD * rms.view(end.shape)
        if not outgrown.any():
            return
        shape = self.fitted.shape
        alpha = fit_scale(weight, bits, codebook=codebook, shape=shape)
        self.fitted.copy_(torch.where(outgrown, alpha, self.fitted))
        self.log_stretch.masked_fill_(outgrown, 0.0)

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        """What was known of the table may be another's."""
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._known = {}
        self.is_uninitialized = bool(self.late)
