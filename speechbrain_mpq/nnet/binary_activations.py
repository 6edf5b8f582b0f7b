"""Binary activation maps: training with a surrogate, inference with bits.

In training, maps are {0, 1} or {-1, +1} in float and the gradient of the step
is that of SuperSpike. `ExactConv2d` rounds its weights so finely that it does
not matter, and so that every sum over a binary map is exact in float32,
whatever its order. Inference can therefore use bits and integers and get the
same sums: `BitConv2d` keeps a map as one bit a value and compares integer
sums with integer thresholds.

Maps are [batch, channels, time, frequency] in torch and [time, frequency,
channels] in numpy, where 8 channels share a byte.

Reference: Nilsson et al., "Resource-Efficient Speech Quality Prediction
through Quantization Aware Training and Binary Activation Maps", Interspeech
2024, https://arxiv.org/abs/2407.04578
"""

import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize

INPUT_STEPS = 128  # levels on either side of zero of an 8-bit input
OUTPUT_STEPS = 2**12  # of the dense layers, per unit
OUTPUT_PEAK = 2**10  # up to which a dense layer's input is summed exactly
FLOAT32_DIGITS, FLOAT64_DIGITS = 24, 53  # integers up to 2^digits are exact
BINARY_RANGE = 0.05  # of binary weights, before the sign is taken


class _Heaviside(torch.autograd.Function):
    """A step whose gradient is SuperSpike's."""

    @staticmethod
    def forward(ctx, x, beta):
        ctx.save_for_backward(x)
        ctx.beta = beta
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / (ctx.beta * x.abs() + 1) ** 2, None


def heaviside(x, beta=1.0):
    """1 where x > 0, else 0; the gradient is 1 / (beta |x| + 1)^2.

    Example
    -------
    >>> x = torch.tensor([-1.0, 0.0, 3.0], requires_grad=True)
    >>> y = heaviside(x)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([0.0, 0.0, 1.0], [0.25, 1.0, 0.0625])
    """
    return _Heaviside.apply(x, beta)


class BinaryActivation(nn.Module):
    """Binary activation map.

    Arguments
    ---------
    signed : bool
        {-1, +1} instead of {0, 1}.
    beta : float
        See `heaviside`.

    Example
    -------
    >>> BinaryActivation(signed=True)(torch.tensor([-2.0, 0.0, 2.0])).tolist()
    [-1.0, -1.0, 1.0]
    """

    def __init__(self, signed=False, beta=1.0):
        super().__init__()
        self.signed = signed
        self.beta = beta

    def forward(self, x):
        """Apply to any shape."""
        bits = heaviside(x, self.beta)
        return 2 * bits - 1 if self.signed else bits


class BinaryWeight(nn.Module):
    """Parametrization: weights of one size and either sign.

    Arguments
    ---------
    fan_in : int
        Terms of a sum; the size is sqrt(2 / fan_in).
    beta : float
        See `heaviside`.

    Example
    -------
    >>> BinaryWeight(fan_in=8)(torch.tensor([-0.1, 0.3])).tolist()
    [-0.5, 0.5]
    """

    def __init__(self, fan_in, beta=1.0):
        super().__init__()
        self.size = math.sqrt(2 / fan_in)
        self.beta = beta

    def forward(self, weight):
        """Apply to any shape."""
        return self.size * (2 * heaviside(weight, self.beta) - 1)


def binarize_weights_(layers, beta=1.0):
    """Give layers binary weights, in place, and start them afresh."""
    for layer in layers:
        nn.init.uniform_(layer.weight, -BINARY_RANGE, BINARY_RANGE)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
        binary = BinaryWeight(layer.weight[0].numel(), beta)
        parametrize.register_parametrization(layer, "weight", binary)


def fixed_point_exponent(weight, terms, digits=FLOAT32_DIGITS):
    """Fineness with which weights can be kept for sums to be exact."""
    # one digit is left for what rounding adds
    _, above = math.frexp(weight.detach().abs().max().item() * terms)
    return digits - 1 - above


def fixed_point(weight, terms, digits=FLOAT32_DIGITS):
    """Weights rounded to the steps of `fixed_point_exponent`.

    The gradient passes straight through.
    """
    exponent = fixed_point_exponent(weight, terms, digits)
    scaled = torch.ldexp(weight.detach(), torch.tensor(exponent))
    rounded = torch.ldexp(scaled.round(), torch.tensor(-exponent))
    # the second term is zero; weight + (rounded - weight) would round again
    return rounded + (weight - weight.detach())


def rounded(x, steps) -> torch.Tensor:
    """Round to a number of steps per unit; the gradient passes through.

    Arguments
    ---------
    x : torch.Tensor
    steps : int
        A power of two.

    Example
    -------
    >>> rounded(torch.tensor([0.3, -0.3]), steps=4).tolist()
    [0.25, -0.25]
    """
    return ((x.detach() * steps).round() / steps) + (x - x.detach())


def eight_bit_input(x):
    """Features of a network of binary maps: 256 levels from -1 to 127/128."""
    return rounded(x.clamp(-1, 1 - 1 / INPUT_STEPS), INPUT_STEPS)


class ExactConv2d(nn.Conv2d):
    """2-D convolution whose sums are exact, over a binary or 8-bit map.

    Exact means in float32 without TF32, as on a CPU. The bias is added to
    the finished sum.

    Arguments
    ---------
    in_channels, out_channels : int
    kernel_size : int
        Odd; the map keeps its size.
    input_peak : int
        1 for binary maps, 128 for `eight_bit_input`.

    Example
    -------
    >>> conv = ExactConv2d(2, 4, kernel_size=3)
    >>> conv(torch.ones(1, 2, 5, 5)).shape
    torch.Size([1, 4, 5, 5])
    """

    def __init__(self, in_channels, out_channels, kernel_size, input_peak=1):
        super().__init__(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2
        )
        self.input_peak = input_peak

    @property
    def terms(self):
        """Largest sum of input magnitudes, in steps of the input."""
        return self.weight[0].numel() * self.input_peak

    def forward(self, x):
        """[B, in, T, F] -> [B, out, T, F]."""
        weight = fixed_point(self.weight, self.terms)
        return self._conv_forward(x, weight, None) + self.bias[:, None, None]


class ExactLinear(nn.Linear):
    """Dense layer with exact sums, over bits or over another one's output.

    It sums in float64 and rounds its output to steps of 2^-12: layers are
    small where maps end. Inputs are to be below 1024.

    Arguments
    ---------
    in_features, out_features : int

    Example
    -------
    >>> layer = ExactLinear(2, 1)
    >>> (layer(torch.ones(2)) * 4096).item().is_integer()
    True
    """

    @property
    def terms(self):
        """Largest sum of input magnitudes, in steps of the input."""
        return self.in_features * OUTPUT_STEPS * OUTPUT_PEAK

    def forward(self, x):
        """[..., in] -> [..., out]."""
        weight = fixed_point(self.weight, self.terms, FLOAT64_DIGITS)
        y = F.linear(x.double(), weight.double()) + self.bias.double()
        return rounded(y, OUTPUT_STEPS).to(x.dtype)


class StoredWeights:
    """A weight matrix in as few bytes as its values allow.

    Up to 256 different values become a table and codes of as many bits as
    the table needs; more are kept as they are, as int16 where they fit.

    Arguments
    ---------
    matrix : numpy.ndarray
        [terms, outputs].

    Example
    -------
    >>> stored = StoredWeights(np.array([[3.0, -3.0], [0.0, 3.0]]))
    >>> stored.bits, stored.nbytes
    (2, 13)
    >>> stored.matrix().tolist()
    [[3.0, -3.0], [0.0, 3.0]]
    """

    def __init__(self, matrix):
        self.shape = matrix.shape
        self.table, codes = np.unique(matrix, return_inverse=True)
        self.table = self.table.astype(np.float32)
        if len(self.table) > 256:
            small = np.array_equal(matrix, matrix.astype(np.int16))
            self.table = np.zeros(0, np.float32)
            self.codes = matrix.astype(np.int16 if small else np.float32)
            self.bits = 8 * self.codes.itemsize
            return
        self.bits = max(1, math.ceil(math.log2(len(self.table))))
        digits = codes.reshape(-1, 1) >> np.arange(self.bits)
        self.codes = np.packbits((digits & 1).astype(np.uint8))

    def matrix(self):
        """The weights, float32 [terms, outputs]."""
        if not len(self.table):
            return self.codes.astype(np.float32)
        count = math.prod(self.shape)
        digits = np.unpackbits(self.codes, count=count * self.bits)
        # bytes all the way: the working memory is to be small as well
        places = 1 << np.arange(self.bits)
        codes = digits.reshape(count, self.bits) @ places.astype(np.uint8)
        return self.table[codes].reshape(self.shape)

    @property
    def nbytes(self):
        """Bytes kept."""
        return self.codes.nbytes + self.table.nbytes


class BitConv2d:
    """`ExactConv2d` and the step behind it, over a map of bits.

    The products are masked sums: a bit says whether a weight counts. Where
    the weights are binary too, they are population counts.

    Arguments
    ---------
    layer : ExactConv2d
        A trained one.
    signed : bool
        Its input is {-1, +1}. Outside the map it is 0 all the same.

    Example
    -------
    >>> layer = ExactConv2d(8, 8, kernel_size=3)
    >>> packed = np.packbits(np.ones((6, 4, 8), bool), axis=-1)
    >>> BitConv2d(layer, signed=False)(packed, pool=True).shape
    (3, 2, 1)
    """

    def __init__(self, layer, signed=False):
        self.channels = layer.in_channels
        self.radius = layer.kernel_size[0] // 2
        self.integer_input = layer.input_peak > 1
        self.signed = signed
        exponent = fixed_point_exponent(layer.weight, layer.terms)
        weight = np.ldexp(_numpy(layer.weight, np.float64), exponent).round()
        taps = weight.transpose(2, 3, 1, 0)  # [height, width, in, out]
        taps = taps.reshape(-1, *taps.shape[2:])
        values = np.unique(weight)
        self.size = values[-1]
        # x on a grid of its own makes the unit of the sums finer
        unit = exponent + int(math.log2(layer.input_peak))
        # sum 2^-unit + bias > 0, for an integer sum
        limit = np.floor(np.ldexp(-_numpy(layer.bias, np.float64), unit))
        most = 2**FLOAT32_DIGITS
        self.limit = limit.clip(-most, most).astype(np.int32)  # [out]
        self.popcount = (
            np.array_equal(values, [-self.size, self.size])
            and not self.integer_input
        )
        if self.popcount:
            bits = np.packbits(taps > 0, axis=1)  # [taps, bytes, out]
            self.weights = bits.reshape(-1, bits.shape[-1]).T.copy()
        else:
            self.weights = StoredWeights(taps.reshape(-1, taps.shape[-1]))
        # sum of all weights of a tap, which signed maps need
        self.tap_sums = taps.sum(1).astype(np.int32) if signed else None

    @property
    def nbytes(self):
        """Bytes kept: weights, tables and thresholds."""
        tap_sums = self.tap_sums.nbytes if self.signed else 0
        return self.weights.nbytes + self.limit.nbytes + tap_sums

    def __call__(self, x, pool=False, rows=2):
        """The map behind the step."""
        packed = []
        for bits in self._tiles(x, rows):
            if pool:
                bits = _pooled(bits)
            packed.append(np.packbits(bits, axis=-1))
        return np.concatenate(packed)

    def anywhere(self, x, rows=2):
        """Global maximum of the map: whether a bit is set anywhere.

        Returns
        -------
        numpy.ndarray
            bool [out].
        """
        found = [bits.any((0, 1)) for bits in self._tiles(x, rows)]
        return np.any(found, axis=0)

    def _tiles(self, x, rows):
        """Bits of some rows at a time, bool [rows, F, out]."""
        height, width = x.shape[:2]
        weights = self.weights if self.popcount else self.weights.matrix()
        edge = self.radius
        # a frame of zeros around: 0 in maps of either kind, see `_sums`
        padded = np.pad(x, ((edge, edge), (edge, edge), (0, 0)))
        inside = np.pad(np.ones((height, width, 1), np.uint8), edge)
        inside = inside[..., edge : edge + 1]
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            part = slice(start, stop + 2 * edge)
            sums = self._sums(self._patches(self._seen(padded[part])), weights)
            if self.signed:  # 2 bit - 1 inside, 0 outside
                valid = self._patches(inside[part]).astype(np.int32)
                sums = 2 * sums - valid @ self.tap_sums
            bits = sums > self.limit
            yield bits.reshape(stop - start, width, -1)

    def _seen(self, padded):
        """Rows as the products need them: bits in bytes, or one a byte."""
        if self.popcount or self.integer_input:
            return padded
        return np.unpackbits(padded, axis=-1, count=self.channels)

    def _patches(self, padded):
        """What each place of the kernel sees, [positions, taps * bytes]."""
        size = 2 * self.radius + 1
        height, width = (length - size + 1 for length in padded.shape[:2])
        seen = [
            padded[row : row + height, column : column + width]
            for row in range(size)
            for column in range(size)
        ]
        return np.stack(seen, axis=2).reshape(height * width, -1)

    def _sums(self, patches, weights):
        """Integer sums over {0, 1} or an integer map, [positions, out]."""
        if self.popcount:
            both = _ones(patches[:, None] & weights)  # [positions, out]
            # weights are +size or -size where a bit is set
            sums = 2 * both - _ones(patches)[:, None]
            return sums * np.int32(self.size)
        # float32 holds these integers exactly, and its product is fast
        return (patches.astype(np.float32) @ weights).astype(np.int32)


class StoredLinear:
    """`ExactLinear` in numpy.

    Arguments
    ---------
    layer : ExactLinear
        A trained one.

    Example
    -------
    >>> layer = ExactLinear(3, 2)
    >>> y = StoredLinear(layer)(np.ones(3))
    >>> bool((torch.from_numpy(y) == layer(torch.ones(3))).all())
    True
    """

    def __init__(self, layer):
        weight = fixed_point(layer.weight, layer.terms, FLOAT64_DIGITS)
        self.weights = StoredWeights(_numpy(weight).T)
        self.bias = _numpy(layer.bias)

    @property
    def nbytes(self):
        """Bytes kept."""
        return self.weights.nbytes + self.bias.nbytes

    def __call__(self, x):
        """[in] -> [out], float64."""
        y = x.astype(np.float64) @ self.weights.matrix().astype(np.float64)
        return np.round((y + self.bias) * OUTPUT_STEPS) / OUTPUT_STEPS


def packed_input(x):
    """An 8-bit input as `BitConv2d` takes it.

    Arguments
    ---------
    x : torch.Tensor
        [T, F], of `eight_bit_input`.

    Returns
    -------
    numpy.ndarray
        int8 [T, F, 1].
    """
    return _numpy(x * INPUT_STEPS, np.int8)[..., None]


def _numpy(tensor, dtype=np.float32):
    """A tensor's values as an array."""
    return tensor.detach().cpu().numpy().astype(dtype)


def _ones(packed):
    """How many bits are set along the last axis, int32."""
    if packed.shape[-1] % 4 == 0:  # whole words are faster than bytes
        packed = np.ascontiguousarray(packed).view(np.uint32)
    return np.bitwise_count(packed).sum(-1, dtype=np.int32)


def _pooled(bits):
    """Maximum over 2 x 2 of bool [T, F, C]; an odd last row is dropped."""
    height, width = (length // 2 for length in bits.shape[:2])
    bits = bits[: 2 * height, : 2 * width]
    return bits.reshape(height, 2, width, 2, bits.shape[-1]).any((1, 3))
