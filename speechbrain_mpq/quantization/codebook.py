"""Codebooks: weights to levels of a table and back, and how to find the scale.

Equations are those of "Mixed precision DNN quantization for overlapped speech
separation and recognition" (ICASSP 2022); ``tables`` has the tables.
"""

import torch

from .scale_search import search_scales
from .tables import check_bits, has_zero, largest_level

GRANULARITIES = ("tensor", "channel")


def codebook(bits, alpha=1.0, kind="midtread"):
    """All values of the quantization table, ascending (Eq. 7).

    Arguments
    ---------
    bits : int or float
        Bits of one value, 1 to 16, or 1.6.
    alpha : float
        Scale of the table.
    kind : str
        "midtread" or "midrise".

    Returns
    -------
    torch.Tensor

    Example
    -------
    >>> codebook(3, 0.5)
    tensor([-1.5000, -1.0000, -0.5000,  0.0000,  0.5000,  1.0000,  1.5000])
    >>> codebook(2, 0.5, "midrise")
    tensor([-1.5000, -0.5000,  0.5000,  1.5000])
    >>> codebook(1, 0.5)
    tensor([-0.5000,  0.5000])
    """
    largest = largest_level(check_bits(bits), kind)
    step = 1 if has_zero(bits, kind) else 2
    return torch.arange(-largest, largest + 1, step) * float(alpha)


def nearest_levels(weight, bits, alpha, codebook="midtread"):
    """The nearest table entry of every weight, in units of alpha (Eq. 5).

    Arguments
    ---------
    weight : torch.Tensor
        Weights of any shape and float type.
    bits : int or float
        Bits of one value, 1 to 16, or 1.6.
    alpha : torch.Tensor
        Scale, broadcastable to the weights.
    codebook : str
        "midtread" or "midrise".

    Returns
    -------
    torch.Tensor
        Whole numbers in the weights' shape, as floats (at least float32).

    Example
    -------
    >>> weight = torch.tensor([0.9, -0.2, 8.0])
    >>> nearest_levels(weight, 2, torch.tensor(1.0))
    tensor([1., 0., 1.])
    >>> nearest_levels(weight, 2, torch.tensor(0.5), "midrise")
    tensor([ 1., -1.,  3.])
    """
    # Half floats are too coarse to divide in; a level must be the nearest.
    weight = weight.to(_work_dtype(weight.dtype))
    alpha = alpha.to(weight)
    largest = largest_level(bits, codebook)
    if has_zero(bits, codebook):
        levels = torch.round(weight / alpha).clamp(-largest, largest)
        # An all-zero tensor has alpha 0. Adding 0 turns -0 into 0.
        return torch.where(alpha > 0, levels, 0 * weight) + 0.0
    # Zero counts as positive, and alpha 0 leaves the first level of the sign.
    sign = torch.where(weight < 0, -1.0, 1.0).to(weight) + 0 * weight
    if largest == 1:
        return sign
    steps = torch.where(alpha > 0, weight.abs() / (2 * alpha), 0 * weight)
    return sign * (2 * steps.floor() + 1).clamp(max=largest)


def quantize_to_integers(weight, bits, alpha, codebook="midtread"):
    """Weights to the integers that a packed file stores (Eq. 5).

    Arguments
    ---------
    weight : torch.Tensor
        Finite weights of any shape and float type.
    bits : int or float
        Bits of one value, 1 to 16, or 1.6.
    alpha : torch.Tensor or float
        Scale, broadcastable to the weights.
    codebook : str
        "midtread" or "midrise".

    Returns
    -------
    torch.Tensor
        int32, in the weights' shape.

    Example
    -------
    >>> weight = torch.tensor([-0.6, 0.1, 0.26, 9.0])
    >>> quantize_to_integers(weight, 3, 0.25)
    tensor([-2,  0,  1,  3], dtype=torch.int32)
    >>> quantize_to_integers(weight, 1, 0.25)
    tensor([-1,  1,  1,  1], dtype=torch.int32)
    """
    bits = check_bits(bits)
    alpha = torch.as_tensor(alpha)
    return nearest_levels(weight, bits, alpha, codebook).to(torch.int32)


def dequantize(integers, alpha, dtype=torch.float32):
    """Integers (or whole floats) times their scale.

    Arguments
    ---------
    integers : torch.Tensor
        Levels of the codebook.
    alpha : torch.Tensor or float
        Scale, broadcastable to the integers.
    dtype : torch.dtype
        Type of the result.

    Returns
    -------
    torch.Tensor

    Example
    -------
    >>> dequantize(torch.tensor([-2, 0, 3]), 0.25)
    tensor([-0.5000,  0.0000,  0.7500])
    """
    work = _work_dtype(dtype)
    alpha = torch.as_tensor(alpha, device=integers.device).to(work)
    return (integers.to(work) * alpha).to(dtype)


def scale_shape(shape, granularity="tensor"):
    """Shape of a tensor's scale.

    Arguments
    ---------
    shape : tuple of int
        Shape of the weights.
    granularity : str
        "tensor": one scale. "channel": one for each entry of the first
        dimension; vectors (biases, norms) keep one scale, as a scale each
        would cost more than the float values.

    Returns
    -------
    tuple of int

    Example
    -------
    >>> scale_shape((64, 32, 3), "channel"), scale_shape((64,), "channel")
    ((64, 1, 1), ())
    """
    if granularity not in GRANULARITIES:
        raise ValueError(
            f"granularity must be one of {GRANULARITIES}, not {granularity!r}"
        )
    if granularity == "tensor" or len(shape) < 2:
        return ()
    return (shape[0],) + (1,) * (len(shape) - 1)


def fit_scale(weight, bits, granularity="tensor", codebook="midtread"):
    """The scale with the least squared error (Eq. 6), by alternation.

    From the best scales of a grid, weights go to their nearest levels q and
    the scale to <w, q> / <q, q> until it stays. The largest-magnitude scale
    is on the grid and neither step raises the error, so that the result is
    never worse than it. Deterministic, in float64.

    Arguments
    ---------
    weight : torch.Tensor
        Finite weights of any shape and float type.
    bits : int or float
        Bits of one value, 1 to 16, or 1.6.
    granularity : str
        "tensor" or "channel" (see ``scale_shape``).
    codebook : str
        "midtread" or "midrise".

    Returns
    -------
    torch.Tensor
        float32; 0 for a tensor of zeros.

    Example
    -------
    >>> fit_scale(torch.tensor([0.5, -1.0, 1.5]), 3)
    tensor(0.5000)
    >>> fit_scale(torch.tensor([0.5, -0.5, 1.5]), 2, codebook="midrise")
    tensor(0.5000)
    >>> fit_scale(torch.tensor([1.0, -1.0, 4.0]), 1)
    tensor(2.)
    >>> fit_scale(torch.zeros(3), 4)
    tensor(0.)
    """
    bits = check_bits(bits)
    shape = scale_shape(tuple(weight.shape), granularity)
    if not torch.isfinite(weight).all():
        raise ValueError("weights must be finite; found NaN or infinity")
    if not weight.numel():
        return torch.zeros(shape, device=weight.device)
    rows = weight.detach().abs().double().reshape(shape[0] if shape else 1, -1)
    largest = largest_level(bits, codebook)
    if largest == 1 and not has_zero(bits, codebook):
        alpha = rows.mean(1)  # the same formula with q = sign(w)
    else:
        alpha = search_scales(rows, largest, has_zero(bits, codebook))
    return alpha.float().reshape(shape)


def _work_dtype(dtype):
    """Half floats are computed in float32, double stays double."""
    return torch.promote_types(dtype, torch.float32)
