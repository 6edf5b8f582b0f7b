"""The search for the scale with the least squared error (Eq. 6).

Works on magnitudes, as all tables are symmetric: a magnitude's levels are
0, 1, 2, ..., L of Eq. 7's table, or 1, 3, 5, ..., L of a table without zero.
Layout: [rows, ...], each row with a scale of its own.
"""

import torch

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
        Magnitudes [rows, n], float64.
    largest : int
        Largest level of the table; odd where it has no zero.
    zero : bool
        Whether the table has a zero.

    Returns
    -------
    torch.Tensor
        [rows]; 0 for a row of zeros.

    Example
    -------
    >>> rows = torch.tensor([[0.5, 1.0, 1.5], [0.0, 0.0, 0.0]])
    >>> search_scales(rows.double(), 3)
    tensor([0.5000, 0.0000], dtype=torch.float64)
    >>> search_scales(torch.tensor([[0.2, 0.2, 0.6]]).double(), 3, zero=False)
    tensor([0.2000], dtype=torch.float64)
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
    """Starts [rows, starts]: largest magnitude first, then the grid.

    Most starts clip, down to half the mean magnitude; the rest use only the
    first k levels, which is right for weights that lie on a coarse lattice.
    """
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
    """<w, q> and <q, q> of magnitudes [rows, n] for scales [rows, starts].

    With few levels it is cheaper to look their borders up in the sorted
    magnitudes than to round each weight: all begin at the first level, and
    each border between levels p < q that a weight w lies above adds
    (q - p) w to <w, q> and q^2 - p^2 to <q, q>.
    """
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
        rows = rows.sort(1).values
        suffix = _suffix_sums(rows)

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
