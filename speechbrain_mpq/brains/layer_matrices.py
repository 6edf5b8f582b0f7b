"""Layers as matrices: outputs = weight x inputs + bias, whatever the layer.

A layer is one or more separate problems of the same size: a linear layer or an
ordinary convolution is one with a row for each output channel, a grouped
convolution or a norm's scale and shift one for each channel.

Layout: weights [problems, rows, columns], inputs [problems, columns, samples],
outputs [problems, rows, samples].
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call


class NoMatrixError(ValueError):
    """A layer that looked like a matrix and is none."""


def is_matrix_layer(layer):
    """Whether a layer can be seen as a matrix.

    These are linear layers, one-dimensional convolutions and everything that
    scales and shifts channels: norms in eval mode, affine maps.

    Arguments
    ---------
    layer : torch.nn.Module
        Plain, not quantized.

    Returns
    -------
    bool

    Example
    -------
    >>> layers = nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), nn.PReLU(), nn.GRU(4, 4)
    >>> [is_matrix_layer(layer) for layer in layers]
    [True, True, False, False]
    """
    if isinstance(layer, nn.Linear | nn.Conv1d):
        return True
    own = {n: p.shape for n, p in layer.named_parameters(recurse=False)}
    return (
        set(own) == {"weight", "bias"}
        and len(own["weight"]) == 1
        and own["weight"] == own["bias"]
    )


def weight_matrix(layer, weight):
    """A layer's weight as matrices.

    Arguments
    ---------
    layer : torch.nn.Module
        A matrix layer.
    weight : torch.Tensor
        In the shape of its weight.

    Returns
    -------
    torch.Tensor
        [problems, rows, columns], a view.

    Example
    -------
    >>> layer = nn.Conv1d(6, 8, 3)
    >>> weight_matrix(layer, layer.weight).shape
    torch.Size([1, 8, 18])
    >>> layer = nn.Conv1d(8, 8, 3, groups=8)
    >>> weight_matrix(layer, layer.weight).shape
    torch.Size([8, 1, 3])
    """
    rows = weight.reshape(len(weight), -1)
    return rows[:, None] if _is_split(layer) else rows[None]


def input_matrix(layer, inputs):
    """What a layer's weight is multiplied with.

    Arguments
    ---------
    layer : torch.nn.Module
        A matrix layer, plain.
    inputs : torch.Tensor
        What goes into it, [batch, ...].

    Returns
    -------
    torch.Tensor
        [problems, columns, samples].

    Example
    -------
    >>> inputs = torch.arange(1.0, 4)[None, None]  # [batch, channels, frames]
    >>> input_matrix(nn.Conv1d(1, 1, 3, padding=1), inputs)
    tensor([[[0., 1., 2.],
             [1., 2., 3.],
             [2., 3., 0.]]])
    """
    if isinstance(layer, nn.Linear):
        return inputs.flatten(0, -2).mT[None]
    if isinstance(layer, nn.Conv1d):
        return _unfolded(layer, inputs)
    return _channels(layer, _unscaled(layer, inputs))


def output_matrix(layer, outputs):
    """What a layer puts out, in the same layout.

    Arguments
    ---------
    layer : torch.nn.Module
        A matrix layer.
    outputs : torch.Tensor
        What comes out of it, [batch, ...].

    Returns
    -------
    torch.Tensor
        [problems, rows, samples].

    Example
    -------
    >>> output_matrix(nn.Conv1d(6, 8, 1), torch.zeros(2, 8, 5)).shape
    torch.Size([1, 8, 10])
    """
    if isinstance(layer, nn.Linear):
        return outputs.flatten(0, -2).mT[None]
    rows = _channels(layer, outputs)  # [channels, 1, samples]
    return rows if _is_split(layer) else rows.mT.reshape(1, len(rows), -1)


def _is_split(layer):
    """Whether every channel is a problem of its own."""
    if isinstance(layer, nn.Linear):
        return False
    return not isinstance(layer, nn.Conv1d) or layer.groups > 1


def _unscaled(layer, inputs):
    """What a norm or affine map scales and shifts."""
    ones, zeros = torch.ones_like(layer.weight), torch.zeros_like(layer.bias)
    plain = functional_call(layer, {"weight": ones, "bias": zeros}, (inputs,))
    expected = _channels(layer, plain) * layer.weight[:, None, None]
    expected = expected + layer.bias[:, None, None]
    found = _channels(layer, layer(inputs))
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
        raise NoMatrixError(
            f"{type(layer).__name__} has a weight and a bias vector but does "
            "not scale and shift channels: leave its network in nearest "
            "rounding"
        )
    return plain


def _channels(layer, values):
    """Values of each channel, [channels, 1, samples]."""
    channels_last = isinstance(layer, nn.LayerNorm)
    return values.movedim(-1 if channels_last else 1, 0).flatten(1)[:, None]


def _unfolded(layer, inputs):
    """The stretch of input under the filter at every output frame."""
    padding = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    frames = F.pad(inputs, padding, mode=mode)
    size, stride, dilation = *layer.kernel_size, *layer.stride, *layer.dilation
    reach = dilation * (size - 1) + 1
    windows = frames.unfold(-1, reach, stride)[..., ::dilation]
    # [batch, groups, channels, frames, taps] -> [groups, columns, samples]
    windows = windows.unflatten(1, (layer.groups, -1))
    columns = windows.permute(1, 2, 4, 0, 3).flatten(3).flatten(1, 2)
    return columns.repeat_interleave(
        layer.out_channels // layer.groups if layer.groups > 1 else 1, 0
    )
