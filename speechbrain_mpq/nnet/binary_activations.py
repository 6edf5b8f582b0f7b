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
ROWS = 16  # of a map that are worked on at a time


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
        # sum of all weights of a tap, which popcounts of signed maps need
        self.tap_sums = None
        if signed and self.popcount:
            self.tap_sums = taps.sum(1).astype(np.int32)

    @property
    def nbytes(self):
        """Bytes kept: weights, tables and thresholds."""
        tap_sums = 0 if self.tap_sums is None else self.tap_sums.nbytes
        return self.weights.nbytes + self.limit.nbytes + tap_sums

    def __call__(self, x, pool=False, rows=ROWS):
        """The map behind the step.

        Arguments
        ---------
        x : numpy.ndarray
            Packed bits [T, F, in / 8], or `packed_input`.
        pool : bool
            Take the maximum over 2 x 2.
        rows : int
            Even number of rows that are worked on at a time.

        Returns
        -------
        numpy.ndarray
            Packed bits [T, F, out / 8], or half of T and F.
        """
        packed = []
        for bits in self._tiles(x, rows):
            if pool:
                bits = _pooled(bits)
            packed.append(np.packbits(bits, axis=-1))
        return np.concatenate(packed)

    def anywhere(self, x, rows=ROWS):
        """Global maximum of the map: whether a bit is set anywhere.

        Returns
        -------
        numpy.ndarray
            bool [out].
        """
        tiles = [bits.any((0, 1)) for bits in self._tiles(x, rows)]
        return np.any(tiles, axis=0)

    def _tiles(self, x, rows):
        """Bits of some rows at a time, bool [rows, F, out]."""
        height, edge = len(x), self.radius
        sums_of = self._popcounts if self.popcount else self._products
        weights = self._unpacked()
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            top, bottom = max(start - edge, 0), min(stop + edge, height)
            # rows that the map has, and zeros where it ends
            outside = top - start + edge, stop + edge - bottom
            yield sums_of(x[top:bottom], outside, weights) > self.limit

    def _unpacked(self):
        """Weights as the products of one call need them."""
        if self.popcount:
            return _words(self.weights)  # [out, words]
        size = 2 * self.radius + 1
        matrix = self.weights.matrix()  # [taps * in, out]
        return matrix.reshape(size, -1, matrix.shape[-1])

    def _products(self, x, outside, weights):
        """Sums [rows, F, out] by a product for each row of the kernel."""
        if not self.integer_input:
            x = np.unpackbits(x, axis=-1, count=self.channels)
        x = x.astype(np.float32)
        if self.signed:
            x = 2 * x - 1
        seen = self._shifted(self._framed(x, outside), axis=1)
        width = seen.shape[1]
        rows = len(seen) - 2 * self.radius
        sums = np.zeros((rows * width, weights.shape[-1]), np.float32)
        for row, weight in enumerate(weights):
            # float32 holds these integers exactly, and its product is fast
            sums += seen[row : row + rows].reshape(rows * width, -1) @ weight
        return sums.reshape(rows, width, -1)

    def _popcounts(self, x, outside, weights):
        """The same sums of bits and binary weights, by counting ones."""
        seen = self._shifted(self._framed(x, outside), axis=1)
        words = _words(self._shifted(seen, axis=0))  # [rows, F, words]
        kind = np.int16 if self.weights[0].nbytes < 2**12 else np.int32
        both = np.zeros((*words.shape[:2], len(weights)), kind)
        for word, weight in zip(np.moveaxis(words, -1, 0), weights.T):
            both += np.bitwise_count(word[..., None] & weight)
        ones = np.bitwise_count(words).sum(-1, dtype=np.int32)
        # weights are +size or -size where a bit is set
        sums = 2 * both.astype(np.int32) - ones[..., None]
        sums = sums * np.int32(self.size)
        if self.signed:  # 2 bit - 1 inside, 0 outside
            inside = np.ones((*x.shape[:2], 1), np.float32)
            inside = self._shifted(self._framed(inside, outside), axis=1)
            inside = self._shifted(inside, axis=0)  # [rows, F, taps]
            total = inside @ self.tap_sums.astype(np.float32)
            sums = 2 * sums - total.astype(np.int32)
        return sums

    def _framed(self, x, outside):
        """Rows with zeros around: 0 in maps of either kind."""
        (above, below), edge = outside, self.radius
        rows, width, bytes_ = x.shape
        # np.pad does the same and takes a third of the whole time
        framed = np.zeros(
            (above + rows + below, width + 2 * edge, bytes_), x.dtype
        )
        framed[above : above + rows, edge : edge + width] = x
        return framed

    def _shifted(self, x, axis):
        """What the kernel sees along an axis, one behind the other."""
        size = 2 * self.radius + 1
        count = x.shape[axis] - size + 1
        parts = [
            x[start : start + count]
            if axis == 0
            else x[:, start : start + count]
            for start in range(size)
        ]
        return np.concatenate(parts, axis=-1)


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
        self.bias = _numpy(layer.bias).copy()

    @property
    def nbytes(self):
        """Bytes kept."""
        return self.weights.nbytes + self.bias.nbytes

    def __call__(self, x):
        """[in] -> [out], float64."""
        y = x.astype(np.float64) @ self.weights.matrix().astype(np.float64)
        return np.round((y + self.bias) * OUTPUT_STEPS) / OUTPUT_STEPS


def packed_input(x):
    """The 8-bit input as `BitConv2d` takes it.

    Arguments
    ---------
    x : torch.Tensor
        [T, F], before or behind `eight_bit_input`.

    Returns
    -------
    numpy.ndarray
        int8 [T, F, 1].

    Example
    -------
    >>> packed_input(torch.tensor([[-2.0, 0.5, 1.0]])).ravel().tolist()
    [-128, 64, 127]
    """
    # one copy that is worked on: the memory is to be small
    steps = _numpy(x) * np.float32(INPUT_STEPS)
    np.rint(steps, out=steps)
    np.clip(steps, -INPUT_STEPS, INPUT_STEPS - 1, out=steps)
    return steps.astype(np.int8)[..., None]


def _numpy(tensor, dtype=np.float32):
    """A tensor's values as an array."""
    return tensor.detach().cpu().numpy().astype(dtype, copy=False)


def _words(packed):
    """Bytes along the last axis as 64-bit words, with zeros at the end."""
    *shape, size = packed.shape
    words = np.zeros((*shape, -(-size // 8)), np.uint64)
    words.view(np.uint8)[..., :size] = packed
    return words


def _pooled(bits):
    """Maximum over 2 x 2 of bool [T, F, C]; an odd last row is dropped."""
    height, width = (length // 2 * 2 for length in bits.shape[:2])
    bits = bits[0:height:2] | bits[1:height:2]
    return bits[:, 0:width:2] | bits[:, 1:width:2]
