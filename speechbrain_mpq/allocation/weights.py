"""The weights of a network, cluster by cluster, as the scores look at them.

Names carry the name of the network in its model, so that patterns and cluster
names are those of the whole model.
"""

import math
from contextlib import contextmanager

import torch
import torch.nn as nn

from ..quantization.codebook import scale_shape
from ..quantization.quantizer import cluster_quantized
from ..quantization.row_groups import split_name


def named_under(prefix, network):
    """A module around the network whose parameters carry the prefix.

    Arguments
    ---------
    prefix : str
        Name with dots, or "" for none.
    network : torch.nn.Module
        Any module; it is not copied.

    Returns
    -------
    root : torch.nn.Module

    Example
    -------
    >>> root = named_under("model.mask_net", nn.PReLU())
    >>> [name for name, _ in root.named_parameters()]
    ['model.mask_net.weight']
    """
    for name in reversed(prefix.split(".") if prefix else []):
        network = nn.ModuleDict({name: network})
    return network


def tensor_of(root, name):
    """A parameter by name, or some rows of it, as its module sees it.

    Arguments
    ---------
    root : torch.nn.Module
        Module that the name starts from.
    name : str
        Name of a parameter, or of a slice such as "conv.weight[0:32]".

    Returns
    -------
    weight : torch.Tensor
        Detached, not copied.

    Example
    -------
    >>> tensor_of(nn.Sequential(nn.PReLU(init=0.5)), "0.weight")
    tensor([0.5000])
    """
    name, rows = split_name(name)
    module, _, attribute = name.rpartition(".")
    return getattr(root.get_submodule(module), attribute).detach()[rows]


def table_sizes(root, members, granularity):
    """What a score table says of every cluster besides its scores.

    Arguments
    ---------
    root : torch.nn.Module
        Network under its prefix.
    members : dict of str -> list of str
        Cluster name -> names of its parameters or slices.
    granularity : str
        "tensor" or "channel".

    Returns
    -------
    sizes : dict
        Arguments tensors, scales and rest_parameters of `ScoreTable`.

    Example
    -------
    >>> network = nn.Sequential(nn.Linear(3, 2))
    >>> sizes = table_sizes(network, {"0": ["0.weight"]}, "channel")
    >>> sizes["tensors"], sizes["scales"], sizes["rest_parameters"]
    ({'0': {'0.weight': 6}}, {'0': 2}, 2)
    """
    tensors, scales = {}, {}
    for cluster, names in members.items():
        shapes = [tuple(tensor_of(root, name).shape) for name in names]
        tensors[cluster] = dict(zip(names, map(math.prod, shapes)))
        scales[cluster] = sum(
            math.prod(scale_shape(shape, granularity)) for shape in shapes
        )
    total = sum(weight.numel() for weight in root.parameters())
    inside = sum(sum(row.values()) for row in tensors.values())
    return {
        "tensors": tensors,
        "scales": scales,
        "rest_parameters": total - inside,
    }


def quantized_values(
    root, cluster, names, bits, granularity, codebook="midtread", rows=None
):
    """The values that a cluster's tensors get at some bits.

    Arguments
    ---------
    root : torch.nn.Module
        Full-precision network under its prefix, left as it was found.
    cluster : str
        Name of the cluster.
    names : list of str
        Names of its parameters or slices.
    bits : int or float
        Bits of its values.
    granularity : str
        "tensor" or "channel".
    codebook : str
        Kind of quantization table (see `quantize_`).
    rows : int or None
        Most output channels of one slice (see `clusters`).

    Returns
    -------
    values : dict of str -> torch.Tensor

    Example
    -------
    >>> network = nn.Sequential(nn.PReLU(2))
    >>> _ = network[0].weight.data.copy_(torch.tensor([0.5, 0.1]))
    >>> quantized_values(network, "0", ["0.weight"], 2, "tensor")
    {'0.weight': tensor([0.5000, 0.0000])}
    """
    with cluster_quantized(
        root, cluster, bits, names, (), granularity, codebook, rows
    ):
        return {name: tensor_of(root, name).clone() for name in names}


@contextmanager
def replaced(module, values):
    """Other values in some parameters; the old ones come back bit-exact.

    In place, not by `functional_call`: that one leaves a module which stands
    twice in a network with the new values. No gradients.

    Arguments
    ---------
    module : torch.nn.Module
        Module that the names start from.
    values : dict of str -> torch.Tensor
        Name of a parameter or slice -> its value inside the ``with`` block.

    Example
    -------
    >>> layer = nn.PReLU(init=0.5)
    >>> with replaced(layer, {"weight": torch.ones(1)}):
    ...     print(layer.weight.item())
    1.0
    >>> layer.weight.item()
    0.5
    """
    places = {name: tensor_of(module, name) for name in values}
    saved = {name: place.clone() for name, place in places.items()}
    with torch.no_grad():
        try:
            for name, value in values.items():
                places[name].copy_(value)
            yield
        finally:
            for name, value in saved.items():
                places[name].copy_(value)
