"""Super-network of TDNN-F layers with bottlenecks of all candidate sizes.

"Neural architecture search for LF-MMI trained time delay neural networks"
(ICASSP 2021) and "Towards green ASR" (Interspeech 2022): a layer has the two
matrices of its largest candidate, and the candidate of n dimensions uses the
first n rows of the one and columns of the other. Rows of a semi-orthogonal
matrix are semi-orthogonal: keeping the large one so keeps all candidates so.
"""

from functools import partial

import torch
from torch.nn.functional import conv1d

from .tdnnf import TDNNFLayer


def mixed_outputs(outputs, weights):
    """What a layer of all candidates puts out: sum_i lambda_i phi(W_i h).

    Arguments
    ---------
    outputs : iterable of torch.Tensor
        phi(W_i h) of each candidate.
    weights : torch.Tensor
        lambda, [candidates].

    Example
    -------
    >>> mixed_outputs([torch.ones(2), torch.zeros(2)], torch.tensor([0.3, 0.7]))
    tensor([0.3000, 0.3000])
    """
    return sum(weight * output for weight, output in zip(weights, outputs))


def layer_parameters(size, bottleneck, stride):
    """Parameters of a TDNNFLayer: two matrices and one bias.

    Example
    -------
    >>> layer_parameters(1536, 160, stride=3), layer_parameters(1536, 160, 0)
    (984576, 493056)
    """
    taps = 2 if stride else 1
    return 2 * taps * size * bottleneck + size


def check_candidates(candidates, size):
    """Bottlenecks that a layer can be searched for, as a tuple.

    Arguments
    ---------
    candidates : sequence of int
        At least two, each larger than the one before.
    size : int
        Dimensions of the layers.
    """
    candidates = tuple(candidates)
    rising = all(a < b for a, b in zip(candidates, candidates[1:]))
    whole = all(type(n) is int and n > 0 for n in candidates)
    if len(candidates) < 2 or not whole or not rising:
        raise ValueError(
            f"candidates {list(candidates)}: give two bottlenecks or more, as "
            "whole numbers that increase, such as [8, 16, 24]"
        )
    if candidates[-1] > size:
        raise ValueError(
            f"candidate {candidates[-1]} is more than the {size} dimensions of "
            "the layer: leave it out"
        )
    return candidates


class SupernetLayer(TDNNFLayer):
    """TDNN-F layer with one of several bottlenecks, or a mixture of all.

    Arguments
    ---------
    size : int
        Dimensions of input and output.
    candidates : sequence of int
        Bottlenecks, increasing.
    stride : int
        See TDNNFLayer.
    **options : dict
        As for TDNNFLayer.

    Example
    -------
    >>> layer = SupernetLayer(8, [2, 4], stride=1)
    >>> x = torch.randn(1, 8, 20, generator=torch.Generator().manual_seed(0))
    >>> layer.chosen = 0  # the first candidate
    >>> small = layer(x)
    >>> layer.mixture = lambda: torch.tensor([1.0, 0.0])
    >>> torch.allclose(layer(x), small, atol=1e-6)
    True
    """

    def __init__(self, size, candidates, stride, **options):
        candidates = check_candidates(candidates, size)
        super().__init__(size, candidates[-1], stride, **options)
        self.candidates = candidates
        self.chosen = len(candidates) - 1
        self.mixture = None  # where it is set, a function: lambda

    def forward(self, x):
        """Features [B, size, T] to [B, size, T - 2 stride]."""
        if self.mixture is not None:
            outputs = map(self._activated, self._affine_outputs(x))
            y = mixed_outputs(outputs, self.mixture())
        else:
            n = self.candidates[self.chosen]
            y = self._conv(x, self.linear.weight[:n])
            weight = self.affine.weight[:, :n].contiguous()
            y = self._activated(self._conv(y, weight, self.affine.bias))
        return self._with_bypass(y, x)

    def _conv(self, x, weight, bias=None):
        """One of the two maps, by a part of its weight."""
        return conv1d(x, weight, bias, dilation=self.linear.dilation)

    def _affine_outputs(self, x):
        """W_i x + b of each candidate; each adds its columns to the last."""
        bottleneck = self._conv(x, self.linear.weight)
        starts = (0, *self.candidates)
        total, bias = 0, self.affine.bias
        for start, stop in zip(starts, self.candidates):
            columns = self.affine.weight[:, start:stop].contiguous()
            total = total + self._conv(bottleneck[:, start:stop], columns, bias)
            bias = None
            yield total


def supernet_(model, candidates):
    """Give all layers of a network all candidates, in place.

    The layers are new ones; what they had learned is lost.

    Arguments
    ---------
    model : TDNNF
    candidates : sequence of int
        Bottlenecks, increasing, of every layer.

    Returns
    -------
    TDNNF
        The model.

    Example
    -------
    >>> from speechbrain_mpq.lobes.models.tdnnf import TDNNF
    >>> model = TDNNF(5, 6, size=16, bottlenecks=[4] * 2, strides=[1, 3])
    >>> model = supernet_(model, [2, 4, 8])
    >>> choose(model, [0, 2])
    >>> model(torch.zeros(1, 9, 5)).shape
    torch.Size([1, 3, 6])
    >>> costs, others = parameter_costs(model)
    >>> costs
    tensor([[144, 272, 528],
            [144, 272, 528]])
    """
    size = model.settings["size"]
    layers = [
        SupernetLayer(
            size, candidates, old.stride, bypass=old.bypass, scale=old.scale
        )
        for old in model.layers
    ]
    model.layers = torch.nn.ModuleList(layers)
    model.settings["bottlenecks"] = [layers[0].candidates[-1]] * len(layers)
    return model


def choose(model, choice):
    """One candidate of each layer, the others being out of play.

    Arguments
    ---------
    model : TDNNF
        Of supernet_.
    choice : sequence of int
        Index of each layer's candidate.
    """
    for layer, index in zip(model.layers, choice, strict=True):
        layer.chosen, layer.mixture = index, None


def mix(model, weights):
    """All candidates of each layer, mixed by weights.

    Arguments
    ---------
    model : TDNNF
        Of supernet_.
    weights : sequence of callable
        For each layer, a function whose value is lambda, [candidates].
    """
    for layer, mixture in zip(model.layers, weights, strict=True):
        layer.mixture = mixture


def parameter_costs(model):
    """Parameters of each candidate, and those of all that is not searched.

    Arguments
    ---------
    model : TDNNF
        Of supernet_.

    Returns
    -------
    costs : torch.Tensor
        [layers, candidates].
    others : int
        Of the rest, without the head that only training needs.
    """
    size = model.settings["size"]
    costs = torch.tensor(
        [
            [layer_parameters(size, n, layer.stride) for n in layer.candidates]
            for layer in model.layers
        ]
    )
    parts = [m for name, m in model.named_children() if name != "xent"]
    counted = sum(p.numel() for m in parts for p in m.parameters())
    return costs, counted - int(costs[:, -1].sum())


def uniform_bottleneck(model, parameters):
    """The one bottleneck of all layers whose network is next in size.

    Arguments
    ---------
    model : TDNNF
        Of supernet_.
    parameters : int
        Of all searched layers together.
    """
    size = model.settings["size"]

    def distance(n):
        count = partial(layer_parameters, size, n)
        return abs(sum(count(la.stride) for la in model.layers) - parameters)

    return min(range(1, size + 1), key=distance)
