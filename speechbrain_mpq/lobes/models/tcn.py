"""The temporal convolutional network of Fig. 1: ConvBlocks and their stack.

Layout: [batch, channels, frames].
"""

import re
from collections import OrderedDict

import torch
import torch.nn as nn

MAX_BLOCKS, MAX_LAYERS = 64, 16  # of a separator
OCTAVES = 6  # between the least and the largest factor: 1 to 64


class ChannelAffine(nn.Module):
    """Scale and shift per channel: what batch normalization is at inference.

    Arguments
    ---------
    channels : int
        Number of channels.

    Example
    -------
    >>> affine = ChannelAffine(2)
    >>> _ = affine.bias.data.fill_(1.0)
    >>> affine(torch.zeros(1, 2, 3)).sum().item()
    6.0
    """

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        """Apply to [batch, channels, frames]."""
        return torch.addcmul(self.bias[:, None], x, self.weight[:, None])

    @classmethod
    def folded_from(cls, norm):
        """Make the affine map that a BatchNorm1d is in eval mode."""
        affine = cls(norm.num_features).to(norm.weight.device)
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        affine.weight.data.copy_(scale)
        affine.bias.data.copy_(norm.bias - norm.running_mean * scale)
        return affine


class ChannelScale(nn.Module):
    """A factor per channel.

    Arguments
    ---------
    channels : int
        Number of channels.

    Example
    -------
    >>> ChannelScale(2)(torch.ones(1, 2, 3)).sum().item()
    6.0
    """

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        """Apply to [batch, channels, frames]."""
        return x * self.weight[:, None]


class ConvBlock(nn.Module):
    """Dilated 1-D ConvBlock: the seven sublayers of the paper's Fig. 1 and 3.

    1x1 conv, PReLU, norm, depthwise conv (D-conv), PReLU, norm, 1x1 conv, and
    a skip connection around them.

    Arguments
    ---------
    channels : int
        Channels between the blocks (the paper's 256).
    hidden : int
        Channels of the depthwise convolution (the paper's 512).
    kernel_size : int
        Of the depthwise convolution.
    dilation : int
        Of the depthwise convolution.

    Example
    -------
    >>> block = ConvBlock(4, 8, kernel_size=3, dilation=2)
    >>> block(torch.randn(1, 4, 10)).shape
    torch.Size([1, 4, 10])
    >>> len(list(block.children()))
    7
    """

    def __init__(self, channels, hidden, kernel_size=3, dilation=1):
        super().__init__()
        self.conv_1x1_in = nn.Conv1d(channels, hidden, 1, bias=False)
        self.prelu_in = nn.PReLU()
        self.norm_in = nn.BatchNorm1d(hidden)
        self.d_conv = nn.Conv1d(
            hidden,
            hidden,
            kernel_size,
            padding=dilation * (kernel_size - 1) // 2,
            dilation=dilation,
            groups=hidden,
            bias=False,
        )
        self.prelu_out = nn.PReLU()
        self.norm_out = nn.BatchNorm1d(hidden)
        self.conv_1x1_out = nn.Conv1d(hidden, channels, 1, bias=False)

    def forward(self, x):
        """Apply to [batch, channels, frames]."""
        y = self.norm_in(self.prelu_in(self.conv_1x1_in(x)))
        y = self.norm_out(self.prelu_out(self.d_conv(y)))
        return x + self.conv_1x1_out(y)


def mask_network(
    inputs,
    outputs,
    channels=256,
    hidden=512,
    kernel_size=3,
    blocks=4,
    layers=8,
    scale_inputs=False,
):
    """Build the mask network as one chain.

    Arguments
    ---------
    inputs : int
        Features per frame.
    outputs : int
        Mask values per frame.
    channels, hidden, kernel_size : int
        See `ConvBlock`.
    blocks : int
        TCN blocks.
    layers : int
        ConvBlocks in each, with dilations 1, 2, 4, ...
    scale_inputs : bool
        Begin with a factor for each input, see `equalize_inputs_`.

    Returns
    -------
    network : torch.nn.Sequential
        Children (`scale_in`,) `conv_in`, `tcn_0_0`, ..., `conv_out`.

    Example
    -------
    >>> network = mask_network(2056, 514)
    >>> sum(p.numel() for p in network.tcn_0_0.parameters())
    265730
    """
    stages = [("scale_in", ChannelScale(inputs))] if scale_inputs else []
    stages.append(("conv_in", nn.Conv1d(inputs, channels, 1)))
    for block in range(blocks):
        for layer in range(layers):
            stage = ConvBlock(channels, hidden, kernel_size, 2**layer)
            stages.append((block_name(block, layer), stage))
    stages.append(("conv_out", nn.Conv1d(channels, outputs, 1)))
    return nn.Sequential(OrderedDict(stages))


def block_name(block, layer):
    """Name a ConvBlock in its chain."""
    return f"tcn_{block}_{layer}"


def block_place(name):
    """Parse the name of a ConvBlock into TCN block and layer.

    Example
    -------
    >>> block_place("tcn_0_7"), block_place("conv_in")
    ((0, 7), None)
    >>> block_place("tcn_0_100000000000") is None
    True
    """
    match = re.fullmatch(r"tcn_(\d{1,2})_(\d{1,2})", name, re.ASCII)
    if match is None:
        return None
    block, layer = int(match[1]), int(match[2])
    # A dilation is 2 to the layer: numbers are checked before they are used
    possible = block < MAX_BLOCKS and layer < MAX_LAYERS
    return (block, layer) if possible else None


def receptive_field(network):
    """Compute the receptive field of a chain, to either side.

    Example
    -------
    >>> receptive_field(mask_network(8, 4, 4, 4, blocks=4, layers=8))
    1020
    """
    return sum(
        c.dilation[0] * (c.kernel_size[0] - 1) // 2
        for c in network.modules()
        if isinstance(c, nn.Conv1d)
    )


def fold_norms_(model):
    """Replace every BatchNorm1d of a model by the affine map it has become.

    Training statistics are no longer updated afterwards; the folded network
    computes what the original did in eval mode (up to rounding).

    Arguments
    ---------
    model : torch.nn.Module
        Changed in place.

    Returns
    -------
    folded : int
        How many were replaced (0 if the model was folded before).

    Example
    -------
    >>> fold_norms_(ConvBlock(4, 8))
    2
    """
    norms = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.BatchNorm1d)
    ]
    for parent, name, norm in norms:
        setattr(parent, name, ChannelAffine.folded_from(norm))
    return len(norms)


def power_of_two_sizes(weight, octaves=OCTAVES):
    """Round the RMS of each column to a power of two, the least being 1.

    Arguments
    ---------
    weight : torch.Tensor
        [outputs, inputs, kernel].

    Returns
    -------
    sizes : torch.Tensor
        [inputs], 1 to 2^octaves.
    """
    rms = weight.square().mean((0, 2)).sqrt()
    exponent = torch.log2(rms.clamp_min(torch.finfo(rms.dtype).tiny)).round()
    exponent = exponent.clamp_min(exponent.max() - octaves)
    return 2.0 ** (exponent - exponent.min())


def equalize_inputs_(separator):
    """Equalize the inputs of the mask network by a factor for each."""
    stages = dict(separator.mask_net.named_children())
    if "scale_in" in stages:
        raise ValueError(
            "the separator scales its inputs already: equalize it once, "
            "before it is quantized"
        )
    conv = stages["conv_in"]
    scale = ChannelScale(conv.in_channels).to(conv.weight.device)
    with torch.no_grad():
        scale.weight.copy_(power_of_two_sizes(conv.weight))
        conv.weight /= scale.weight[:, None]
    scale.train(separator.training)
    for name in stages:
        delattr(separator.mask_net, name)
    for name, stage in {"scale_in": scale, **stages}.items():
        separator.mask_net.add_module(name, stage)
