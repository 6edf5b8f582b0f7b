"""Rounding a weight matrix by what it does to the layer's outputs.

Nearest rounding treats every weight alone. Here the layer's squared output
error on calibration inputs X [columns, samples] counts: with the second moment
H = X X^T of the inputs, the error that other weights Q cause is
tr((W - Q) H (W - Q)^T). The rounding error of one column is fed back into the
columns that are not rounded yet, as in GPTQ (Frantar et al., ICLR 2023). The
order of its steps is that of Babai's nearest plane: one Cholesky factor of H,
last column first.

Layout: weights [..., rows, columns], moments [..., columns, columns], scales
broadcastable to the weights. Everything is computed in float64.
"""

import torch

from .codebook import nearest_levels
from .fake_quant import FakeQuantize


def damped_moment(moment, damping=0.01):
    """Damps a second moment: it can be factorized, whatever the inputs.

    Arguments
    ---------
    moment : torch.Tensor
        X X^T, [..., columns, columns].
    """
    if not damping > 0:
        raise ValueError(f"damping must be positive, not {damping!r}")
    if not torch.isfinite(moment).all():
        raise ValueError(
            "the calibration inputs have NaN or infinite values: check the "
            "data and the float weights"
        )
    moment = moment.double()
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    level = damping * diagonal.mean(-1, keepdim=True)
    level = torch.where(level > 0, level, 1.0).expand_as(diagonal)
    return moment + torch.diag_embed(level)


def regressed_weight(weight, cross, moment, damping=0.01):
    """Regresses the float weight that comes closest to given outputs.

    Minimizes |Y - V X|^2 + d |V - W|^2 over V: where the inputs X are not
    those that W was trained on, V makes up for it as far as it can.

    Arguments
    ---------
    weight : torch.Tensor
        W, [..., rows, columns].
    cross : torch.Tensor
        Y X^T, [..., rows, columns].
    moment : torch.Tensor
        X X^T, [..., columns, columns], not damped.
    """
    if not torch.isfinite(cross).all():
        raise ValueError(
            "the outputs to come close to have NaN or infinite values: check "
            "the data and the float weights"
        )
    damped = damped_moment(moment, damping)
    cross = cross.double() + weight.double() @ (damped - moment)
    factor = torch.linalg.cholesky(damped)
    return torch.cholesky_solve(cross.mT, factor).mT


def output_error(weight, rounded, moment):
    """Computes each row's squared output error: diagonal of (W-Q) H (W-Q)^T.

    Arguments
    ---------
    weight, rounded : torch.Tensor
        [..., rows, columns].
    moment : torch.Tensor
        [..., columns, columns].

    Returns
    -------
    torch.Tensor
        [..., rows].
    """
    error = weight - rounded
    return ((error @ moment) * error).sum(-1)


BLOCK = 64  # columns; feedback between blocks is one matrix product
SCALES = (0.6, 1.4, 9)  # tried, relative to the given one: first, last, count


class PostTraining(FakeQuantize):
    """Fake quantization that is final once it is fitted: nothing is trained.

    Name it as the estimator of a system without fine-tuning.

    Arguments
    ---------
    bits : int or float
        Bits of one value.
    alpha : torch.Tensor or float
        Scale, broadcastable to the weight.

    Example
    -------
    >>> PostTraining.trains
    False
    >>> PostTraining(2, 0.5)(torch.tensor([0.6, -0.1]))
    tensor([0.5000, 0.0000])
    """

    trains = False


def feedback_levels(
    weight, moment, bits, alpha, codebook="midtread", by_activity=True
):
    """Rounds column after column with error feedback (GPTQ).

    With H = R^T R and R upper triangular, column i takes on the errors of all
    columns behind it: round(w_i + sum_j>i R_ij (w_j - q_j) / R_ii).

    Arguments
    ---------
    weight : torch.Tensor
        [..., rows, columns].
    moment : torch.Tensor
        Positive definite, [..., columns, columns] (see ``damped_moment``).
    """
    factor, order = _unit_factor(moment.double(), by_activity)
    # Column by column in memory, and scales in the same layout.
    columns = weight.double().mT[..., order, :].contiguous()
    alpha = torch.as_tensor(alpha).double()
    if alpha.dim():
        alpha = alpha.expand(*weight.shape[:-1], 1)[..., 0]
    levels, error = torch.empty_like(columns), torch.zeros_like(columns)
    for stop in range(columns.shape[-2], 0, -BLOCK):
        start = max(stop - BLOCK, 0)
        later_errors = factor[..., start:stop, stop:] @ error[..., stop:, :]
        for i in range(stop - 1, start - 1, -1):
            inner = factor[..., i : i + 1, i + 1 : stop]
            fed = (inner @ error[..., i + 1 : stop, :])[..., 0, :]
            target = columns[..., i, :] + later_errors[..., i - start, :] + fed
            level = nearest_levels(target, bits, alpha, codebook)
            levels[..., i, :] = level
            error[..., i, :] = columns[..., i, :] - level * alpha
    return levels[..., order.argsort(), :].mT.contiguous()


def calibrated_levels(weight, moment, bits, alpha, codebook="midtread"):
    """Rounds with error feedback, or to the nearest where that does better.

    Row by row the output error is never above that of nearest rounding;
    feedback alone has no such guarantee, as the table ends somewhere. Arguments
    are those of `feedback_levels`.
    """
    levels, _ = _better_levels(weight, moment, bits, alpha, codebook)
    return levels


def calibrated_scale(weight, moment, bits, alpha, codebook="midtread"):
    """Searches the scale near a given one whose calibrated levels err least.

    Arguments
    ---------
    weight : torch.Tensor
        [..., rows, columns].
    moment : torch.Tensor
        Positive definite, [..., columns, columns].
    alpha : torch.Tensor
        Where to search: one value, or one for each row [..., rows, 1].
    """
    alpha, weight = torch.as_tensor(alpha).double(), weight.double()
    grid = torch.linspace(*SCALES, dtype=torch.float64).tolist()
    tried = [alpha * factor for factor in grid]
    # Scales side by side as more rows: the moment is factorized once.
    scales = torch.cat([s.expand(*weight.shape[:-1], 1) for s in tried], -2)
    many = torch.cat([weight] * len(tried), -2)
    _, error = _better_levels(many, moment, bits, scales, codebook)
    error = torch.stack(error.split(weight.shape[-2], -1))
    tried = torch.stack(tried)
    if alpha.dim():
        return tried.gather(0, error.argmin(0, keepdim=True)[..., None])[0]
    return tried[error.flatten(1).sum(1).argmin()]


def _better_levels(weight, moment, bits, alpha, codebook):
    """Levels with the least error of each row, and this error."""
    weight, moment = weight.double(), moment.double()
    alpha = torch.as_tensor(alpha).double()
    nearest = nearest_levels(weight, bits, alpha, codebook)
    fed = feedback_levels(weight, moment, bits, alpha, codebook)
    nearest_error = output_error(weight, nearest * alpha, moment)
    fed_error = output_error(weight, fed * alpha, moment)
    better = (fed_error < nearest_error)[..., None]
    levels = torch.where(better, fed, nearest)
    return levels, torch.minimum(fed_error, nearest_error)


def _unit_factor(moment, by_activity):
    """Cholesky factor R of a moment over its diagonal, and column order."""
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    if by_activity:
        # One order for all matrices of a batch keeps them together.
        order = diagonal.reshape(-1, diagonal.shape[-1]).mean(0).argsort()
    else:
        order = torch.arange(moment.shape[-1], device=moment.device)
    sorted_moment = moment[..., order, :][..., order]
    factor, failed = torch.linalg.cholesky_ex(sorted_moment, upper=True)
    if failed.any():
        raise ValueError(
            "the second moment is not positive definite: add more damping"
        )
    return factor / factor.diagonal(dim1=-2, dim2=-1)[..., None], order
