"""Second moments of a layer's inputs, and what they say about its outputs.

With the inputs X [columns, samples] of a layer and their moment H = X X^T, the
squared error that other weights Q cause at its outputs is
tr((W - Q) H (W - Q)^T).

Layout: weights [..., rows, columns], moments [..., columns, columns].
"""

import torch


def damped_moment(moment, damping=0.01):
    """A second moment that can be factorized, whatever the inputs.

    Arguments
    ---------
    moment : torch.Tensor
        X X^T, [..., columns, columns].
    damping : float
        Added to the diagonal, as a share of its mean. Columns without any
        input become independent of the others; without any input at all the
        result is the identity, which means nearest rounding.

    Returns
    -------
    torch.Tensor
        float64.

    Example
    -------
    >>> damped_moment(torch.tensor([[4.0, 0.0], [0.0, 0.0]]), 0.5)
    tensor([[5., 0.],
            [0., 1.]], dtype=torch.float64)
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
    """The float weight that comes closest to given outputs (ridge regression).

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
    damping : float
        d as a share of the moment's mean diagonal.

    Returns
    -------
    torch.Tensor
        float64.

    Example
    -------
    >>> weight, moment = torch.tensor([[1.0]]), torch.tensor([[2.0]])
    >>> regressed_weight(weight, torch.tensor([[3.0]]), moment, 1e-6)
    tensor([[1.5000]], dtype=torch.float64)
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
    """Squared output error of every row, the diagonal of (W-Q) H (W-Q)^T.

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

    Example
    -------
    >>> weight, rounded = torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])
    >>> output_error(weight, rounded, torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
    tensor([0.0500])
    """
    error = weight - rounded
    return ((error @ moment) * error).sum(-1)
