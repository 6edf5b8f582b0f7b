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

import torch

from .codebook import (
    TERNARY_BITS,
    check_bits,
    check_codebook,
    fit_scale,
    largest_level,
    nearest_levels,
    rows_by_scale,
    table_bits,
)
from .rounding_functions import (
    LearnedRounding,
    StepRounding,
    StraightThroughRounding,
    nearest_values,
)

# Of a weight's root mean square: a table that ends below it is replaced.
RESCALE_THRESHOLD = 0.5


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
        self._known = ()

    @property
    def stored_bits(self):
        """Bits that a value takes in a file: ``bits``, or 1.6."""
        return self._table()[0]

    @property
    def codebook(self):
        """Kind of the quantization table."""
        return self._table()[1]

    def _table(self):
        """Bits and codebook, without asking the device at every step."""
        if not self._known:
            bits = TERNARY_BITS if self.ternary else int(self.bits)
            codebook = "midrise" if self.midrise else "midtread"
            self._known = bits, "entropy" if self.entropy else codebook
        return self._known

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
        bits, codebook = self._table()
        # Outside of the function: torch.compile gives wrong gradients else.
        with torch.no_grad():
            values = nearest_values(weight, bits, self.alpha, codebook)
        if not (weight.requires_grad and torch.is_grad_enabled()):
            return values
        return StraightThroughRounding.apply(weight, values)

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
        self._known = ()
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
        self._known = ()  # it may be another's table


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
        return StepRounding.apply(weight, self.alpha, *self._table())


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

    @property
    def alpha(self):
        """The scale as it is now."""
        return self.fitted * self.log_stretch.exp()

    def set_scale(self, alpha):
        """Starts again from a newly fitted scale."""
        self.fitted.copy_(alpha)
        self.log_stretch.data.zero_()
        self._note_late()

    def forward(self, weight):
        """The quantized weight of a float one, of any and the same shape."""
        if self.is_uninitialized and self.training:
            self._fit_late(weight.detach())
        alpha = self.fitted * self.log_stretch.detach().exp()
        table = alpha, *self._table()
        return LearnedRounding.apply(weight, self.log_stretch, *table)

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
        """Whether scales are missing is the checkpoint's."""
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self.is_uninitialized = bool(self.late)
