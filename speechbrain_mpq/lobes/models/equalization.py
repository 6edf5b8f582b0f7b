"""Evening out the columns of the first layer, so that few bits serve them all.

The first convolution reads features of very different importance: its
weights for one can be a hundred times those for another, and one scale for
all of them leaves the small ones no levels. What a column is divided by, its
input is multiplied with: the network computes the same, and the quantizer
sees columns of one size. All factors are powers of two. They change no digit
of a float weight. They are quantized like all else, mostly to 8 bits.
"""

import torch

from .tcn import ChannelScale

OCTAVES = 6  # between the least and the largest factor: 1 to 64


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
