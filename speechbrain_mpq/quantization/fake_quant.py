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

Rounding runs for every quantized weight at every step. So values are computed
in few passes and without temporaries, large weights a block at a time; they
are, to the last digit, those of ``nearest_levels`` and ``dequantize``, and
gradients, computed by hand, those of the formulas beside them.
"""

from functools import lru_cache

import numpy as np
import torch
from torch.autograd import Function

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

BLOCK = 2**17  # values rounded at a time, which stay in a core's cache
_TINY = torch.finfo(torch.float32).tiny
_ZERO = torch.tensor(0.0)
_NUMPY_INFINITY = np.float32(np.inf)
# Found once: torch.ops looks for them at every call.
_HARDTANH_BACKWARD = torch.ops.aten.hardtanh_backward.default
_THRESHOLD_BACKWARD = torch.ops.aten.threshold_backward.default


@lru_cache
def table_ends(bits, codebook):
    """The largest level of a table, and whether it has a zero."""
    return largest_level(bits, codebook), has_zero(bits, codebook)


def _beyond(end):
    """The next single-precision number after a positive one."""
    return float(np.nextafter(np.float32(end), _NUMPY_INFINITY))


def nearest_values(weight, bits, alpha, codebook="midtread"):
    """The values of a weight's nearest table entries.

    Arguments
    ---------
    weight : torch.Tensor
        Float weight of any shape.
    bits : int or float
        Bits of one value, 1 to 16, or 1.6.
    alpha : torch.Tensor
        Scale, broadcastable to the weight.
    codebook : str
        Kind of the quantization table.

    Returns
    -------
    torch.Tensor
        New, of the weight's shape and type.

    Example
    -------
    >>> weight = torch.tensor([0.6, -0.1, 9.0])
    >>> nearest_values(weight, 2, torch.tensor(0.5))
    tensor([0.5000, 0.0000, 0.5000])
    >>> nearest_values(weight, 2, torch.tensor(0.0))
    tensor([0., 0., 0.])
    """
    # A compiler fuses passes itself, and loses gradients of what is in place.
    if codebook == "entropy" or torch.compiler.is_compiling():
        levels = nearest_levels(weight, bits, alpha, codebook)
        return dequantize(levels, alpha, weight.dtype)
    if not weight.dtype == alpha.dtype == torch.float32:
        # Half floats are too coarse to divide in; a level must be the nearest.
        work = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return _values(work, bits, alpha.to(work), codebook).to(weight.dtype)
    return _values(weight, bits, alpha, codebook)


def _values(weight, bits, alpha, codebook):
    """The values of one floating type."""
    largest, zero = table_ends(bits, codebook)
    factor = _factor(alpha)
    divisor = _divisor(alpha, factor)
    values = torch.empty_like(weight)
    for part, result, step, scale in _blocks(weight, values, divisor, alpha):
        if zero:
            torch.div(part, step, out=result)
            result.round_().clamp_(-largest, largest)
        else:
            _fill_odd_levels(part, result, step, largest)
        if zero and factor is not None:
            # Adding turns -0 into 0.
            torch.add(_ZERO, result, alpha=factor, out=result)
        elif zero:
            result.mul_(scale).add_(0.0)
        else:
            result.mul_(scale)
    return values


def _factor(alpha):
    """A scale as a number, where a number costs no waiting for a device."""
    if alpha.dim() or not alpha.is_cpu or torch.compiler.is_compiling():
        return None
    return alpha.item()


def _divisor(alpha, factor=None):
    """A scale to divide by: any where it is zero, as all is zero then."""
    if factor is None:
        return torch.where(alpha > 0, alpha, 1.0)
    return alpha if factor > 0 else torch.ones_like(alpha)


def _blocks(weight, values, divisor, alpha):
    """Parts of all four that belong together."""
    if weight.numel() < 4 * BLOCK or not weight.is_cpu:
        return [(weight, values, divisor, alpha)]
    if not alpha.dim() and weight.is_contiguous():
        pairs = weight.view(-1).split(BLOCK), values.view(-1).split(BLOCK)
        return [(*pair, divisor, alpha) for pair in zip(*pairs)]
    rows = max(1, BLOCK * len(weight) // weight.numel())
    parts = [x.split(rows) for x in (weight, values)]
    for scale in (divisor, alpha):
        own = scale.dim() == weight.dim() and len(scale) == len(weight)
        parts.append(scale.split(rows) if own else [scale] * len(parts[0]))
    return zip(*parts)


def _fill_odd_levels(weight, levels, divisor, largest):
    """The nearest levels of a table without zero, which counts as positive."""
    if largest == 1:
        # Of NaN, which a comparison would lose.
        torch.mul(weight, 0.0, out=levels).add_(1.0)
    else:
        torch.div(weight, divisor * 2, out=levels)
        levels.abs_().floor_().mul_(2).add_(1.0).clamp_(max=largest)
    levels.copysign_(weight + 0.0)


class StraightThroughRounding(Function):
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


class LearnedRounding(Function):
    """The nearest table entries, with the gradients of learned steps.

    A weight inside the table follows its gradient, one beyond its ends none;
    the scale gets what rounding and clipping changed (Esser et al., ICLR
    2020).

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
        context.largest, _ = table_ends(bits, codebook)
        quantized = nearest_values(weight, bits, alpha, codebook)
        context.save_for_backward(weight, quantized, alpha)
        return quantized

    @staticmethod
    def backward(context, gradient):
        """Gives the gradients of the weight and of the scale's logarithm."""
        if torch.compiler.is_compiling():
            # Traced, they would be wrong without a word.
            torch._dynamo.graph_break()
        weight, quantized, alpha = context.saved_tensors
        by_scale = None
        by_weight, room = _inside(gradient, weight, context.largest, alpha)
        if context.needs_input_grad[1]:
            # By the entry, less what follows the weight.
            by_scale = _products(gradient, quantized, alpha.shape, room)
            by_scale -= _products(by_weight, weight, alpha.shape, room)
            if by_scale.dtype != alpha.dtype:
                by_scale = by_scale.to(alpha)
        return by_weight, by_scale, None, None, None


def _inside(gradient, weight, largest, alpha):
    """A gradient, zero where the weight is beyond the ends of its table."""
    # Without a comparison and a choice, which take several times as long: these
    # backward functions leave out the ends, which belong to the table. With it
    # comes room for a tensor of its shape, or None.
    plain = weight.dtype == gradient.dtype == alpha.dtype == torch.float32
    if plain and weight.is_cpu and not alpha.dim():
        end = _beyond(alpha.item() * largest)
        return _HARDTANH_BACKWARD(gradient, weight, -end, end), None
    end = largest * alpha
    if plain and _in_place(gradient, weight):
        left = weight.abs()
        beyond = torch.nextafter(end, torch.full_like(end, torch.inf))
        torch.sub(beyond, left, out=left)
        return _THRESHOLD_BACKWARD(gradient, left, 0), left
    return torch.where(weight.abs() <= end, gradient, 0.0), None


def _in_place(gradient, weight):
    """Whether results may take the room of other ones."""
    # Another layout would be summed in another order, and a gradient that is
    # differentiated again needs all of them.
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return gradient.stride() == weight.stride()


def _products(one, other, shape, room=None):
    """Sum of products for each scale."""
    if not one.dtype == other.dtype == torch.float32:
        one, other = one.float(), other.float()
    if not shape:
        if one.dim() != 1:
            one, other = one.reshape(-1), other.reshape(-1)
        return torch.dot(one, other)
    return torch.mul(one, other, out=room).sum_to_size(shape)


class StepRounding(Function):
    """The nearest table entries, with gradients in autograd's rounding.

    The gradients are those of ``_smooth``: as `LearnedRounding` has them, but
    rounded as autograd does, to which published results go back.

    Example
    -------
    >>> weight = torch.tensor([0.4, -0.1, 9.0], requires_grad=True)
    >>> alpha = torch.tensor(0.5, requires_grad=True)
    >>> StepRounding.apply(weight, alpha, 2, "midtread").sum().backward()
    >>> weight.grad, alpha.grad  # (1 - 0.8) + (0 + 0.2) + 1
    (tensor([1., 1., 0.]), tensor(1.4000))
    """

    @staticmethod
    def forward(context, weight, alpha, bits, codebook):
        """Rounds to the table of scale alpha, which is trained."""
        context.table = bits, codebook
        context.save_for_backward(weight, alpha)
        # Scales of zero leave a sign where the table has no zero.
        return nearest_values(weight, bits, alpha, codebook).add_(0.0)

    @staticmethod
    def backward(context, gradient):
        """Gives the gradients of the weight and of the scale."""
        weight, alpha = context.saved_tensors
        needed = context.needs_input_grad[:2]
        plain = weight.dtype == gradient.dtype == alpha.dtype == torch.float32
        if plain and _in_place(gradient, weight):
            gradients = _smooth_gradients(
                gradient, weight, alpha, context.table
            )
            gradients = [g if n else None for g, n in zip(gradients, needed)]
        else:
            gradients = _by_autograd(
                gradient, weight, alpha, context.table, needed
            )
        return *gradients, None, None


def _smooth(weight, alpha, bits, codebook):
    """What is differentiated in the place of rounding."""
    # Inside the table a weight follows its gradient and the scale gets what
    # rounding changed; beyond its ends the scale gets all of it.
    largest, _ = table_ends(bits, codebook)
    levels = nearest_levels(weight.detach(), bits, alpha.detach(), codebook)
    steps = weight / alpha.clamp_min(torch.finfo(alpha.dtype).tiny)
    inside = steps.clamp(-largest, largest)
    return ((inside + (levels - inside).detach()) * alpha).to(weight.dtype)


def _by_autograd(gradient, weight, alpha, table, needed):
    """Gradients of ``_smooth``, which may be differentiated again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [weight, alpha]
        if not again:
            inputs = [i.detach().requires_grad_() for i in inputs]
        differentiated = [i for i, n in zip(inputs, needed) if n]
        values = _smooth(*inputs, *table)
        gradients = torch.autograd.grad(
            values, differentiated, gradient, create_graph=again
        )
    gradients = iter(gradients)
    return [next(gradients) if n else None for n in needed]


def _smooth_gradients(gradient, weight, alpha, table):
    """Gradients of ``_smooth``, in the same order of operations."""
    largest, zero = table_ends(*table)
    divisor = alpha.clamp_min(_TINY)
    steps = weight / divisor
    levels = steps.clamp(-largest, largest)
    if zero:
        levels.round_()  # the sum is exact here
    else:
        inside, levels = levels, torch.empty_like(levels)
        _fill_odd_levels(weight, levels, _divisor(alpha), largest)
        levels.sub_(inside).add_(inside)
        del inside
    by_alpha = levels.mul_(gradient).sum_to_size(alpha.shape)
    by_weight = torch.mul(gradient, alpha, out=levels)
    # As clamping has it; its ends belong to the table.
    end = _beyond(largest)
    by_weight = _HARDTANH_BACKWARD(by_weight, steps, -end, end)
    steps.div_(divisor).mul_(by_weight)
    by_divisor = steps.sum_to_size(alpha.shape)
    by_alpha -= torch.where(alpha >= _TINY, by_divisor, 0.0)
    return by_weight.div_(divisor), by_alpha


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
        check_keeps_scale(type(self), codebook)

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


def check_keeps_scale(estimator, codebook):
    """Refuse an estimator that trains scales where these set the bits.

    Arguments
    ---------
    estimator : type or functools.partial
        Fake quantizer of each tensor.
    codebook : str
        Kind of the quantization tables.

    Example
    -------
    >>> check_keeps_scale(FakeQuantize, "entropy")
    """
    estimator = getattr(estimator, "func", estimator)
    if codebook == "entropy" and not estimator.keeps_scale:
        raise ValueError(
            f"{estimator.__name__} trains scales, and those of the entropy "
            "codebook set what a weight costs: use StraightThrough or "
            'PostTraining with it, or the codebook "midrise"'
        )


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
