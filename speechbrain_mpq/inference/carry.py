"""A mask network on frames that come in pieces, layer by layer.

A convolution of kernel k and dilation d needs d (k - 1) / 2 frames to either
side. Each one keeps the frames that its next ones need, so that no frame is
computed twice and the outputs are those of the whole signal.

Layout: [batch, channels, frames].
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..separation.tcn import ChannelScale, ConvBlock


def can_carry(network):
    """Whether a network is a chain that `CarriedNetwork` knows.

    Arguments
    ---------
    network : torch.nn.Module
        As `tcn.mask_network` makes it.

    Returns
    -------
    known : bool

    Example
    -------
    >>> can_carry(nn.Sequential(nn.Conv1d(2, 4, 1), ConvBlock(4, 8)))
    True
    >>> can_carry(nn.Sequential(nn.Conv1d(2, 4, 3)))
    False
    """
    return isinstance(network, nn.Sequential) and all(
        isinstance(stage, ChannelScale | ConvBlock)
        or (isinstance(stage, nn.Conv1d) and stage.kernel_size == (1,))
        for stage in network
    )


class CarriedNetwork:
    """A chain of layers that remembers what its next frames need.

    Arguments
    ---------
    network : torch.nn.Sequential
        In eval mode; 1x1 convolutions, factors and ConvBlocks.

    Example
    -------
    >>> network = nn.Sequential(ConvBlock(4, 8, dilation=2)).eval()
    >>> carried, inputs = CarriedNetwork(network), torch.randn(1, 4, 9)
    >>> first = carried.push(inputs[..., :5])
    >>> rest = carried.push(inputs[..., 5:], last=True)
    >>> first.shape[2], rest.shape[2]  # two frames wait for what follows
    (3, 6)
    """

    def __init__(self, network):
        self._stages = [
            _CarriedBlock(stage)
            if isinstance(stage, ConvBlock)
            else _Pointwise(stage)
            for stage in network
        ]

    def push(self, inputs, last=False):
        """Take frames, give those whose surroundings are known.

        Arguments
        ---------
        inputs : torch.Tensor
            [batch, inputs, frames].
        last : bool
            The signal ends here.

        Returns
        -------
        outputs : torch.Tensor
            [batch, outputs, frames]; frames may be 0.
        """
        for stage in self._stages:
            inputs = stage.push(inputs, last)
        return inputs


class _Pointwise:
    """A layer that sees one frame at a time."""

    def __init__(self, layer):
        self.layer = layer

    def push(self, x, last):
        """Apply to [batch, channels, frames]."""
        if x.shape[2]:
            return self.layer(x)
        channels = getattr(self.layer, "out_channels", x.shape[1])
        return x.new_zeros(len(x), channels, 0)


class _CarriedBlock:
    """A ConvBlock whose input comes in pieces."""

    def __init__(self, block):
        conv = block.d_conv
        self.block = block
        self.span = conv.dilation[0] * (conv.kernel_size[0] - 1)
        self.margin = conv.padding[0]
        self.kept = None  # inputs of the depthwise convolution
        self.skip = None  # inputs of the block, around it

    def push(self, x, last):
        """As `ConvBlock.forward`, on what has come so far."""
        block = self.block
        y = self._convolve(self._widen(x), last)
        skip = x if self.skip is None else torch.cat([self.skip, x], dim=2)
        passed = skip[..., : y.shape[2]]
        self.skip = skip[..., y.shape[2] :].clone()
        if not y.shape[2]:
            return passed
        y = block.norm_out(block.prelu_out(y))
        return passed + block.conv_1x1_out(y)

    def _widen(self, x):
        """What comes before the depthwise convolution."""
        block = self.block
        if not x.shape[2]:
            return x.new_zeros(len(x), block.d_conv.in_channels, 0)
        return block.norm_in(block.prelu_in(block.conv_1x1_in(x)))

    def _convolve(self, y, last):
        """The depthwise convolution, padded at the signal's ends only."""
        zeros = y.new_zeros(*y.shape[:2], self.margin)
        pieces = [zeros if self.kept is None else self.kept, y]
        y = torch.cat(pieces + [zeros] * last, dim=2)
        self.kept = y[..., max(0, y.shape[2] - self.span) :].clone()
        if y.shape[2] <= self.span:
            return y[..., :0]
        conv = self.block.d_conv
        return F.conv1d(
            y,
            conv.weight,
            conv.bias,
            dilation=conv.dilation,
            groups=conv.groups,
        )
