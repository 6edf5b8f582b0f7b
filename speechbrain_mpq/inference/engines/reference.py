"""What a lowered mask network computes, in plain PyTorch.

It is what engines are held against: once without ranges, where it must be
the separator's own network, and once with them, where every activation is
rounded as an int8 engine rounds it.
"""

import torch
import torch.nn.functional as F


def run(network, inputs, hook=None):
    """Run a lowered network in PyTorch.

    Arguments
    ---------
    network : lowered.MaskNetwork
    inputs : torch.Tensor
        Features [batch, inputs, frames].
    hook : callable or None
        Is given the name of every point and the tensor there, and returns
        what to go on with. What a convolution reads has its name; what it
        gives has ":out" behind it, and ":prelu" after its PReLU.

    Returns
    -------
    mask : torch.Tensor
        [batch, outputs, frames].
    """
    hook = hook or (lambda name, x: x)

    def convolve(layer, x, slope=None):
        x = hook(layer.name, x)
        y = hook(f"{layer.name}:out", _convolution(layer, x))
        if slope is None:
            return y
        return hook(f"{layer.name}:prelu", _prelu(y, slope))

    x = inputs
    if network.scale_in is not None:
        x = x * _column(network.scale_in)
    x = convolve(network.conv_in, x)
    for block in network.blocks:
        y = convolve(block.conv_in, x, block.slope_in)
        y = y * _column(block.norm_in.scale) + _column(block.norm_in.shift)
        y = convolve(block.d_conv, y, block.slope_out)
        x = x + convolve(block.conv_out, y * _column(block.gain_out))
    return convolve(network.conv_out, x)


def rounding(network, ranges):
    """Make a `hook` that rounds what int8 convolutions read.

    Arguments
    ---------
    network : lowered.MaskNetwork
    ranges : dict of str -> activations.ActivationRange
        Empty: nothing is rounded.

    Returns
    -------
    hook : callable
    """
    int8 = {x.name for x in network.convolutions() if x.is_int8} & set(ranges)

    def hook(name, x):
        return fake_quantize(x, ranges[name]) if name in int8 else x

    return hook


def fake_quantize(x, unit):
    """Round activations to what eight bits can name.

    Arguments
    ---------
    x : torch.Tensor
        [batch, channels, frames].

    Example
    -------
    >>> import numpy as np
    >>> from .activations import ActivationRange
    >>> unit = ActivationRange(np.float32(0.5), np.int64(1))
    >>> fake_quantize(torch.tensor([[[-9.0, 0.6, 1e9]]]), unit)
    tensor([[[ -0.5000,   0.5000, 127.0000]]])
    """
    scale = torch.as_tensor(unit.scale).reshape(-1, 1)
    zero_point = torch.as_tensor(unit.zero_point).reshape(-1, 1)
    index = (torch.round(x / scale) + zero_point).clamp(0, 255)
    return (index - zero_point) * scale


def decibels(reference, estimate):
    """Compute the signal-to-noise ratio of an engine's output.

    Returns
    -------
    snr : float
        dB.
    """
    signal = reference.double().square().sum()
    noise = (reference.double() - estimate.double()).square().sum()
    return (10 * torch.log10(signal / noise)).item()


def _convolution(layer, x):
    """One convolution and its bias."""
    return F.conv1d(
        x,
        torch.from_numpy(layer.values()),
        None if layer.bias is None else torch.from_numpy(layer.bias),
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
    )


def _prelu(x, slope):
    """PReLU of one slope."""
    return torch.where(x < 0, slope * x, x)


def _column(values):
    """[channels] for [batch, channels, frames]."""
    return torch.from_numpy(values)[:, None]
