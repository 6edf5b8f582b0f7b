"""Noise suppression with early exits: nsNet2 and its split variants.

Each layer of `EarlyExitNsNet2` is split in two: one part is as wide as the
spectrum and makes a mask where the network exits, the other one only carries
features. A frame that exits early leaves all deeper layers out; their states
wait for the next frame that reaches them.

Spectra are [batch, frames, bins], waveforms [batch, samples]. The exits are
numbered as the layers: 0 FC, 1 GRU, 2 GRU, 3 FC, 4 FC, 5 FC.

References: Braun and Tashev, "Data augmentation and loss normalization for
deep noise suppression", 2020; Miccini et al., "Dynamic nsNet2: Efficient Deep
Noise Suppression with Early Exiting", 2023, https://arxiv.org/abs/2308.16678
"""

import torch
import torch.nn as nn

from ...nnet.exit_rules import FixedExit, UncertainMask

N_FFT = 512  # samples, 32 ms at 16 kHz
HOP = 256
BINS = N_FFT // 2 + 1
POWER_FLOOR = 1e-12  # of a silent bin


def stft(waveform):
    """Spectra with a square-root Hann window of 512 samples, 50 % overlap.

    Arguments
    ---------
    waveform : torch.Tensor
        [B, samples].

    Returns
    -------
    torch.Tensor
        Complex [B, frames, 257]; the first frame is half before the signal.

    Example
    -------
    >>> waveform = torch.randn(1, 1000)
    >>> torch.allclose(istft(stft(waveform), 1000), waveform, atol=1e-5)
    True
    """
    frames = -(-waveform.shape[-1] // HOP) + 1
    missing = frames * HOP - waveform.shape[-1]
    padded = nn.functional.pad(waveform, (HOP, missing))
    return _spectrum(padded.unfold(-1, N_FFT, HOP))


def istft(spectrum, samples):
    """Waveform of spectra as of `stft`.

    Arguments
    ---------
    spectrum : torch.Tensor
        Complex [B, frames, 257].
    samples : int
        Length of the waveform.

    Returns
    -------
    torch.Tensor
        [B, samples].
    """
    first, second = _frames(spectrum).split(HOP, dim=-1)  # [B, frames, 256]
    blocks = second[:, :-1] + first[:, 1:]
    return blocks.flatten(1)[:, :samples]


def log_power(spectrum) -> torch.Tensor:
    """The network's input: ln(|X|^2 + 1e-12).

    Arguments
    ---------
    spectrum : torch.Tensor
        Complex.

    Example
    -------
    >>> log_power(torch.zeros(1, dtype=torch.cfloat)).round().item()
    -28.0
    """
    power = spectrum.real.square() + spectrum.imag.square()
    return (power + POWER_FLOOR).log()


class _FullyConnected(nn.Linear):
    """A dense layer; its mask is a sigmoid and its features a ReLU."""

    def forward(self, x, state=None):
        """[B, T, in] -> values before any activation, and no state."""
        return super().forward(x), None

    def features(self, x):
        """What deeper layers get."""
        return x.relu()

    def mask(self, x):
        """What multiplies the spectrum."""
        return x.sigmoid()

    @property
    def macs(self):
        """Multiplications for a frame, without biases."""
        return self.weight.numel()


class _Recurrent(nn.GRU):
    """A GRU; its mask is (1 + output) / 2."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, batch_first=True)

    def features(self, x):
        """What deeper layers get."""
        return x

    def mask(self, x):
        """What multiplies the spectrum."""
        return 0.5 * (1 + x)

    @property
    def macs(self):
        """Multiplications for a frame, without biases and gates."""
        return self.weight_ih_l0.numel() + self.weight_hh_l0.numel()


KINDS = (_FullyConnected, *(_Recurrent,) * 2, *(_FullyConnected,) * 3)
LAST = len(KINDS) - 1


class _Enhancer(nn.Module):
    """What nsNet2 of any form does.

    `layers` make masks, the first `bins` of their outputs, where they have an
    exit; `_deeper` gives what the next layer sees.
    """

    def forward(self, features, exits=None):
        """Masks of a whole signal."""
        exits = self.exits if exits is None else exits
        self._check_exits(exits)
        masks, x = {}, features
        for index in range(max(exits) + 1):
            layer = self.layers[index]
            y, _ = layer(x)  # [B, T, bins or more]
            if index in exits:
                masks[index] = layer.mask(y[..., : self.bins])
            if index < max(exits):
                x = self._deeper(index, x, y, {})
        return masks

    def step(self, features, state, stop):
        """One frame, as deep as it needs."""
        x = features[:, None]
        for index in range(self.exits[-1] + 1):
            layer = self.layers[index]
            y, state["layer", index] = layer(x, state.get(("layer", index)))
            if index in self.exits:
                mask = layer.mask(y[:, 0, : self.bins])
                if index == self.exits[-1] or stop(index, mask):
                    return mask, index
            x = self._deeper(index, x, y, state)

    def enhance(self, waveform, exit=LAST):
        """Suppress noise."""
        _check_waveform(waveform)
        spectrum = stft(waveform)
        mask = self(log_power(spectrum), exits=(exit,))[exit]
        return istft(mask * spectrum, waveform.shape[-1])

    def macs(self, exit=LAST):
        """Multiplications for a frame that leaves at an exit."""
        self._check_exits((exit,))
        return sum(part.macs for part in self.parts_of(exit))

    def parts_of(self, exit):
        """Layers that an exit needs."""
        return [*self.layers[: exit + 1], *self.sides[:exit]]

    def _check_exits(self, exits):
        """Refuse exits that there are not."""
        unknown = sorted(set(exits) - set(self.exits))
        if unknown or not exits:
            raise ValueError(f"no exits {unknown}: there are {self.exits}")


class NsNet2(_Enhancer):
    """The baseline: six layers that are not split.

    Arguments
    ---------
    bins : int
        Of the spectrum.
    widths : sequence of int
        Outputs of the first five layers.
    exits : sequence of int
        Layers that have an exit; one of more outputs than bins makes its
        mask of the first ones.

    Example
    -------
    >>> network = NsNet2(exits=(1, 5))
    >>> sum(p.numel() for p in network.parameters()), network.macs()
    (2783657, 2777000)
    >>> round(1 - network.macs(1) / network.macs(), 3)  # saved by exit 1
    0.617
    """

    def __init__(
        self, bins=BINS, widths=(400, 400, 400, 600, 600), exits=(LAST,)
    ):
        super().__init__()
        sizes = [bins, *widths, bins]
        self.bins = bins
        self.exits = _checked_exits(exits)
        for exit in self.exits:
            if sizes[exit + 1] < bins:
                raise ValueError(
                    f"layer {exit} is too narrow for an exit: {bins} outputs "
                    f"make a mask, it has {sizes[exit + 1]}"
                )
        self.layers = nn.ModuleList(
            kind(inputs, outputs)
            for kind, inputs, outputs in zip(KINDS, sizes, sizes[1:])
        )
        self.sides = ()

    def _deeper(self, index, x, y, state):
        """A layer, as the next one sees it."""
        return self.layers[index].features(y)


class EarlyExitNsNet2(_Enhancer):
    """nsNet2 of split layers.

    Arguments
    ---------
    bins : int
        Of the spectrum, and width of the part of a layer that makes a mask.
    side : int
        Width of the part that only carries features.
    concat : bool
        The carrying part sees both parts of the layer below; False: only
        that one's carrying part. The other part always sees both.
    exits : sequence of int
        Layers that have an exit.

    Example
    -------
    >>> network = EarlyExitNsNet2()
    >>> masks = network(torch.zeros(1, 10, 257))
    >>> list(masks), masks[1].shape
    ([0, 1, 3, 5], torch.Size([1, 10, 257]))
    >>> [round(network.macs(exit) / 1e6, 2) for exit in network.exits]
    [0.07, 0.59, 1.58, 1.88]
    """

    def __init__(self, bins=BINS, side=128, concat=True, exits=(0, 1, 3, LAST)):
        super().__init__()
        both = bins + side
        below = both if concat else side
        self.bins, self.side, self.concat = bins, side, concat
        self.exits = _checked_exits(exits)
        self.layers = nn.ModuleList(
            kind(both if index else bins, bins)
            for index, kind in enumerate(KINDS)
        )
        self.sides = nn.ModuleList(
            kind(below if index else bins, side)
            for index, kind in enumerate(KINDS[:-1])
        )

    def _deeper(self, index, x, y, state):
        """Both parts of a layer, as the next one sees them."""
        layer, side = self.layers[index], self.sides[index]
        seen = x if index == 0 or self.concat else x[..., self.bins :]
        z, state["side", index] = side(seen, state.get(("side", index)))
        return torch.cat([layer.features(y), side.features(z)], dim=-1)


def suppression_network(split=True, side=128, concat=True, **options):
    """The network that an hparams file asks for.

    Arguments
    ---------
    split : bool
        `EarlyExitNsNet2` instead of `NsNet2`.
    side, concat
        Of the split layers.
    **options
        exits, bins and, where layers are not split, widths.

    Returns
    -------
    EarlyExitNsNet2 or NsNet2

    Example
    -------
    >>> type(suppression_network(split=False, exits=[5])).__name__
    'NsNet2'
    """
    if split:
        options.pop("widths", None)
        return EarlyExitNsNet2(side=side, concat=concat, **options)
    return NsNet2(**options)


class EnhancerStream:
    """Noise suppression of one signal, as its samples come.

    Gives what `enhance` gives for the same exit, 256 samples later, and takes
    blocks of any size.

    Arguments
    ---------
    network : NsNet2 or EarlyExitNsNet2
        In eval mode.
    rule : callable or None
        Takes (exit, mask [1, bins], spectrum [1, bins]) and says whether to
        stop; None: the last exit in every frame.

    Example
    -------
    >>> stream = EnhancerStream(EarlyExitNsNet2().eval(), FixedExit(1))
    >>> [len(stream.feed(torch.randn(400))) for _ in range(3)]
    [0, 512, 256]
    >>> len(stream.flush()), stream.exits
    (432, [1, 1, 1, 1, 1, 1])
    """

    def __init__(self, network, rule=None):
        self.network = network
        self.rule = rule or FixedExit(network.exits[-1])
        self.exits = []
        self._begin()

    @torch.no_grad()
    def feed(self, samples):
        """Take a block, give what is finished.

        Arguments
        ---------
        samples : torch.Tensor
            [samples] at 16 kHz, any number.

        Returns
        -------
        torch.Tensor
            [samples], a multiple of 256.
        """
        if len(samples):
            _check_waveform(samples[None])
        if not self._fed:
            self.exits = []
            # half a window of silence before the signal, as in `stft`
            self._kept = samples.new_zeros(HOP)
            self._tail = None
        self._fed += len(samples)
        self._kept = torch.cat([self._kept, samples])
        finished = [samples.new_zeros(0)]
        while len(self._kept) >= N_FFT:
            first, second = self._frame(self._kept[:N_FFT]).split(HOP)
            if self._tail is not None:
                finished.append(self._tail + first)
            self._tail = second
            self._kept = self._kept[HOP:]
        finished = torch.cat(finished)
        self._given += len(finished)
        return finished

    def flush(self):
        """End the signal, give what is left of it; another one may begin.

        Returns
        -------
        torch.Tensor
            [samples].
        """
        if not self._fed:
            return torch.zeros(0)
        left = self._fed - self._given
        silence = self._kept.new_zeros(-self._fed % HOP + HOP)
        last = self.feed(silence)[:left]
        self._begin()
        return last

    def mean_macs(self) -> float:
        """Multiplications for a frame of the signal, on average."""
        counts = [self.network.macs(exit) for exit in self.exits]
        return sum(counts) / max(len(counts), 1)

    def _begin(self):
        """Forget the signal."""
        self._fed = self._given = 0
        self._state = {}
        self.rule.reset()

    def _frame(self, samples):
        """[512] -> [512]."""
        spectrum = _spectrum(samples[None])  # [1, bins]
        mask, exit = self.network.step(
            log_power(spectrum),
            self._state,
            lambda exit, mask: self.rule(exit, mask, spectrum),
        )
        self.exits.append(exit)
        return _frames(mask * spectrum)[0]


def threshold_for(network, waveforms, macs, first=0, steps=8) -> float:
    """Threshold of `UncertainMask` that spends a number of multiplications.

    Arguments
    ---------
    network : NsNet2 or EarlyExitNsNet2
        In eval mode.
    waveforms : list of torch.Tensor
        [samples], as the network is going to hear.
    macs : float
        For a frame, on average; not to be exceeded where that is possible.
    first : int
        First exit at which it may stop.
    steps : int
        How often the interval is halved.

    Example
    -------
    >>> network = EarlyExitNsNet2(side=8).eval()
    >>> threshold_for(network, [torch.randn(2000)], macs=network.macs(1)) > 0
    True
    """
    low, high = 0.0, 1.0
    while _mean_macs(network, waveforms, UncertainMask(high, first)) > macs:
        low, high = high, 4 * high
        if high > 1e6:
            raise ValueError(
                f"no threshold keeps to {macs:.0f} multiplications a frame: "
                f"exit {network.exits[0]} takes "
                f"{network.macs(network.exits[0])}"
            )
    for _ in range(steps):
        middle = (low + high) / 2
        rule = UncertainMask(middle, first)
        if _mean_macs(network, waveforms, rule) > macs:
            low = middle
        else:
            high = middle
    return high


def _check_waveform(waveform):
    """Refuse what is no waveform, [B, samples]."""
    if waveform.ndim != 2 or not waveform.shape[-1]:
        raise ValueError(
            f"waveforms are [batch, samples], not {tuple(waveform.shape)}"
        )
    if not waveform.isfinite().all():
        raise ValueError("the waveform holds NaN or infinity")


def _checked_exits(exits):
    """Exits in order, or what is wrong with them."""
    exits = tuple(exits)
    if not exits or exits != tuple(sorted(set(exits) & set(range(LAST + 1)))):
        raise ValueError(f"exits {exits} are not layers 0 to {LAST} in order")
    return exits


def _mean_macs(network, waveforms, rule):
    """Multiplications for a frame of some signals, on average."""
    exits = []
    for waveform in waveforms:
        stream = EnhancerStream(network, rule)
        stream.feed(waveform)
        stream.flush()
        exits += stream.exits
    return sum(map(network.macs, exits)) / len(exits)


def _window(like):
    """Square-root Hann: twice applied, windows add up to one."""
    return torch.hann_window(N_FFT, dtype=like.dtype, device=like.device).sqrt()


def _spectrum(frames):
    """[..., 512] -> complex [..., 257]."""
    return torch.fft.rfft(frames * _window(frames))


def _frames(spectrum):
    """Complex [..., 257] -> [..., 512], to be overlapped and added."""
    return torch.fft.irfft(spectrum, N_FFT) * _window(spectrum.real)
