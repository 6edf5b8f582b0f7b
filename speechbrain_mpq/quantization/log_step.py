"""Fake quantization for trainings that know nothing of quantization.

Its scale is trained as a logarithm, so that what an ordinary optimizer does
to a parameter is right for it: weight decay pulls towards the fitted scale,
no step can make it negative, and one learning rate suits scales of any size.
"""

import torch

from .codebook import fit_scale, nearest_levels
from .fake_quant import FakeQuantize
from .tables import has_zero, largest_level

OUTGROWN = 0.5  # of a weight's root mean square: a table that ends below it


class RoundToTable(torch.autograd.Function):
    """The nearest table entries, with the gradients of learned steps.

    A weight inside the table follows its gradient, one beyond its ends none;
    the scale gets what rounding and clipping changed (Esser et al., ICLR
    2020). Little is computed and allocated, as this runs for every weight at
    every step, and nothing kept but what the module keeps anyway.

    Example
    -------
    >>> weight = torch.tensor([0.4, -0.1, 9.0], requires_grad=True)
    >>> stretch = torch.tensor(0.0, requires_grad=True)
    >>> table = torch.tensor(0.5), 2, "midtread"
    >>> RoundToTable.apply(weight, stretch, *table).sum().backward()
    >>> weight.grad, stretch.grad  # 0.5 x ((1 - 0.8) + (0 + 0.2) + 1)
    (tensor([1., 1., 0.]), tensor(0.7000))
    """

    @staticmethod
    def forward(context, weight, log_stretch, fitted, bits, codebook):
        """The weight's nearest entries in the table of scale fitted e^s."""
        alpha = fitted * log_stretch.exp()
        if has_zero(bits, codebook):
            largest = largest_level(bits, codebook)
            levels = _steps(weight, alpha).round_().clamp_(-largest, largest)
            levels.add_(0.0)  # turns -0 into 0
        else:
            levels = nearest_levels(weight, bits, alpha, codebook)
        quantized = levels.mul_(alpha.to(levels)).to(weight.dtype)
        context.save_for_backward(weight, quantized, alpha)
        context.largest = largest_level(bits, codebook)
        return quantized

    @staticmethod
    def backward(context, gradient):
        """Gradients of the weight and of the logarithm s."""
        weight, quantized, alpha = context.saved_tensors
        inside = weight.abs() <= context.largest * alpha
        by_weight = gradient * inside
        # By s: the entry, less what follows the weight.
        by_stretch = _products(gradient, quantized, alpha.shape)
        by_stretch -= _products(by_weight, weight, alpha.shape)
        return by_weight, by_stretch.to(alpha), None, None, None


def _steps(weight, alpha):
    """A weight in units of alpha; a new tensor."""
    # Half floats are too coarse to divide in.
    work = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return work / alpha.to(work).clamp_min(torch.finfo(work.dtype).tiny)


def _products(one, other, shape):
    """Sum of products for each scale."""
    one, other = one.float(), other.float()
    if not shape:
        return torch.dot(one.reshape(-1), other.reshape(-1))
    return (one * other).sum_to_size(shape)


class LogStep(FakeQuantize):
    """Fake quantization whose scale is trained as a logarithm.

    A tensor that is all zero when its scale is fitted, as a bias before
    training, has no scale yet. It gets one as soon as it has values, and again
    whenever these have outgrown the table.

    Arguments
    ---------
    bits : int or float
        Bits of one value, 1 to 16, or 1.6.
    alpha : torch.Tensor or float
        Scale to start from, broadcastable to the weight.
    codebook : str
        "midtread" or "midrise".

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
        """The quantized weight.

        Arguments
        ---------
        weight : torch.Tensor
            Float weight of any shape.

        Returns
        -------
        torch.Tensor
            Same shape and type.
        """
        if self.is_late and self.training:
            self._fit_late(weight.detach())
        table = self.fitted, *self._table()
        return RoundToTable.apply(weight, self.log_stretch, *table)

    def _table(self):
        """Bits and codebook, without asking the device at every step."""
        if not self._known:
            bits = FakeQuantize.stored_bits.fget(self)
            kind = FakeQuantize.codebook.fget(self)
            self._known = {"bits": bits, "codebook": kind}
        return self._known["bits"], self._known["codebook"]

    def _note_late(self):
        """Remember whether some values have no scale yet."""
        self.is_late = bool((self.fitted == 0).any())
        self.late.fill_(self.is_late)

    @torch.no_grad()
    def _fit_late(self, weight):
        """Fit the scales that a weight has outgrown."""
        bits, codebook = self._table()
        values = weight.float().reshape(self.fitted.numel(), -1)
        rms = values.norm(dim=1) / values.shape[1] ** 0.5
        end = largest_level(bits, codebook) * self.alpha
        outgrown = end < OUTGROWN * rms.view(end.shape)
        if not outgrown.any():
            return
        granularity = "channel" if self.fitted.dim() else "tensor"
        alpha = fit_scale(weight, bits, granularity, codebook)
        self.fitted.copy_(torch.where(outgrown, alpha, self.fitted))
        self.log_stretch.masked_fill_(outgrown, 0.0)

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        """What was known of the table may be another's."""
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._known = {}
        self.is_late = bool(self.late)
