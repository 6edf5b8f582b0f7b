"""1x1 convolutions as linear layers, for tools that know nothing else.

A 1x1 convolution over [batch, channels, frames] is a linear layer over the
channels of every frame.
"""

import torch.nn as nn


class PointwiseLinear(nn.Linear):
    """The 1x1 convolution as a linear layer, in the convolution's layout.

    Example
    -------
    >>> import torch
    >>> conv, x = nn.Conv1d(3, 4, 1), torch.randn(2, 3, 5)
    >>> torch.allclose(PointwiseLinear.of(conv)(x), conv(x), atol=1e-6)
    True
    """

    @classmethod
    def of(cls, conv):
        """The linear layer of a convolution."""
        linear = cls(conv.in_channels, conv.out_channels, conv.bias is not None)
        linear.weight.data.copy_(conv.weight.data[..., 0])
        if conv.bias is not None:
            linear.bias.data.copy_(conv.bias.data)
        return linear

    def forward(self, x):
        """Apply to [batch, channels, frames]."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def is_pointwise(module):
    """Whether a module is a 1x1 convolution."""
    return (
        isinstance(module, nn.Conv1d)
        and module.kernel_size == (1,)
        and module.groups == 1
    )


def convolutions(network, pointwise=True, depthwise=True):
    """The convolutions of a network by name.

    Arguments
    ---------
    network : torch.nn.Module
    pointwise, depthwise : bool
        Which kinds.

    Returns
    -------
    dict of str -> torch.nn.Conv1d
    """
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv1d)
        and (pointwise if is_pointwise(module) else depthwise)
    }


def to_linear_(network):
    """Replaces every 1x1 convolution of a network by its linear layer.

    Arguments
    ---------
    network : torch.nn.Module
        Changed in place.

    Returns
    -------
    names : list of str
        Of what was replaced.
    """
    names = list(convolutions(network, depthwise=False))
    for name in names:
        parent, _, child = name.rpartition(".")
        owner = network.get_submodule(parent)
        setattr(owner, child, PointwiseLinear.of(getattr(owner, child)))
    return names
