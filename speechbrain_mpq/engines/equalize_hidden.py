"""Channels of one size, where a depthwise convolution reads them.

An engine that knows one range for all channels of an activation rounds small
channels away. Between the convolutions of a block every channel may have any
positive size: what the convolution before it multiplies, the depthwise one
divides. Only their float scales change, no stored integer does.
"""

from dataclasses import replace

import numpy as np

from .activations import SIGNED
from .lowered import Affine


def equalize_hidden(network, ranges):
    """A network that computes the same, its depthwise inputs of one range.

    The scales of the norms go into the convolutions before them where all
    are positive, which PReLU lets through.

    Arguments
    ---------
    network : lowered.MaskNetwork
    ranges : dict of str -> ActivationRange
        From `activations.calibrate`.

    Returns
    -------
    network : lowered.MaskNetwork
        What its depthwise convolutions read lies in -128 to 127.
    """
    blocks = [
        _equalized(block, ranges[block.d_conv.name].scale)
        for block in network.blocks
    ]
    return replace(network, blocks=tuple(blocks))


def _equalized(block, sizes):
    """A block whose depthwise convolution reads its input over `sizes`."""
    if not block.d_conv.is_int8:
        return block
    d_conv = _times(block.d_conv, sizes)
    gain = block.norm_in.scale / sizes
    conv_in, gain = _take_in(block.conv_in, gain)
    d_conv, gain_out = _take_in(d_conv, block.gain_out)
    return replace(
        block,
        conv_in=conv_in,
        norm_in=Affine(gain, block.norm_in.shift / sizes),
        d_conv=d_conv,
        gain_out=gain_out,
    )


def _take_in(conv, gain):
    """The convolution times the gain behind its PReLU, and what is left."""
    if (gain <= 0).any():
        return conv, gain
    return _times(conv, gain), np.ones_like(gain)


def _times(conv, factor):
    """A convolution whose output channels are multiplied."""
    bias = None if conv.bias is None else conv.bias * factor
    return replace(conv, scale=conv.scale * factor, bias=bias)


def one_range(unit):
    """The range of all channels after `equalize_hidden`.

    Arguments
    ---------
    unit : ActivationRange
        Of each channel before.

    Returns
    -------
    unit : ActivationRange
    """
    if (unit.zero_point != SIGNED).any():
        raise ValueError("depthwise inputs need signed ranges")
    return replace(unit, scale=np.float32(1), zero_point=np.int64(SIGNED))
