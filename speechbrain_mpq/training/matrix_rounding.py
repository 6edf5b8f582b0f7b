"""Layers as matrices, and calibrated rounding of one.

Outputs = weight x inputs + bias. A layer is one or more separate problems of
the same size: a linear layer or an ordinary convolution is one with a row for
each output channel, a grouped convolution or a norm's scale and shift one for
each channel. Layout: weights [problems, rows, columns], inputs [problems,
columns, samples], outputs [problems, rows, samples]; inputs and outputs of a
layer [items, ...], a pair for each of its uses, which may differ in size.
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

from ..quantization.codebook import fit_scale, nearest_levels
from ..quantization.gptq import (
    calibrated_levels,
    calibrated_scale,
    damped_moment,
    regressed_weight,
)

DAMPINGS = (0.1, 1.0, 10.0)  # to choose from for each layer


class NoMatrixError(ValueError):
    """A layer that looked like a matrix and is none."""


def is_matrix_layer(layer):
    """Whether a layer can be seen as a matrix.

    These are linear layers, one-dimensional convolutions and everything that
    scales and shifts channels: norms in eval mode, affine maps.
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

    Returns
    -------
    torch.Tensor
        [problems, rows, columns], a view.
    """
    rows = weight.reshape(len(weight), -1)
    return rows[:, None] if _is_split(layer) else rows[None]


def input_matrix(layer, inputs):
    """What a weight is multiplied with: [problems, columns, samples]."""
    if isinstance(layer, nn.Linear):
        return inputs.flatten(0, -2).mT[None]
    if isinstance(layer, nn.Conv1d):
        return _unfolded(layer, inputs)
    return _channels(layer, _unscaled(layer, inputs))


def output_matrix(layer, outputs):
    """What comes of it, in the same layout: [problems, rows, samples]."""
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
    unfolded = _channels(layer, layer(inputs))
    if not torch.allclose(unfolded, expected, rtol=1e-3, atol=1e-4):
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
    span = dilation * (size - 1) + 1
    windows = frames.unfold(-1, span, stride)[..., ::dilation]
    # [batch, groups, channels, frames, taps] -> [groups, columns, samples]
    windows = windows.unflatten(1, (layer.groups, -1))
    columns = windows.permute(1, 2, 4, 0, 3).flatten(3).flatten(1, 2)
    return columns.repeat_interleave(
        layer.out_channels // layer.groups if layer.groups > 1 else 1, 0
    )


def as_linear(layer, weight, bias):
    """A matrix of a layer that has several, as a linear layer.

    Arguments
    ---------
    layer : torch.nn.Module
    weight, bias : str
        Names of its parameters; a bias may be missing or None.

    Returns
    -------
    torch.nn.Linear
        With the same parameters.
    """
    weight, bias = getattr(layer, weight), getattr(layer, bias, None)
    linear = nn.Linear(*reversed(weight.shape), bias=bias is not None)
    linear.weight = weight
    linear.bias = bias
    return linear


def round_layer_(tensors, layer, plain, uses, dampings=DAMPINGS):
    """Round a layer so that its outputs stay those of full precision."""
    weights, biases = tensors[layer, "weight"], tensors[layer, "bias"]
    rounded = partial(getattr, layer, "weight")
    round_matrix_(weights, biases, plain, rounded, uses, dampings)


def round_matrix_(weights, biases, plain, rounded, uses, dampings=DAMPINGS):
    """Round the tensors of a matrix and of its bias.

    Arguments
    ---------
    weights, biases : list of NamedTensor
        Slices, changed in place; none of what is to stay.
    plain : torch.nn.Module
        The matrix and the bias in full precision.
    rounded : callable
        Returns the weight as it is now.
    uses : list of (torch.Tensor, torch.Tensor)
        What goes in now and what came out in full precision, [items, ...].
    dampings : sequence of float
        See `CalibratedRounding`.
    """
    halves = _halves(uses)
    means = _means(plain, halves)
    # Matrices in float stay as they are, norms in float do not.
    if weights and (weights[0].fake_quantize or plain.weight.dim() == 1):
        # A bias takes care of the means.
        shift = means if plain.bias is not None else (0.0, 0.0)
        moments = [_moments(plain, half, shift) for half in halves]
        moment, cross = (sum(both) for both in zip(*moments))
        fit = partial(_fitted, weights, weight_matrix(plain, plain.weight))
        damping = _best_damping(fit, moments, dampings)
        values, scales = fit(moment, cross, damping)
        values = values.reshape(plain.weight.shape)
        for tensor, alpha in zip(weights, scales):
            _store_(tensor, values[tensor.rows], alpha)
    for tensor in biases:
        weight = weight_matrix(plain, rounded()).double()
        target = (means[1] - weight @ means[0]).flatten()[tensor.rows]
        _store_(tensor, *_nearest(tensor, target))


def matched_items(inputs, outputs, counts=None):
    """Pairs up items of one use that may have many lengths.

    Arguments
    ---------
    inputs, outputs : sequence of torch.Tensor
        [steps, features] each.
    counts : sequence of torch.Tensor or None
        Which steps of each item are taken; None: all.

    Returns
    -------
    list of (torch.Tensor, torch.Tensor)
        Uses, as `round_matrix_` takes them.
    """
    pairs = list(zip(inputs, outputs))
    if counts is not None:
        taken = zip(pairs, counts)
        pairs = [(x[rows], y[rows]) for (x, y), rows in taken if rows.any()]
    if len({len(x) for x, _ in pairs}) == 1:  # fewer and larger products
        return [tuple(map(torch.stack, zip(*pairs)))]
    return [(x[None], y[None]) for x, y in pairs]


def _halves(uses):
    """Every other item of all uses, and those between."""
    halves, start = ([], []), 0
    for inputs, target in uses:
        for which, half in enumerate(halves):
            items = slice((start + which) % 2, None, 2)
            if len(inputs[items]):
                half.append((inputs[items], target[items]))
        start += len(inputs)
    return halves


def _matrices(plain, use):
    """What is given and wanted in a use, as float64 matrices."""
    inputs, target = use
    x, y = input_matrix(plain, inputs), output_matrix(plain, target)
    return x.double(), y.double()


def _means(plain, halves):
    """Mean of what is given and of what is wanted, over all samples."""
    sums, samples = [0.0, 0.0], 0
    for use in (use for half in halves for use in half):
        pair = _matrices(plain, use)
        sums = [s + m.sum(-1, keepdim=True) for s, m in zip(sums, pair)]
        samples += pair[0].shape[-1]
    return [total / samples for total in sums]


def _moments(plain, uses, shift):
    """X X^T and Y X^T of some uses, after a shift of X and Y."""
    moment, cross = 0.0, 0.0
    for use in uses:
        x, y = (m - s for m, s in zip(_matrices(plain, use), shift))
        moment, cross = moment + x @ x.mT, cross + y @ x.mT
    return moment, cross


def _best_damping(fit, moments, dampings):
    """What does best on every other item after a fit to those between."""
    if len(dampings) == 1:
        return dampings[0]
    fitted, (moment, cross) = moments

    def held_out_error(damping):
        values, _ = fit(*fitted, damping)
        return ((values @ moment - 2 * cross) * values).sum()

    return min(dampings, key=held_out_error)


def _fitted(weights, trained, moment, cross, damping):
    """New values of a weight as a matrix, and the scale of each slice."""
    values = regressed_weight(trained, cross, moment, damping)
    moment, scales = damped_moment(moment, damping), []
    one = len(values) == 1  # slices are rows of one problem, or problems
    for tensor in weights:
        alpha = None
        if tensor.fake_quantize:
            rows = (slice(None), tensor.rows) if one else tensor.rows
            own = moment if one else moment[tensor.rows]
            values[rows], alpha = _calibrated(tensor, values[rows], own)
        scales.append(alpha)
    return values, scales


def _calibrated(tensor, target, moment):
    """Values of a tensor at calibrated levels, as a matrix, and their scale."""
    fake_quantize, shape = tensor.fake_quantize, tensor.weight.shape
    bits, codebook = fake_quantize.stored_bits, fake_quantize.codebook
    granularity = "channel" if fake_quantize.alpha.dim() else "tensor"
    alpha = fit_scale(target.reshape(shape), bits, granularity, codebook)
    if alpha.dim():
        alpha = alpha.reshape(*target.shape[:-1], 1)
    if fake_quantize.codebook == "entropy":
        alpha = alpha.float()  # another step is another rate
    else:
        alpha = calibrated_scale(target, moment, bits, alpha, codebook)
        alpha = alpha.float()
    levels = calibrated_levels(target, moment, bits, alpha, codebook)
    return levels * alpha, alpha


def _nearest(tensor, target):
    """Values of a tensor at the nearest levels, and their scale."""
    if tensor.fake_quantize is None:
        return target, None
    fake_quantize = tensor.fake_quantize
    bits, codebook = fake_quantize.stored_bits, fake_quantize.codebook
    alpha = fit_scale(target, bits, codebook=codebook)
    return nearest_levels(target, bits, alpha, codebook) * alpha, alpha


def _store_(tensor, values, alpha):
    """Put values that lie on the levels of a scale into a tensor."""
    fake_quantize = tensor.fake_quantize
    if fake_quantize:
        fake_quantize.set_scale(alpha.reshape(fake_quantize.alpha.shape))
    tensor.weight.copy_(values)
    if fake_quantize is None:
        return
    if not torch.equal(fake_quantize(tensor.weight.float()), values.float()):
        raise ValueError(
            f"{tensor.name}: {tensor.weight.dtype} is too coarse for "
            f"{fake_quantize.stored_bits} bits: quantize a float32 model"
        )
