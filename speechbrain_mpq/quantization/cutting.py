"""Cutting the tensors of a model into slices with bits of their own."""

from collections import Counter

from .row_groups import count_slices, row_slices, split_name


def cut(tensors, rows):
    """Cuts large matrices and filters into slices of rows.

    Arguments
    ---------
    tensors : dict of str -> NamedTensor
        As made by ``named_tensors``.
    rows : int or None
        Most output channels of one slice; None leaves all as it is.

    Returns
    -------
    dict of str -> NamedTensor

    Example
    -------
    >>> import torch
    >>> from speechbrain_mpq.quantization.tensors import named_tensors
    >>> list(cut(named_tensors(torch.nn.Linear(2, 5)), 3))
    ['weight[0:2]', 'weight[2:5]', 'bias']
    """
    counts = {
        name: count_slices(tuple(tensor.parameter.shape), rows)
        for name, tensor in tensors.items()
    }
    return _cut(tensors, counts)


def cut_as_named(tensors, names):
    """Cuts tensors into as many slices as names tell.

    Arguments
    ---------
    tensors : dict of str -> NamedTensor
        As made by ``named_tensors``.
    names : iterable of str
        Names of tensors and slices, e.g. those of a plan.

    Returns
    -------
    dict of str -> NamedTensor

    Example
    -------
    >>> import torch
    >>> from speechbrain_mpq.quantization.tensors import named_tensors
    >>> tensors = named_tensors(torch.nn.Linear(2, 5))
    >>> list(cut_as_named(tensors, ["weight[0:2]", "weight[2:5]"]))
    ['weight[0:2]', 'weight[2:5]', 'bias']
    """
    names = [split_name(name) for name in names]
    return _cut(tensors, Counter(name for name, rows in names if rows != ...))


def _cut(tensors, counts):
    """Slices of the tensors that more than one are wanted of."""
    pieces = []
    for name, tensor in tensors.items():
        count = counts.get(name, 1)
        if count == 1 or tensor.reason:
            pieces.append(tensor)
        else:
            length = len(tensor.parameter)
            pieces += [tensor.slice(r) for r in row_slices(length, count)]
    return {piece.name: piece for piece in pieces}
