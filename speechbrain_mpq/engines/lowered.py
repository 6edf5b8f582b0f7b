"""What a mask network is to an engine: plain numbers in frozen records.

Layout: weights are [outputs, inputs / groups, kernel]; activations are
[batch, channels, frames].
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Convolution:
    """A convolution of stride 1 that keeps the number of frames.

    Its weights are `levels` times the `scale` of their output channel.

    Arguments
    ---------
    name : str
        Name of the layer.
    bits : int or float
        Widest stored bits of its weights; 32: floating point.
    levels : np.ndarray
        [outputs, inputs / groups, kernel]; int8 up to 8 bits, int16 up to 16
        bits, float32 where the weights are stored in floating point.
    scale : np.ndarray
        [outputs], float32.
    bias : np.ndarray or None
        [outputs], float32.
    dilation : int
    groups : int
    """

    name: str
    bits: int | float
    levels: np.ndarray
    scale: np.ndarray
    bias: np.ndarray | None = None
    dilation: int = 1
    groups: int = 1

    @property
    def is_int8(self):
        """Whether int8 holds the stored integers."""
        return self.levels.dtype == np.int8

    @property
    def padding(self):
        """Zeros on either side."""
        return self.dilation * (self.levels.shape[2] - 1) // 2

    def values(self):
        """The weights themselves, float32."""
        return self.levels.astype(np.float32) * self.scale[:, None, None]


@dataclass(frozen=True)
class Affine:
    """Scale and shift of every channel: a folded batch normalization.

    Arguments
    ---------
    scale, shift : np.ndarray
        [channels], float32.
    """

    scale: np.ndarray
    shift: np.ndarray


@dataclass(frozen=True)
class Block:
    """A ConvBlock; its input is added to its output.

    The shift of its second norm is part of the bias of `conv_out`, which
    pads nothing. The first norm keeps its own: the depthwise convolution
    pads with zeros behind it.

    Arguments
    ---------
    name : str
    conv_in, d_conv, conv_out : Convolution
    slope_in, slope_out : float
        Of the PReLUs.
    norm_in : Affine
    gain_out : np.ndarray
        [hidden], float32: the scale of the second norm.
    """

    name: str
    conv_in: Convolution
    slope_in: float
    norm_in: Affine
    d_conv: Convolution
    slope_out: float
    gain_out: np.ndarray
    conv_out: Convolution


@dataclass(frozen=True)
class MaskNetwork:
    """What stands between features and mask.

    Arguments
    ---------
    scale_in : np.ndarray or None
        [inputs], factor of every input.
    conv_in : Convolution
    blocks : tuple of Block
    conv_out : Convolution
    """

    scale_in: np.ndarray | None
    conv_in: Convolution
    blocks: tuple
    conv_out: Convolution

    @property
    def inputs(self):
        """Features per frame."""
        return self.conv_in.levels.shape[1]

    @property
    def outputs(self):
        """Mask values per frame."""
        return self.conv_out.levels.shape[0]

    def convolutions(self):
        """All convolutions, in the order of their work."""
        yield self.conv_in
        for block in self.blocks:
            yield from (block.conv_in, block.d_conv, block.conv_out)
        yield self.conv_out

    @property
    def context_frames(self):
        """Frames to either side that a frame of the mask depends on."""
        return sum(layer.padding for layer in self.convolutions())

    def operations(self):
        """Additions and multiplications of the convolutions per frame."""
        return sum(2 * layer.levels.size for layer in self.convolutions())
