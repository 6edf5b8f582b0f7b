"""A packed model's network as plain numbers, for any engine, and in PyTorch.

`lower` reads a packed folder and says what the network computes: convolutions
with the integers that are stored and a scale for each output channel, slopes,
affine maps, skips. What lowers a class of models is registered with
`register_lowering`. No YAML, no class of the model and no engine is needed:
names and shapes of the stored tensors tell the rest.

`equalize_hidden` is for engines that know one range for all channels of an
activation, which rounds small channels away. Between the convolutions of a
block every channel may have any positive size: what the convolution before it
multiplies, the depthwise one divides. Only their float scales change, no
stored integer does.

`run` computes it in plain PyTorch, for engines to be held against: once
without ranges, where it must be the separator's own network, and once with
them, where every activation is rounded as an int8 engine rounds it.

Layout: weights are [outputs, inputs / groups, kernel]; activations are
[batch, channels, frames].
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from operator import itemgetter

import numpy as np
import torch
import torch.nn.functional as F

from ...lobes.models.tcn import block_name, block_place
from ...quantization.codebook import dequantize
from ...quantization.groups import first_row, split_name
from ...quantization.packing import read_model

PREFIX = "mask_net."
SIGNED = 128  # the zero point that makes integers -128..127
LARGEST_INT8 = 127
FLOAT_BITS = 32


@dataclass(frozen=True)
class Convolution:
    """A convolution of stride 1 that keeps the number of frames.

    Its weights are `levels` times the `scale` of their output channel.
    """

    name: str  # name of the layer
    bits: int | float  # widest stored bits of its weights; 32: floating point
    # [outputs, inputs / groups, kernel]; int8 where all integers fit it, as up
    # to 8 bits they do (4 by entropy), else int16; float32 where the weights
    # are stored in floating point
    levels: np.ndarray
    scale: np.ndarray  # [outputs], float32
    bias: np.ndarray | None = None  # [outputs], float32
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
        """Dequantize the weights, float32."""
        return self.levels.astype(np.float32) * self.scale[:, None, None]


@dataclass(frozen=True)
class Affine:
    """Scale and shift of every channel: a folded batch normalization."""

    # scale, shift: [channels], float32
    scale: np.ndarray
    shift: np.ndarray


@dataclass(frozen=True)
class Block:
    """A ConvBlock; its input is added to its output.

    The shift of its second norm is part of the bias of `conv_out`, which
    pads nothing. The first norm keeps its own: the depthwise convolution
    pads with zeros behind it.
    """

    name: str
    conv_in: Convolution
    # slope_in, slope_out: of the PReLUs
    slope_in: float
    norm_in: Affine
    d_conv: Convolution
    slope_out: float
    gain_out: np.ndarray  # [hidden], float32: the scale of the second norm
    conv_out: Convolution


@dataclass(frozen=True)
class MaskNetwork:
    """What stands between features and mask."""

    scale_in: np.ndarray | None  # [inputs], factor of every input
    conv_in: Convolution
    blocks: tuple  # tuple of Block
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


def equalize_hidden(network, ranges):
    """Equalize the ranges of what depthwise convolutions read.

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
    """Merge the ranges of all channels after `equalize_hidden`."""
    if (unit.zero_point != SIGNED).any():
        raise ValueError("depthwise inputs need signed ranges")
    return replace(unit, scale=np.float32(1), zero_point=np.int64(SIGNED))


class _Stored:
    """The tensors of a packed folder, taken out one by one."""

    def __init__(self, packed):
        quantized, floats = packed.quantized, packed.floats
        self.folder = packed.path.parent
        self.pieces = defaultdict(list)
        for name, tensor in quantized.items():
            parameter, rows = split_name(name)
            self.pieces[parameter].append((first_row(rows), tensor))
        for name, tensor in floats.items():
            self.pieces[name].append((0, tensor))

    def take(self, name):
        """Take the slices of a parameter, in order."""
        if PREFIX + name not in self.pieces:
            raise ValueError(
                f"{self.folder} has no tensor {PREFIX + name}: pack a "
                "separator whose norms are folded (fold_norms_), or choose "
                'engine="torch"'
            )
        pieces = sorted(self.pieces.pop(PREFIX + name), key=itemgetter(0))
        return [piece for _, piece in pieces]

    def take_values(self, name):
        """Take a parameter's values, float32."""
        values = [_values(piece) for piece in self.take(name)]
        return np.concatenate(values) if len(values) > 1 else values[0]

    def take_slope(self, name):
        """Take the one slope of a PReLU."""
        values = self.take_values(name).reshape(-1)
        if len(values) != 1:
            raise ValueError(
                f"{PREFIX + name} has {len(values)} slopes, the engines take "
                'one: choose engine="torch"'
            )
        return float(values[0])

    def has(self, name):
        """Tell whether a parameter is left to take."""
        return PREFIX + name in self.pieces


def lower(folder) -> MaskNetwork:
    """Read the network of a packed model.

    Arguments
    ---------
    folder : str or Path
        Folder that `save_packed` wrote, norms folded.
    """
    packed = read_model(folder)
    # Formats without an architecture are separators'
    kind = (packed.architecture or {}).get("class", "Separator")
    if kind not in LOWERINGS:
        raise ValueError(
            f"{folder} holds a {kind}, which is not exported, and engines "
            f'of folders know {sorted(LOWERINGS)} only: choose engine="torch"'
        )
    stored = _Stored(packed)
    network = LOWERINGS[kind](stored)
    if stored.pieces:
        raise ValueError(
            f"{folder} has tensors that the engines do not know, such as "
            f'{min(stored.pieces)}: choose engine="torch"'
        )
    return network


def register_lowering(kind, lowering):
    """Let engines run the models of a class.

    Arguments
    ---------
    kind : str
        Name of the class, as `registry.register` knows it.
    lowering : callable
        Takes the stored tensors, with their methods `take`, `take_values`,
        `take_slope` and `has`, and returns a `MaskNetwork`. What it does not
        take is an error.
    """
    LOWERINGS[kind] = lowering


def _lower_separator(stored):
    """The mask network of a separator."""
    blocks = _block_names(stored)
    scale_in = None
    if stored.has("scale_in.weight"):
        scale_in = stored.take_values("scale_in.weight")
    return MaskNetwork(
        scale_in=scale_in,
        conv_in=_convolution(stored, "conv_in"),
        blocks=tuple(_block(stored, *place) for place in blocks),
        conv_out=_convolution(stored, "conv_out"),
    )


LOWERINGS = {"Separator": _lower_separator}


def _block_names(stored):
    """The places of the ConvBlocks that tensors are of, in order."""
    children = {
        name.removeprefix(PREFIX).partition(".")[0] for name in stored.pieces
    }
    places = {place for name in children if (place := block_place(name))}
    blocks, layers = ({place[i] for place in places} for i in (0, 1))
    if len(places) != len(blocks) * (max(layers, default=-1) + 1):
        raise ValueError(
            f"{stored.folder} lacks ConvBlocks between those that it has: "
            "pack the model again"
        )
    return sorted(places)


def _block(stored, block, layer):
    """One ConvBlock; its place in the TCN block tells the dilation."""
    name = block_name(block, layer)
    norm_out = _affine(stored, f"{name}.norm_out")
    conv_out = _convolution(stored, f"{name}.conv_1x1_out")
    return Block(
        name=name,
        conv_in=_convolution(stored, f"{name}.conv_1x1_in"),
        slope_in=stored.take_slope(f"{name}.prelu_in.weight"),
        norm_in=_affine(stored, f"{name}.norm_in"),
        d_conv=_convolution(stored, f"{name}.d_conv", 2**layer, depthwise=True),
        slope_out=stored.take_slope(f"{name}.prelu_out.weight"),
        gain_out=norm_out.scale,
        conv_out=_with_shift(conv_out, norm_out.shift),
    )


def _with_shift(conv, shift):
    """A 1x1 convolution whose bias makes up for a shift of its input."""
    levels = conv.levels[:, :, 0].astype(np.float64)
    bias = levels @ shift.astype(np.float64) * conv.scale
    bias = bias if conv.bias is None else bias + conv.bias
    return replace(conv, bias=bias.astype(np.float32))


def _affine(stored, name):
    """A folded norm."""
    scale = stored.take_values(f"{name}.weight")
    return Affine(scale, stored.take_values(f"{name}.bias"))


def _convolution(stored, name, dilation=1, depthwise=False):
    """A convolution; slices of its weights become scales of their rows."""
    pieces = stored.take(f"{name}.weight")
    bits = max(getattr(piece, "bits", FLOAT_BITS) for piece in pieces)
    levels = np.concatenate([_levels(piece) for piece in pieces])
    kind = np.float32
    if bits != FLOAT_BITS:
        # By entropy a level may lie far out, however few bits it costs.
        fits = np.abs(levels).max(initial=0) <= LARGEST_INT8
        kind = np.int8 if fits else np.int16
    has_bias = stored.has(f"{name}.bias")
    return Convolution(
        name=PREFIX + name,
        bits=bits,
        levels=np.ascontiguousarray(levels.astype(kind)),
        scale=np.concatenate([_scales(piece) for piece in pieces]),
        bias=stored.take_values(f"{name}.bias") if has_bias else None,
        dilation=dilation,
        groups=len(levels) if depthwise else 1,
    )


def _levels(piece):
    """Stored integers, or values where there are none."""
    if hasattr(piece, "integers"):
        return piece.integers.numpy()
    return _values(piece)


def _scales(piece):
    """The scale of every output channel, [outputs]."""
    if not hasattr(piece, "alpha"):
        return np.ones(len(piece), np.float32)
    rows = len(piece.integers)
    return np.broadcast_to(piece.alpha.reshape(-1).numpy(), rows).copy()


def _values(piece):
    """Values of a tensor or slice, float32."""
    if hasattr(piece, "integers"):
        piece = dequantize(piece.integers, piece.alpha)
    return piece.float().numpy()


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
        y = hook(f"{layer.name}:out", _convolved(layer, x))
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


def rounding(network, ranges) -> callable:
    """Make a `hook` that rounds what int8 convolutions read.

    Arguments
    ---------
    network : lowered.MaskNetwork
    ranges : dict of str -> activations.ActivationRange
        Empty: nothing is rounded.
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


def _convolved(layer, x):
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
