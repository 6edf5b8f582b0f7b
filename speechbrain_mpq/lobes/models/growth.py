"""Separators that begin with what another one has learned.

`grow_` fills a larger one: it computes what the smaller one does, and has units
beside it that nothing listens to yet. Their outgoing weights are zero, their
incoming ones random, so that the first step of training gives them a voice
(after Chen, Goodfellow and Shlens, "Net2Net", 2016; units are added, not
copied, so that no symmetry has to be broken). Refitting lets one listen to
other features: its first layer is fitted to what it computed from the old
ones, in least squares over mixtures that both can hear, and nothing behind it
changes. With the paper's features this is where the training starts, not what
it ends with.
"""

import json

import torch
from torch.nn.utils.parametrize import is_parametrized

from .separator import Separator
from .tcn import ChannelAffine, ConvBlock, block_name, fold_norms_

NO_LIPS = "only audio-only separators grow: leave `visual` out"
NO_SCALES = "grow separators before their inputs are equalized"
RIDGE = 1e-4  # of the inputs' mean energy


def place_(weight, smaller):
    """Copy a smaller weight into the corner of a larger one.

    The outputs that are there already get nothing from new inputs; new
    outputs keep what they have. The weight [outputs, ...] is changed in place.
    """
    outputs = len(smaller)
    weight[:outputs] = 0
    weight[tuple(slice(size) for size in smaller.shape)] = smaller


def shared_inputs(features, smaller):
    """Map the inputs of a larger network to those of a smaller one.

    Returns
    -------
    index : torch.Tensor
        [inputs of the larger], int; -1: the smaller one has no such input.
    """
    index_of = {name: i for i, name in enumerate(smaller.maps)}
    first = [index_of.get(name, -1) * features.bins for name in features.maps]
    index = torch.tensor(first)[:, None] + torch.arange(features.bins)
    return torch.where(index < 0, -1, index).flatten()


@torch.no_grad()
def grow_(separator, smaller, waveforms, doa):
    """Grow a new separator from a smaller, trained one.

    Block i of b goes to block i * B // b of B, its layers keep their place
    and so their dilation. Each new hidden unit gets zero mean and unit
    variance over the mixtures. Where the larger one has all inputs of the
    smaller one (`phase`), both compute the same.

    Arguments
    ---------
    waveforms : torch.Tensor
        [batch, samples, mics], some mixtures.
    doa : torch.Tensor
        [batch] or [batch, targets], degrees.

    Raises
    ------
    ValueError
        If the smaller one does not fit into the larger one.
    """
    check_growth(separator, smaller)
    network, source = separator.mask_net, smaller.mask_net
    fold_norms_(network)
    index = shared_inputs(separator.features, smaller.features)
    columns = source.conv_in.weight[:, index.clamp_min(0)]
    columns[:, index < 0] = 0
    place_(network.conv_in.weight, columns)
    place_(network.conv_in.bias, source.conv_in.bias)
    place_(network.conv_out.weight, source.conv_out.weight)
    place_(network.conv_out.bias, source.conv_out.bias)
    origins = _origins(separator.settings, smaller.settings)
    hooks = []
    for name, block in network.named_children():
        if isinstance(block, ConvBlock):
            trained = _grow_block_(block, origins.get(name), source)
            hooks += [
                norm.register_forward_pre_hook(_normalise_from(trained))
                for norm in (block.norm_in, block.norm_out)
            ]
    try:
        separator(waveforms, doa)
    finally:
        for hook in hooks:
            hook.remove()


def _grow_block_(block, origin, source):
    """Fill a ConvBlock from one of the smaller network, if it has one."""
    if origin is None:  # it adds nothing to the channels that are there
        block.conv_1x1_out.weight[: source.conv_in.out_channels] = 0
        return 0
    trained = source.get_submodule(origin)
    weights = dict(trained.named_parameters())
    for name, parameter in block.named_parameters():
        place_(parameter, weights[name])
    return len(trained.norm_in.weight)


def _normalise_from(trained):
    """A hook that sets an affine map by what arrives, for its new channels."""

    def set_affine(affine, arrived):
        if trained == len(affine.weight):  # none is new
            return
        deviation, mean = torch.std_mean(
            arrived[0][:, trained:], (0, 2), correction=0
        )
        deviation = deviation.clamp_min(1e-5)
        affine.weight[trained:] = 1 / deviation
        affine.bias[trained:] = -mean / deviation

    return set_affine


def _origins(larger, smaller):
    """Name of a ConvBlock -> its name in the smaller network."""
    return {
        block_name(
            block * larger["blocks"] // smaller["blocks"], layer
        ): block_name(block, layer)
        for block in range(smaller["blocks"])
        for layer in range(smaller["layers"])
    }


def check_growth(separator, smaller):
    """Raise ValueError, which says what to change, unless one can grow."""
    _check_trained(smaller)
    if separator.lips_size:
        raise ValueError(NO_LIPS)
    if hasattr(separator.mask_net, "scale_in"):
        raise ValueError(NO_SCALES)
    for name, own in separator.features.settings.items():
        other = smaller.features.settings[name]
        if name != "phase" and json.dumps(own) != json.dumps(other):
            raise ValueError(
                f"`{name}` of the features differs, {own} and {other}: give "
                "both model files the same"
            )
    large, small = separator.settings, smaller.settings
    sizes = ("channels", "hidden", "blocks", "layers")
    if any(large[name] < small[name] for name in sizes):
        raise ValueError(
            f"{ {n: small[n] for n in sizes} } do not fit into "
            f"{ {n: large[n] for n in sizes} }: none may be larger"
        )
    if large["kernel_size"] != small["kernel_size"]:
        raise ValueError("give both model files the same kernel_size")


def _check_trained(separator):
    """Raise ValueError unless a separator's weights can be taken over."""
    if separator.lips_size:
        raise ValueError(NO_LIPS)
    network = separator.mask_net
    if hasattr(network, "scale_in"):
        raise ValueError(NO_SCALES)
    if not isinstance(network.tcn_0_0.norm_in, ChannelAffine):
        raise ValueError("fold the smaller one's norms first: `fold_norms_`")
    if any(is_parametrized(module) for module in separator.modules()):
        raise ValueError(
            "the smaller one is quantized: grow its full-precision weights"
        )


def ridge_regression(batches, ridge=RIDGE):
    """Fit an affine map from inputs to outputs by ridge regression.

    Arguments
    ---------
    batches : iterable of (torch.Tensor, torch.Tensor)
        Inputs [items, inputs] and outputs [items, outputs].

    Returns
    -------
    weight : torch.Tensor
        [outputs, inputs], float64.
    bias : torch.Tensor
        [outputs], float64.

    Raises
    ------
    ValueError
        If there are no batches.
    """
    square = cross = 0
    for inputs, targets in batches:
        inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
        square = square + (inputs.T @ inputs).double()
        cross = cross + (inputs.T @ targets).double()
    if isinstance(square, int):
        raise ValueError("there are no mixtures to fit the first layer to")
    penalty = square.diagonal().clone()
    penalty[:] = ridge * penalty[:-1].mean()
    penalty[-1] = 0
    solution = torch.linalg.solve(square + penalty.diag(), cross)
    return solution[:-1].T, solution[-1]


def channels_of(waveforms, microphones, numbers):
    """Select the channels of some microphones.

    Arguments
    ---------
    waveforms : torch.Tensor
        [batch, samples, mics].

    Returns
    -------
    waveforms : torch.Tensor
        [batch, samples, len(numbers)].
    """
    if waveforms.shape[-1] != len(microphones):
        raise ValueError(
            f"{waveforms.shape[-1]} channels of {len(microphones)} microphones"
        )
    index = {number: i for i, number in enumerate(microphones)}
    missing = [number for number in numbers if number not in index]
    if missing:
        raise ValueError(
            f"no channel of microphones {missing} among {list(microphones)}"
        )
    return waveforms[..., [index[number] for number in numbers]]


def check_refit(separator, features):
    """Raise ValueError unless a separator can go on with other features."""
    _check_trained(separator)
    new, own = features.settings, separator.features.settings
    for name in ("n_fft", "hop", "spacings_cm", "positions_cm"):
        theirs, ours = new.get(name), own.get(name)
        if json.dumps(theirs) != json.dumps(ours):
            raise ValueError(
                f"`{name}` of the features differs, {ours} and {theirs}: give "
                "both the same"
            )


@torch.no_grad()
def refit(separator, features, batches, microphones):
    """Refit a separator to other features.

    Arguments
    ---------
    separator : Separator
        Trained, audio only, in full precision, its norms folded.
    features : SpatialFeatures
        New ones of the same array and windows.
    batches : iterable of (torch.Tensor, torch.Tensor)
        Mixtures [batch, samples, mics] and DOAs [batch] or [batch, targets]
        in degrees.
    microphones : sequence of int
        Number of each channel's microphone: those of both features.

    Returns
    -------
    refitted : Separator
        New; its first layer is fitted, the rest is a copy.

    Raises
    ------
    ValueError
        If the two do not have the same array and windows, a channel is
        missing, or the separator is not one that can be refitted.
    """
    check_refit(separator, features)
    refitted = Separator(features, **separator.settings).eval()
    fold_norms_(refitted)
    network = refitted.mask_net
    weights = separator.mask_net.state_dict()
    behind = {k: v for k, v in weights.items() if not k.startswith("conv_in.")}
    network.load_state_dict(behind, strict=False)

    def inputs(model, waveforms, doa):
        """[batch, inputs, frames] of the channels that a model hears."""
        numbers = model.features.microphones
        channels = channels_of(waveforms, microphones, numbers)
        return model.analyse(channels, doa)[0]

    def items():
        """New inputs and old outputs of the first layer, frame by frame."""
        for batch in batches:
            outputs = separator.mask_net.conv_in(inputs(separator, *batch))
            for_new = inputs(refitted, *batch), outputs
            yield [x.transpose(1, 2).flatten(0, 1) for x in for_new]

    weight, bias = ridge_regression(items())
    network.conv_in.weight.copy_(weight[..., None])
    network.conv_in.bias.copy_(bias)
    return refitted
