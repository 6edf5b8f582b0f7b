"""A packed separator's mask network as plain numbers, for any engine.

`lower` reads a packed folder and says what the network computes: convolutions
with the integers that are stored and a scale for each output channel, slopes,
affine maps, skips. No YAML, no class of the model and no engine is needed:
names and shapes of the stored tensors tell the architecture.
"""

import re
from collections import defaultdict
from dataclasses import replace
from operator import itemgetter

import numpy as np

from ..quantization.codebook import dequantize
from ..quantization.row_groups import first_row, split_name
from ..quantization.unpacking import read_packed
from .lowered import Affine, Block, Convolution, MaskNetwork

PREFIX = "mask_net."
INT8_BITS = 8  # the widest weights whose integers fit int8
FLOAT_BITS = 32
_BLOCK = re.compile(r"tcn_(\d+)_(\d+)\.")


class _Stored:
    """The tensors of a packed folder, taken out one by one."""

    def __init__(self, folder):
        quantized, floats = read_packed(folder)
        self.folder = folder
        self.pieces = defaultdict(list)
        for name, tensor in quantized.items():
            parameter, rows = split_name(name)
            self.pieces[parameter].append((first_row(rows), tensor))
        for name, tensor in floats.items():
            self.pieces[name].append((0, tensor))

    def take(self, name):
        """The slices of a parameter, in order."""
        if PREFIX + name not in self.pieces:
            raise ValueError(
                f"{self.folder} has no tensor {PREFIX + name}: pack a "
                "separator whose norms are folded (fold_norms_), or choose "
                'engine="torch"'
            )
        pieces = sorted(self.pieces.pop(PREFIX + name), key=itemgetter(0))
        return [piece for _, piece in pieces]

    def take_values(self, name):
        """A parameter's values, float32."""
        values = [_values(piece) for piece in self.take(name)]
        return np.concatenate(values) if len(values) > 1 else values[0]

    def take_slope(self, name):
        """The one slope of a PReLU."""
        values = self.take_values(name).reshape(-1)
        if len(values) != 1:
            raise ValueError(
                f"{PREFIX + name} has {len(values)} slopes, the engines take "
                'one: choose engine="torch"'
            )
        return float(values[0])

    def has(self, name):
        """Whether a parameter is left to take."""
        return PREFIX + name in self.pieces


def lower(folder):
    """Read the mask network of a packed separator.

    Arguments
    ---------
    folder : str or Path
        Folder that `save_packed` wrote, norms folded.

    Returns
    -------
    network : MaskNetwork
    """
    stored = _Stored(folder)
    blocks = block_names(stored.pieces)
    scale_in = None
    if stored.has("scale_in.weight"):
        scale_in = stored.take_values("scale_in.weight")
    network = MaskNetwork(
        scale_in=scale_in,
        conv_in=_convolution(stored, "conv_in"),
        blocks=tuple(_block(stored, name) for name in blocks),
        conv_out=_convolution(stored, "conv_out"),
    )
    if stored.pieces:
        raise ValueError(
            f"{folder} has tensors that the engines do not know, such as "
            f'{min(stored.pieces)}: choose engine="torch"'
        )
    return network


def block_names(names):
    """The ConvBlocks that tensor names speak of, in order.

    Arguments
    ---------
    names : iterable of str
        Names of tensors.

    Returns
    -------
    blocks : list of str

    Example
    -------
    >>> names = ["mask_net.tcn_10_0.d_conv.weight", "mask_net.tcn_9_1.x"]
    >>> block_names(names)
    ['tcn_9_1', 'tcn_10_0']
    """
    found = {_BLOCK.match(name.removeprefix(PREFIX)) for name in names}
    numbers = {(int(m[1]), int(m[2])) for m in found if m}
    return [f"tcn_{block}_{layer}" for block, layer in sorted(numbers)]


def _block(stored, name):
    """One ConvBlock; its place in the TCN block tells the dilation."""
    layer = int(name.rpartition("_")[2])
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
    kind = np.int8 if bits <= INT8_BITS else np.int16
    kind = np.float32 if bits == FLOAT_BITS else kind
    levels = np.concatenate([_levels(piece) for piece in pieces])
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
