"""Codebooks: the quantization tables of a tensor and how its scale is found.

Equations are those of "Mixed precision DNN quantization for overlapped speech
separation and recognition" (ICASSP 2022). A tensor of n bits takes its values
from {0, +-alpha, ..., +-alpha (2^(n-1) - 1)}; with one bit from {+-alpha}.
"""

import numbers

import torch

MAX_BITS = 16
GRANULARITIES = ("tensor", "channel")
STARTS = 40  # scales on the grid
FINALISTS = 4  # best scales of the grid, from which the alternation starts
MAX_ROUNDS = 30  # of the alternation; it settles in about ten
TOLERANCE = 1e-4  # of a level, by which the largest one may still move
MAX_LOOKUPS = 2**13  # starts x levels of one tensor
CHUNK = 2**22  # float64 values in one temporary, 32 MiB


def check_bits(bits):
    """Refuses everything but an integer from 1 to 16.

    Arguments
    ---------
    bits : int
        Bits of one value; numpy integers are fine, bools and floats are not.

    Returns
    -------
    int

    Example
    -------
    >>> check_bits(4)
    4
    >>> check_bits(4.0)
    Traceback (most recent call last):
    ...
    ValueError: bits must be an integer from 1 to 16, not 4.0
    """
    is_integer = isinstance(bits, numbers.Integral)
    if not is_integer or isinstance(bits, bool) or not 1 <= bits <= MAX_BITS:
        raise ValueError(
            f"bits must be an integer from 1 to {MAX_BITS}, not {bits!r}"
        )
    return int(bits)


def largest_level(bits):
    """The largest integer of an n-bit codebook, 2^(n-1) - 1 (one bit: 1).

    Arguments
    ---------
    bits : int
        Bits of one value.

    Returns
    -------
    int

    Example
    -------
    >>> [largest_level(bits) for bits in (1, 2, 4, 8)]
    [1, 1, 7, 127]
    """
    return max(2 ** (bits - 1) - 1, 1)


def codebook(bits, alpha=1.0):
    """All values of the quantization table, ascending (Eq. 7).

    Arguments
    ---------
    bits : int
        Bits of one value, 1 to 16.
    alpha : float
        Scale of the table.

    Returns
    -------
    torch.Tensor

    Example
    -------
    >>> codebook(3, 0.5)
    tensor([-1.5000, -1.0000, -0.5000,  0.0000,  0.5000,  1.0000,  1.5000])
    >>> codebook(1, 0.5)
    tensor([-0.5000,  0.5000])
    """
    if check_bits(bits) == 1:
        return torch.tensor([-alpha, alpha], dtype=torch.float32)
    largest = largest_level(bits)
    return torch.arange(-largest, largest + 1) * float(alpha)


def nearest_levels(weight, bits, alpha):
    """The nearest table entry of every weight, in units of alpha (Eq. 5).

    Arguments
    ---------
    weight : torch.Tensor
        Weights of any shape and float type.
    bits : int
        Bits of one value, 1 to 16.
    alpha : torch.Tensor
        Scale, broadcastable to the weights.

    Returns
    -------
    torch.Tensor
        Whole numbers in the weights' shape, as floats (at least float32).

    Example
    -------
    >>> nearest_levels(torch.tensor([0.9, -0.2, 8.0]), 2, torch.tensor(1.0))
    tensor([1., 0., 1.])
    """
    # Half floats are too coarse to divide in; a level must be the nearest.
    weight = weight.to(_work_dtype(weight.dtype))
    alpha = alpha.to(weight)
    if bits == 1:
        # Zero counts as positive: the table has no zero.
        return torch.where(weight < 0, -1.0, 1.0).to(weight) + 0 * weight
    largest = largest_level(bits)
    levels = torch.round(weight / alpha).clamp(-largest, largest)
    # An all-zero tensor has alpha 0. Adding 0 turns -0 into 0.
    return torch.where(alpha > 0, levels, 0 * weight) + 0.0


def quantize_to_integers(weight, bits, alpha):
    """Weights to the integers that a packed file stores (Eq. 5).

    Arguments
    ---------
    weight : torch.Tensor
        Finite weights of any shape and float type.
    bits : int
        Bits of one value, 1 to 16.
    alpha : torch.Tensor or float
        Scale, broadcastable to the weights.

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
    return nearest_levels(weight, bits, alpha).to(torch.int32)


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


def fit_scale(weight, bits, granularity="tensor"):
    """The scale with the least squared error (Eq. 6), by alternation.

    From the best scales of a grid, weights go to their nearest levels q and
    the scale to <w, q> / <q, q> until it stays. The largest-magnitude scale
    is on the grid and neither step raises the error, so that the result is
    never worse than it. Deterministic, in float64.

    Arguments
    ---------
    weight : torch.Tensor
        Finite weights of any shape and float type.
    bits : int
        Bits of one value, 1 to 16.
    granularity : str
        "tensor" or "channel" (see ``scale_shape``).

    Returns
    -------
    torch.Tensor
        float32; 0 for a tensor of zeros.

    Example
    -------
    >>> fit_scale(torch.tensor([0.5, -1.0, 1.5]), 3)
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
    if bits == 1:
        alpha = rows.mean(1)  # the same formula with q = sign(w)
    else:
        per_row = min(rows.shape[1] * STARTS, MAX_LOOKUPS)
        chunks = rows.split(max(1, CHUNK // per_row))
        alpha = torch.cat([_alternate(chunk, bits) for chunk in chunks])
    return alpha.float().reshape(shape)


def _work_dtype(dtype):
    """Half floats are computed in float32, double stays double."""
    return torch.promote_types(dtype, torch.float32)


def _start_scales(rows, largest):
    """Starts [rows, starts]: largest magnitude first, then the grid.

    Most starts clip, down to half the mean magnitude; the rest use only the
    first k levels, which is right for weights that lie on a coarse lattice.
    """
    starts = max(1, min(STARTS, MAX_LOOKUPS // largest))
    top = rows.amax(1, keepdim=True)
    if starts == 1:
        return top / largest
    coarse = starts // 4
    used = largest ** torch.linspace(1, 0, coarse).to(rows)
    steps = torch.linspace(0, 1, starts - coarse).to(rows)
    lowest = (0.5 * rows.mean(1, keepdim=True) / top).clamp_min(1e-3)
    clipped = top / largest * lowest ** steps.square()  # densest at no clip
    return torch.cat([clipped, top / used.round()], 1)


def _products(rows, suffix, largest, scales):
    """<w, q> and <q, q> of magnitudes [rows, n] for scales [rows, starts].

    With few levels it is cheaper to look their borders up in the sorted
    magnitudes than to round each weight: a weight above the border k - 1/2
    adds w to <w, q> and k^2 - (k - 1)^2 = 2k - 1 to <q, q>.
    """
    if suffix is None:
        levels = (rows[:, None] / scales[:, :, None]).round_()
        levels.clamp_(max=largest)
        cross = (levels @ rows[:, :, None])[:, :, 0]
        return cross, levels.square_().sum(2)
    step = torch.arange(1, largest + 1, device=scales.device)
    borders = (scales[:, :, None] * (step - 0.5)).flatten(1)
    first = torch.searchsorted(rows, borders)
    cross = suffix.gather(1, first).view(*scales.shape, largest).sum(2)
    above = (rows.shape[1] - first).view(*scales.shape, largest)
    return cross, (above * (2 * step - 1)).sum(2).to(cross)


def _alternate(rows, bits):
    """Best scale of each row of magnitudes, [rows] (Eq. 6)."""
    largest = largest_level(bits)
    alive = rows.amax(1) > 0
    rows = torch.where(alive[:, None], rows, 1.0)
    suffix = None
    if rows.shape[1] > 8 * largest:
        rows = rows.sort(1).values
        suffix = rows.flip(1).cumsum(1).flip(1)
        suffix = torch.nn.functional.pad(suffix, (0, 1))

    def best(scales, count):
        cross, square = _products(rows, suffix, largest, scales)
        error = scales * (scales * square - 2 * cross)  # without <w, w>
        count = min(count, scales.shape[1])
        return scales.gather(1, error.topk(count, largest=False).indices)

    scales = best(_start_scales(rows, largest), FINALISTS)
    for _ in range(MAX_ROUNDS):
        cross, square = _products(rows, suffix, largest, scales)
        new = torch.where(square > 0, cross / square.clamp_min(1), scales)
        moved = (new - scales).abs() * largest > TOLERANCE * scales
        scales = new
        if not moved.any():
            break
    return torch.where(alive, best(scales, 1)[:, 0], 0.0)
