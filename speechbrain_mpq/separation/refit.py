"""A trained separator that listens to other features.

Its first layer is fitted to what it computed from the old ones, in least
squares over mixtures that both can hear; nothing behind it changes. With the
paper's features this is where the training starts, not what it ends with.
"""

import json

import torch

from .growth import check_trained
from .separator import Separator
from .tcn import fold_norms_

RIDGE = 1e-4  # of the inputs' mean energy


def ridge_regression(batches, ridge=RIDGE):
    """Affine map from inputs to outputs, by the normal equations.

    Arguments
    ---------
    batches : iterable of (torch.Tensor, torch.Tensor)
        Inputs [items, inputs] and outputs [items, outputs].
    ridge : float
        Added to the diagonal, relative to its mean; the offset is free.

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

    Example
    -------
    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> weight, bias = ridge_regression([(x, 3 * x + 5)], ridge=0.0)
    >>> weight.item(), bias.item()
    (3.0, 5.0)
    """
    square = cross = 0
    for given, wanted in batches:
        given = torch.cat([given, torch.ones_like(given[:, :1])], 1)
        square = square + (given.T @ given).double()
        cross = cross + (given.T @ wanted).double()
    if isinstance(square, int):
        raise ValueError("there are no mixtures to fit the first layer to")
    penalty = square.diagonal().clone()
    penalty[:] = ridge * penalty[:-1].mean()
    penalty[-1] = 0
    solution = torch.linalg.solve(square + penalty.diag(), cross)
    return solution[:-1].T, solution[-1]


def channels_of(waveforms, microphones, wanted):
    """The channels of some microphones.

    Arguments
    ---------
    waveforms : torch.Tensor
        [batch, samples, mics].
    microphones : sequence of int
        Number of each channel's microphone.
    wanted : sequence of int
        Which, in which order.

    Returns
    -------
    waveforms : torch.Tensor
        [batch, samples, len(wanted)].

    Example
    -------
    >>> channels_of(torch.tensor([[[0.1, 0.4, 0.8]]]), [1, 4, 8], [8, 1])
    tensor([[[0.8000, 0.1000]]])
    """
    if waveforms.shape[-1] != len(microphones):
        raise ValueError(
            f"{waveforms.shape[-1]} channels of {len(microphones)} microphones"
        )
    index = {number: i for i, number in enumerate(microphones)}
    missing = [number for number in wanted if number not in index]
    if missing:
        raise ValueError(
            f"no channel of microphones {missing} among {list(microphones)}"
        )
    return waveforms[..., [index[number] for number in wanted]]


def check_refit(separator, features):
    """Raise ValueError unless a separator can go on with other features.

    Arguments
    ---------
    separator : Separator
    features : SpatialFeatures
    """
    check_trained(separator)
    given, own = features.settings, separator.features.settings
    for name in ("n_fft", "hop", "spacings_cm"):
        if json.dumps(given[name]) != json.dumps(own[name]):
            raise ValueError(
                f"`{name}` of the features differs, {own[name]} and "
                f"{given[name]}: give both the same"
            )


@torch.no_grad()
def refit(separator, features, batches, microphones):
    """The separator as it was, but with other features.

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
        wanted = model.features.microphones
        heard = channels_of(waveforms, microphones, wanted)
        return model.analyse(heard, doa)[0]

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
