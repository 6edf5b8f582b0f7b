"""Rounding to a table with a gradient: what a training step does to a weight.

It runs for every quantized weight at every step. So values are computed in few
passes and without temporaries, large weights a block at a time; they are, to
the last digit, those of ``nearest_levels`` and ``dequantize``. Gradients are
computed by hand, to the last digit those of the formulas beside them, and
nothing is kept for them but what the module keeps anyway.
"""

from functools import lru_cache

import numpy as np
import torch
from torch.autograd import Function

from .codebook import dequantize, has_zero, largest_level, nearest_levels

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
    """A gradient, zero where the weight is beyond the ends of its table.

    Without a comparison and a choice, which take several times as long: these
    backward functions leave out the ends, which belong to the table. With it
    comes room for a tensor of its shape, or None.
    """
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
    """Whether results may take the room of other ones.

    Another layout would be summed in another order, and a gradient that is
    differentiated again needs all of them.
    """
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
            found = _smooth_gradients(gradient, weight, alpha, context.table)
            found = [g if n else None for g, n in zip(found, needed)]
        else:
            found = _by_autograd(gradient, weight, alpha, context.table, needed)
        return *found, None, None


def _smooth(weight, alpha, bits, codebook):
    """What is differentiated in the place of rounding.

    Inside the table a weight follows its gradient and the scale gets what
    rounding changed; beyond its ends the scale gets all of it.
    """
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
        wanted = [i for i, n in zip(inputs, needed) if n]
        values = _smooth(*inputs, *table)
        found = torch.autograd.grad(
            values, wanted, gradient, create_graph=again
        )
    found = iter(found)
    return [next(found) if n else None for n in needed]


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
