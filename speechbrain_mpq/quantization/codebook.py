"""Codebooks: the levels that n bits mean, and the scale that fits a weight.

Equations are those of "Mixed precision DNN quantization for overlapped speech
separation and recognition" (ICASSP 2022). There are two kinds of table, both
of whole multiples of a scale alpha, so that the stored integers are exact:

* "midtread" (Eq. 7): n bits mean {0, +-1, ..., +-(2^(n-1) - 1)} alpha, one
  level less than n bits can name.
* "midrise": n bits mean all 2^n odd multiples {+-1, +-3, ..., +-(2^n - 1)}
  alpha; alpha is half a step here and there is no zero. For normal weights
  the level gained is worth 2.0 dB of noise at 2 bits, 1.0 at 3, 0.5 at 4 and
  0.1 at 6. From 7 bits on it is worth less than 0.1 dB and the table is that
  of Eq. 7, so that all integers up to 8 bits fit int8.

With one bit both are {+-alpha}. 1.6 bits are the three levels of Eq. 7's
2-bit table, which take five to a byte (3^5 = 243).

* "entropy": n bits mean {0, +-1, +-2, ...} alpha with as many levels as the
  weight needs and a step alpha so wide that the levels' entropy is n bits.
  Bits are spent on the rare large weights only; files of it are entropy-coded.
  At high rates a uniform step with entropy coding is 0.25 bits from the rate
  distortion bound, whatever the distribution (Gish and Pierce, 1968). Around
  zero it rounds down a little more often (a dead zone), as rates want it.

The scale of a tensor is the one with the least squared error (Eq. 6). Its
search works on magnitudes, as all tables are symmetric: a magnitude's levels
are 0, 1, 2, ..., L of Eq. 7's table, or 1, 3, 5, ..., L of a table without
zero. Layout there: [rows, n], each row with a scale of its own.
"""

import math
import numbers

import numpy as np
import torch

MAX_BITS = 16
TERNARY_BITS = 1.6
CODEBOOKS = ("midtread", "midrise", "entropy")
MIDRISE_BITS = (2, 3, 4, 5, 6)  # where midrise differs from midtread
ENTROPY_BITS = 4  # by which an entropy-coded table is larger than its rate
ROUND_UP = 0.47  # of a step, from where on entropy-coded levels round up


def check_bits(bits):
    """Refuses everything but an integer from 1 to 16, or 1.6."""
    if isinstance(bits, float) and bits == TERNARY_BITS:
        return TERNARY_BITS
    is_integer = isinstance(bits, numbers.Integral)
    if not is_integer or isinstance(bits, bool) or not 1 <= bits <= MAX_BITS:
        raise ValueError(
            f"bits must be an integer from 1 to {MAX_BITS} or {TERNARY_BITS}, "
            f"not {bits!r}"
        )
    return int(bits)


def table_bits(bits, codebook="midtread"):
    """Bits of the table that a value is from: those stored, 2 for 1.6.

    Example
    -------
    >>> table_bits(1.6), table_bits(4), table_bits(4, "entropy")
    (2, 4, 8)
    """
    bits = check_bits(bits)
    if codebook == "entropy":
        return min(math.ceil(bits) + ENTROPY_BITS, MAX_BITS)
    return 2 if bits == TERNARY_BITS else bits


def packed_width(bits, codebook="midtread"):
    """Bits of an integer that is not entropy-coded, 1.6 included."""
    return table_bits(bits, codebook) if codebook == "entropy" else bits


def check_codebook(codebook):
    """Refuses an unknown kind of codebook.

    Example
    -------
    >>> check_codebook("midrise")
    'midrise'
    """
    if codebook not in CODEBOOKS:
        raise ValueError(
            f"codebook must be one of {CODEBOOKS}, not {codebook!r}"
        )
    return codebook


def has_zero(bits, codebook="midtread"):
    """Whether a table has a zero; without one its levels are odd."""
    if check_codebook(codebook) == "entropy":
        return True
    return bits != 1 and not (codebook == "midrise" and bits in MIDRISE_BITS)


def largest_level(bits, codebook="midtread"):
    """The largest integer of a table: 2^(n-1) - 1, or 2^n - 1 without zero."""
    if has_zero(bits, codebook):
        return 2 ** (table_bits(bits, codebook) - 1) - 1
    return 2 ** check_bits(bits) - 1


STARTS = 40  # scales on the grid
FINALISTS = 4  # best scales of the grid, from which the alternation starts
MAX_ROUNDS = 30  # of the alternation; it settles in about ten
TOLERANCE = 1e-4  # of a level, by which the largest one may still move
MAX_LOOKUPS = 2**13  # starts x borders of one row
CHUNK = 2**22  # float64 values in one temporary, 32 MiB


def search_scales(rows, largest, zero=True):
    """The best scale of each row of magnitudes.

    Arguments
    ---------
    rows : torch.Tensor
        Magnitudes [rows, n], of any float type.

    Returns
    -------
    torch.Tensor
        [rows]; 0 for a row of zeros.
    """
    levels = torch.arange(0 if zero else 1, largest + 1, 1 if zero else 2)
    levels = levels.to(rows.device)
    per_row = min(rows.shape[1] * STARTS, MAX_LOOKUPS)
    chunks = rows.split(max(1, CHUNK // per_row))
    return torch.cat([_alternate(chunk, levels) for chunk in chunks])


def _nearest(magnitudes, levels):
    """Nearest levels of magnitudes in units of the scale; overwrites them."""
    first, step = int(levels[0]), int(levels[1] - levels[0])
    if step == 1:
        return magnitudes.round_().clamp_(max=int(levels[-1]))
    steps = magnitudes.div_(step).floor_()
    return steps.mul_(step).add_(first).clamp_(max=int(levels[-1]))


def _start_scales(rows, levels):
    """Starts [rows, starts]: largest magnitude first, then the grid."""
    largest = int(levels[-1])
    starts = max(1, min(STARTS, MAX_LOOKUPS // (len(levels) - 1)))
    top = rows.amax(1, keepdim=True)
    if starts == 1:
        return top / largest
    coarse = starts // 4
    used = largest ** torch.linspace(1, 0, coarse).to(rows)
    steps = torch.linspace(0, 1, starts - coarse).to(rows)
    lowest = (0.5 * rows.mean(1, keepdim=True) / top).clamp_min(1e-3)
    clipped = top / largest * lowest ** steps.square()  # densest at no clip
    return torch.cat([clipped, top / _nearest(used, levels)], 1)


def _products(rows, suffix, levels, scales):
    """<w, q> and <q, q> of magnitudes [rows, n] for scales [rows, starts]."""
    if suffix is None:
        nearest = _nearest(rows[:, None] / scales[:, :, None], levels)
        cross = (nearest @ rows[:, :, None])[:, :, 0]
        return cross, nearest.square_().sum(2)
    first, step = levels[0], levels[1] - levels[0]
    borders = scales[:, :, None] * (levels[1:] - step / 2)
    index = torch.searchsorted(rows, borders.flatten(1))
    cross = suffix.gather(1, index).view(borders.shape).sum(2)
    above = (rows.shape[1] - index).view(borders.shape)
    square = (above * levels.square().diff()).sum(2).to(cross)
    return (
        step * cross + first * suffix[:, :1],
        square + first.square() * rows.shape[1],
    )


def _sorted(rows):
    """Each row in rising order; NumPy sorts floats ten times as fast."""
    if rows.device.type != "cpu":
        return rows.sort(1).values
    rows = rows.to(_work_dtype(rows.dtype))
    return torch.from_numpy(np.sort(rows.numpy(), axis=1))


def _suffix_sums(rows):
    """Sums from each column to the last, and a zero: [rows, n + 1]."""
    sums = rows.flip(1)  # the only temporary: these are large
    torch.cumsum(sums, 1, out=sums)
    suffix = rows.new_zeros(len(rows), rows.shape[1] + 1)
    suffix[:, :-1] = sums.flip(1)
    return suffix


def _alternate(rows, levels):
    """Best scale of each row of magnitudes, [rows] (Eq. 6)."""
    alive = rows.amax(1) > 0
    if not alive.all():
        rows = torch.where(alive[:, None], rows, 1.0)
    suffix = None
    if rows.shape[1] > 8 * (len(levels) - 1):
        rows = _sorted(rows).double()
        suffix = _suffix_sums(rows)
    rows = rows.double()

    def best(scales, count):
        cross, square = _products(rows, suffix, levels, scales)
        error = scales * (scales * square - 2 * cross)  # without <w, w>
        count = min(count, scales.shape[1])
        return scales.gather(1, error.topk(count, largest=False).indices)

    scales = best(_start_scales(rows, levels), FINALISTS)
    for _ in range(MAX_ROUNDS):
        cross, square = _products(rows, suffix, levels, scales)
        new = torch.where(square > 0, cross / square.clamp_min(1), scales)
        moved = (new - scales).abs() * levels[-1] > TOLERANCE * scales
        scales = new
        if not moved.any():
            break
    return torch.where(alive, best(scales, 1)[:, 0], 0.0)


GRANULARITIES = ("tensor", "channel")


def codebook(bits, alpha=1.0, kind="midtread") -> torch.Tensor:
    """All values of the quantization table, ascending (Eq. 7).

    Arguments
    ---------
    bits : int or float
        Bits of one value, 1 to 16, or 1.6.
    alpha : float
        Scale of the table.
    kind : str
        "midtread" or "midrise".

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
    """The nearest table entry of every weight, in units of alpha (Eq. 5)."""
    # Half floats are too coarse to divide in; a level must be the nearest.
    weight = weight.to(_work_dtype(weight.dtype))
    alpha = alpha.to(weight)
    largest = largest_level(bits, codebook)
    if codebook == "entropy":
        steps = torch.where(alpha > 0, weight.abs() / alpha, 0 * weight)
        levels = (steps + ROUND_UP).floor().clamp(max=largest)
        return torch.where(weight < 0, -levels, levels) + 0.0
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
    """Weights to the integers that a packed file stores (Eq. 5)."""
    bits = check_bits(bits)
    alpha = torch.as_tensor(alpha)
    return nearest_levels(weight, bits, alpha, codebook).to(torch.int32)


def dequantize(integers, alpha, dtype=torch.float32):
    """Integers (or whole floats) times their scale."""
    work = _work_dtype(dtype)
    alpha = torch.as_tensor(alpha, device=integers.device).to(work)
    return (integers.to(work) * alpha).to(dtype)


def scale_shape(shape, granularity="tensor", axes=(0,)):
    """Gives the shape of a tensor's scale."""
    if granularity not in GRANULARITIES:
        raise ValueError(
            f"granularity must be one of {GRANULARITIES}, not {granularity!r}"
        )
    if granularity == "tensor" or len(shape) < 2:
        return ()
    return tuple(n if axis in axes else 1 for axis, n in enumerate(shape))


def rows_by_scale(weight, shape):
    """Lays out a weight with the values of each of its scales in a row.

    Returns
    -------
    torch.Tensor
        [scales, values of one].

    Example
    -------
    >>> rows_by_scale(torch.tensor([[1, 2], [3, 4]]), (1, 2))
    tensor([[1, 3],
            [2, 4]])
    """
    own = [axis for axis, size in enumerate(shape) if size > 1]
    if own and own != list(range(len(own))):
        weight = weight.movedim(own, tuple(range(len(own))))
    return weight.reshape(max(math.prod(shape), 1), -1)


def fit_scale(
    weight, bits, granularity="tensor", codebook="midtread", shape=None
):
    """Fits the scale with the least squared error (Eq. 6), by alternation.

    From the best scales of a grid, weights go to their nearest levels q and
    the scale to <w, q> / <q, q> until it stays. The largest-magnitude scale
    is on the grid and neither step raises the error, so that the result is
    never worse than it. Deterministic, in float64.
    """
    bits = check_bits(bits)
    if shape is None:
        shape = scale_shape(tuple(weight.shape), granularity)
    if not torch.isfinite(weight).all():
        raise ValueError("weights must be finite; found NaN or infinity")
    if not weight.numel():
        return torch.zeros(shape, device=weight.device)
    rows = rows_by_scale(weight.detach(), shape).abs()
    largest = largest_level(bits, codebook)
    if codebook == "entropy":
        if len(rows) != 1:
            raise ValueError("entropy-coded levels share one scale a tensor")
        alpha = _step_of_rate(rows[0].double(), bits, largest)
    elif largest == 1 and not has_zero(bits, codebook):
        alpha = rows.double().mean(1)  # the same formula with q = sign(w)
    else:
        alpha = search_scales(rows, largest, has_zero(bits, codebook))
    return alpha.float().reshape(shape)


HALVINGS = 16  # of the range of steps: exact to a thousandth of a bit


def _step_of_rate(magnitudes, bits, largest):
    """The step at which rounded values have an entropy of some bits, [1]."""
    peak = magnitudes.max()
    if not peak > 0:
        return peak[None]
    finest, coarsest = peak / largest, 2 * peak
    if entropy_rate(magnitudes / finest) <= bits:
        return finest[None]
    low, high = finest.log(), coarsest.log()
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if entropy_rate(magnitudes / middle.exp()) > bits:
            low = middle
        else:
            high = middle
    return high.exp()[None]


def entropy_rate(steps):
    """Bits a value that the levels of a symmetric tensor cost.

    Their empirical entropy, each sign being a bit of every level but zero,
    and what telling their frequencies costs: (K - 1) / 2 N nats for K levels
    of N values (Miller, 1955).

    Arguments
    ---------
    steps : torch.Tensor
        Magnitudes in units of the step, [values].

    Returns
    -------
    bits : float

    Example
    -------
    >>> round(entropy_rate(torch.tensor([0.0, 0, 1, 1] * 1000)), 2)
    1.5
    """
    counts = torch.bincount((steps + ROUND_UP).floor().long()).double()
    share = counts[counts > 0] / steps.numel()
    signs = 1 - counts[0] / steps.numel()
    levels = 2 * len(share) - 1
    bias = (levels - 1) / (2 * steps.numel() * math.log(2))
    return float(-(share * share.log2()).sum() + signs) + bias


def _work_dtype(dtype):
    """Half floats are computed in float32, double stays double."""
    return torch.promote_types(dtype, torch.float32)
