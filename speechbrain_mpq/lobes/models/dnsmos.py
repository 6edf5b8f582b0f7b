"""Speech quality from a log-mel spectrogram, without a reference.

The network of DNSMOS (Reddy et al., 2020) in the shape of Nilsson et al.
(2024): 3x3 convolutions with pooling between them, a global maximum, dense
layers. `BinaryDNSMOS` has binary activation maps, and `BitDNSMOS` runs it
with a bit a value.

References: https://arxiv.org/abs/2010.15258,
https://arxiv.org/abs/2407.04578
"""

import math
import warnings

import numpy as np
import torch
import torch.nn as nn
from torchaudio.functional import melscale_fbanks

from ...nnet.binary_activations import (
    INPUT_STEPS,
    ROWS,
    BinaryActivation,
    BitConv2d,
    ExactConv2d,
    ExactLinear,
    StoredLinear,
    binarize_weights_,
    eight_bit_input,
    packed_input,
)

MIN_FRAMES = 8  # of which three poolings leave one

# channels, and whether a maximum over 2 x 2 follows
PAPER = ((32, True), (32, True), (32, True), (64, False))
RELEASED = ((32, True), (32, True), (32, False), (32, True), (64, False))


class LogMel(nn.Module):
    """Log-mel power spectrogram in a range of about -1 to 1.

    Arguments
    ---------
    sample_rate : int
        Hz.
    n_mels : int
        Bands.
    n_fft, hop_length : int
        Samples of a window, and from one to the next.
    shift, scale : float
        The network sees (ln(power + 1e-9) - shift) / scale.

    Example
    -------
    >>> LogMel()(torch.zeros(1, 80000)).shape
    torch.Size([1, 249, 120])
    """

    def __init__(
        self,
        sample_rate=16000,
        n_mels=120,
        n_fft=640,
        hop_length=320,
        shift=-6.0,
        scale=16.0,
    ):
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        self.shift, self.scale = shift, scale
        with warnings.catch_warnings():
            # low bands are narrower than a bin: the paper's are, too
            warnings.simplefilter("ignore")
            bands = melscale_fbanks(
                n_fft // 2 + 1, 0.0, sample_rate / 2, n_mels, sample_rate
            )
        self.register_buffer("bands", bands, persistent=False)
        window = torch.hann_window(n_fft)
        self.register_buffer("window", window, persistent=False)

    def forward(self, waveform):
        """[B, samples] -> [B, T, mels]."""
        frames = waveform.unfold(-1, self.n_fft, self.hop_length)
        power = torch.fft.rfft(frames * self.window).abs().square()
        mels = power @ self.bands  # [B, T, mels]
        return ((mels + 1e-9).log() - self.shift) / self.scale


class DNSMOS(nn.Module):
    """Convolutions, a global maximum, and dense layers.

    Arguments
    ---------
    shape : sequence of tuple
        (channels, pooled) of each convolution: `PAPER` or `RELEASED`.
    dense : sequence of int
        Sizes of the hidden dense layers.
    dropout : float
        Behind the poolings.
    measure : str
        What it learns to predict; a name for people.

    Example
    -------
    >>> network = DNSMOS()
    >>> network(torch.zeros(2, 249, 120)).shape
    torch.Size([2])
    >>> sum(p.numel() for p in network.parameters())
    45697
    >>> sum(p.numel() for p in DNSMOS(RELEASED).parameters())
    54945
    """

    def __init__(
        self, shape=PAPER, dense=(64, 64), dropout=0.3, measure="pesq"
    ):
        super().__init__()
        self.shape = [tuple(layer) for layer in shape]
        self.settings = {
            "shape": [list(layer) for layer in shape],
            "dense": list(dense),
            "dropout": dropout,
            "measure": measure,
        }
        widths = [1, *(channels for channels, _ in self.shape)]
        self.convs = nn.ModuleList(
            self._conv(inputs, outputs)
            for inputs, outputs in zip(widths, widths[1:])
        )
        self.activation = self._activation()
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.ModuleList(
            self._linear(inputs, outputs)
            for inputs, outputs in zip([widths[-1], *dense], dense)
        )
        self.output = self._linear(dense[-1], 1)

    def forward(self, features):
        """[B, T, mels] -> scores [B]."""
        _check_features(features)
        # Channels last in memory, twice as fast on CPUs: [B, 1, T, mels]
        x = self._input(features)[..., None].permute(0, 3, 1, 2)
        # Activations are monotonic: behind the maximum they give the same with
        # less work, and the gradient of a step finds the value next to it
        *convs, last = zip(self.convs, self.shape)
        for conv, (_, pooled) in convs:
            x = conv(x)  # [B, channels, T, mels]
            if pooled:
                x = nn.functional.max_pool2d(x, 2)
            x = self.activation(x)
            if pooled:
                x = self.dropout(x)
        x = self.activation(last[0](x).amax((2, 3)))  # [B, channels]
        for linear in self.dense:
            x = linear(x).relu()
        return self.output(x)[:, 0]

    def _conv(self, inputs, outputs):
        """A convolution; the first one has one input."""
        return nn.Conv2d(inputs, outputs, 3, padding=1)

    def _linear(self, inputs, outputs):
        """A dense layer."""
        return nn.Linear(inputs, outputs)

    def _activation(self):
        """What is behind a convolution."""
        return nn.ReLU()

    def _input(self, features):
        """What the first convolution sees."""
        return features


class BinaryDNSMOS(DNSMOS):
    """The network with binary activation maps and an 8-bit input.

    Its parameters have the names of `DNSMOS`, which training may begin with.

    Arguments
    ---------
    signed : bool
        Maps of {-1, +1} instead of {0, 1}.
    beta : float
        Steepness of the surrogate gradient.
    binary_weights : bool
        Give the convolutions binary weights as well.
    **options
        Those of `DNSMOS`.

    Example
    -------
    >>> network = BinaryDNSMOS().eval()
    >>> features = torch.rand(249, 120)
    >>> bool(BitDNSMOS(network)(features) == network(features[None])[0])
    True
    """

    def __init__(self, signed=False, beta=1.0, binary_weights=False, **options):
        self.signed, self.beta = signed, beta
        super().__init__(**options)
        self.settings |= {
            "signed": signed,
            "beta": beta,
            "binary_weights": binary_weights,
        }
        if binary_weights:
            binarize_weights_(self.convs, beta)

    def _conv(self, inputs, outputs):
        """A convolution whose sums are exact."""
        peak = INPUT_STEPS if inputs == 1 else 1
        return ExactConv2d(inputs, outputs, 3, input_peak=peak)

    def _linear(self, inputs, outputs):
        """A dense layer whose sums are exact."""
        return ExactLinear(inputs, outputs)

    def _activation(self):
        """A step."""
        return BinaryActivation(self.signed, self.beta)

    def _input(self, features):
        """Features with 8 bits."""
        return eight_bit_input(features)


class BitDNSMOS:
    """A trained `BinaryDNSMOS` in numpy: bits, integers, few bytes.

    Gives, bit for bit, what the network gives in eval mode on a CPU.

    Arguments
    ---------
    network : BinaryDNSMOS
    rows : int
        Rows of a map that are worked on at a time, an even number: more are
        faster and need more memory.
    """

    def __init__(self, network, rows=ROWS):
        self.shape, self.signed, self.rows = network.shape, network.signed, rows
        self.convs = [
            BitConv2d(conv, network.signed and conv.in_channels > 1)
            for conv in network.convs
        ]
        layers = [*network.dense, network.output]
        self.dense = [StoredLinear(layer) for layer in layers]

    @property
    def nbytes(self):
        """Bytes of weights, tables and thresholds."""
        return sum(layer.nbytes for layer in [*self.convs, *self.dense])

    def __call__(self, features):
        """[T, mels] -> one score."""
        _check_features(features[None])
        x = packed_input(features)  # [T, mels, 1]
        *convs, last = zip(self.convs, self.shape)
        for conv, (_, pooled) in convs:
            x = conv(x, pooled, self.rows)  # [T, mels, channels / 8]
        bits = last[0].anywhere(x, self.rows)  # [channels]
        x = np.where(bits, 1.0, -1.0 if self.signed else 0.0)
        for linear in self.dense[:-1]:
            x = np.maximum(linear(x), 0)
        return np.float32(self.dense[-1](x)[0])


def quality_network(
    binary_maps=False, signed=False, beta=1.0, binary_weights=False, **options
) -> DNSMOS:
    """The network that an hparams file asks for.

    Arguments
    ---------
    binary_maps : bool
        `BinaryDNSMOS` instead of `DNSMOS`.
    signed, beta, binary_weights
        See `BinaryDNSMOS`.
    **options
        Those of `DNSMOS`.

    Example
    -------
    >>> type(quality_network(binary_maps=True)).__name__
    'BinaryDNSMOS'
    """
    if binary_maps:
        return BinaryDNSMOS(signed, beta, binary_weights, **options)
    if signed or binary_weights:
        raise ValueError("signed maps and binary weights need binary_maps")
    return DNSMOS(**options)


def memory(network, frames=249, n_mels=120, weight_bits=8, map_bits=1):
    """Bytes of weights and activation maps, by four ways of counting.

    Arguments
    ---------
    network : DNSMOS
    frames, n_mels : int
        Size of the input; 249 frames are 5 s.
    weight_bits : float
        Bits of a weight on average.
    map_bits : int
        Bits of a value of the maps, 1 or 32.

    Returns
    -------
    dict of tuple
        Way -> (bytes in float32, bytes of this network, their ratio).
        "all maps" is the paper's: weights and every convolution's map.
        "largest map" keeps one map at a time. The other two count the input
        as well, in float32, or in 8 bits beside binary maps.

    Example
    -------
    >>> counts = memory(DNSMOS())
    >>> {way: round(ratio, 1) for way, (_, _, ratio) in counts.items()}
    {'all maps': 25.8, 'largest map': 24.3, '32-bit input': 16.7, \
'8-bit input': 23.0}
    """
    layers = [*network.convs, *network.dense, network.output]
    # not what quantizers add while they train
    parameters = sum(
        layer.weight.numel() + layer.bias.numel() for layer in layers
    )
    maps, size = [], (frames, n_mels)
    for channels, pooled in network.shape:
        maps.append(channels * math.prod(size))
        if pooled:
            size = tuple(length // 2 for length in size)
    everything, largest, inputs = sum(maps), max(maps), frames * n_mels
    weights = parameters * weight_bits / 8
    small_input = inputs if map_bits == 1 else 4 * inputs
    counts = {
        "all maps": (everything, 0, 0),
        "largest map": (largest, 0, 0),
        "32-bit input": (everything, 4 * inputs, 4 * inputs),
        "8-bit input": (everything, 4 * inputs, small_input),
    }
    return {
        way: _compared(
            4 * (values + parameters) + float_input,
            values * map_bits / 8 + weights + own_input,
        )
        for way, (values, float_input, own_input) in counts.items()
    }


def _check_features(features):
    """Refuse what the poolings leave nothing of."""
    if features.shape[1] < MIN_FRAMES or features.shape[2] < MIN_FRAMES:
        raise ValueError(
            f"features {tuple(features.shape)} are too small: at least "
            f"{MIN_FRAMES} frames and bands are needed"
        )


def _compared(large, small):
    """Both sizes and their ratio."""
    return large, small, large / small
