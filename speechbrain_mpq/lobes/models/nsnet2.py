"""Noise suppression with early exits: nsNet2 and its split variants.

Each layer of `EarlyExitNsNet2` is split in two: one part is as wide as the
spectrum and makes a mask where the network exits, the other one only carries
features. A frame that exits early leaves all deeper layers out; their states
wait for the next frame that reaches them.

Spectra are [batch, frames, bins], waveforms [batch, samples]. The exits are
numbered as the layers: 0 FC, 1 GRU, 2 GRU, 3 FC, 4 FC, 5 FC.

References: Braun and Tashev, "Data augmentation and loss normalization for
deep noise suppression", 2020, https://arxiv.org/abs/2008.06412 (network and
loss); Miccini et al., "Dynamic nsNet2: Efficient Deep Noise Suppression with
Early Exiting", 2023, https://arxiv.org/abs/2308.16678
"""

from importlib import import_module

import torch
import torch.nn as nn

N_FFT = 512  # samples, 32 ms at 16 kHz
HOP = 256
BINS = N_FFT // 2 + 1
POWER_FLOOR = 1e-12  # of a silent bin
_IN_EXIT_RULES = ("EnhancerStream", "exit_rule", "frame_rule", "threshold_for")


def __getattr__(name):
    """Streams and the choice of exits, which stood here."""
    if name not in _IN_EXIT_RULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__package__}.exit_rules"), name)


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
    return windowed_spectra(padded.unfold(-1, N_FFT, HOP))


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
    # [B, frames, 256] both
    first, second = windowed_frames(spectrum).split(HOP, dim=-1)
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


def _run(layer, x, state, key):
    """Outputs of a layer; what it remembers is kept under a key."""
    if not isinstance(layer, nn.GRU):
        return layer(x)
    y, state[key] = layer(x, state.get(key))
    return y


class _Enhancer(nn.Module):
    """What nsNet2 of any form does.

    `layers` make masks, the first `bins` of their outputs, where they have an
    exit; `_deeper` gives what the next layer sees.
    """

    def __init__(self, bins, exits, input_mean, input_std, thresholds, deepest):
        super().__init__()
        self.bins = bins
        self.exits = _checked_exits(exits)
        self.input_mean, self.input_std = input_mean, input_std
        self.thresholds = _checked_thresholds(thresholds)
        self.deepest = deepest
        if deepest is not None:
            self._check_exits((deepest,))

    def forward(self, features, exits=None, state=None):
        """Masks of a signal, or of what follows a part of it.

        Arguments
        ---------
        features : torch.Tensor
            Log-power spectra [B, frames, bins].
        exits : sequence of int or None
            None: all that the network has.
        state : dict or None
            Of the frames before; it is brought up to date. None: there are
            none.

        Returns
        -------
        dict
            Exit -> mask [B, frames, bins].
        """
        exits = self.exits if exits is None else exits
        self._check_exits(exits)
        state = {} if state is None else state
        masks, x = {}, self._normalized(features)
        for index in range(max(exits) + 1):
            layer = self.layers[index]
            # [B, T, bins or more]
            y = _run(layer, x, state, ("layer", index))
            if index in exits:
                masks[index] = layer.mask(y[..., : self.bins])
            if index < max(exits):
                x = self._deeper(index, x, y, state)
        return masks

    def step(self, features, state, stop):
        """One frame, as deep as it needs."""
        x = self._normalized(features)[:, None]
        for index in range(self.exits[-1] + 1):
            layer = self.layers[index]
            y = _run(layer, x, state, ("layer", index))
            if index in self.exits:
                mask = layer.mask(y[:, 0, : self.bins])
                if index == self.exits[-1] or stop(index, mask):
                    return mask, index
            x = self._deeper(index, x, y, state)

    def enhance(self, waveform, exit=LAST):
        """Suppress noise."""
        check_waveform(waveform)
        spectrum = stft(waveform)
        mask = self(log_power(spectrum), exits=(exit,))[exit]
        return istft(mask * spectrum, waveform.shape[-1])

    def macs(self, exit=LAST):
        """Multiplications for a frame that leaves at an exit."""
        self._check_exits((exit,))
        return sum(part.macs for part in self.parts_of(exit))

    def exit_within(self, macs):
        """Latest exit that takes no more multiplications for a frame."""
        within = [exit for exit in self.exits if self.macs(exit) <= macs]
        if not within:
            raise ValueError(
                f"no exit takes {macs:.0f} multiplications a frame or fewer: "
                f"exit {self.exits[0]} takes {self.macs(self.exits[0])}"
            )
        return within[-1]

    def exit_at(self, layer):
        """First exit at a layer or behind it; the last one behind all."""
        return next((e for e in self.exits if e >= layer), self.exits[-1])

    def parts_of(self, exit):
        """Layers that an exit needs."""
        return [*self.layers[: exit + 1], *self.sides[:exit]]

    @property
    def settings(self):
        """Arguments that build it, as files hold them."""
        names = (*self.shape, "bins", "exits", "input_mean", "input_std")
        names = (*names, "deepest")
        values = {name: getattr(self, name) for name in names}
        return {
            **{
                name: list(value) if type(value) is tuple else value
                for name, value in values.items()
            },
            "thresholds": [list(pair) for pair in self.thresholds],
        }

    def _normalized(self, features):
        """Features about zero and one; published weights want them as is."""
        return (features - self.input_mean) / self.input_std

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
    input_mean, input_std : float
        Of the log-power spectra: training is faster where both are given.
    thresholds : sequence
        [multiplications a frame, threshold] of `frame_rule`, ascending:
        what it spends on average (see `threshold_for`).
    deepest : int or None
        Exit that `frame_rule` does not go beyond, for the next ones bring
        nothing; None: the last one.

    Example
    -------
    >>> network = NsNet2(exits=(1, 5))
    >>> sum(p.numel() for p in network.parameters()), network.macs()
    (2783657, 2777000)
    >>> round(1 - network.macs(1) / network.macs(), 3)  # saved by exit 1
    0.617
    """

    shape = ("widths",)

    def __init__(
        self,
        bins=BINS,
        widths=(400, 400, 400, 600, 600),
        exits=(LAST,),
        input_mean=0.0,
        input_std=1.0,
        thresholds=(),
        deepest=None,
    ):
        super().__init__(
            bins, exits, input_mean, input_std, thresholds, deepest
        )
        sizes = [bins, *widths, bins]
        self.widths = tuple(widths)
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
        """A layer, as the next one sees it; the first has no activation."""
        return self.layers[index].features(y) if index else y


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
    input_mean, input_std : float
        Of the log-power spectra.
    thresholds, deepest
        As of `NsNet2`.

    Example
    -------
    >>> network = EarlyExitNsNet2()
    >>> masks = network(torch.zeros(1, 10, 257))
    >>> list(masks), masks[1].shape
    ([0, 1, 3, 5], torch.Size([1, 10, 257]))
    >>> [round(network.macs(exit) / 1e6, 2) for exit in network.exits]
    [0.07, 0.59, 1.58, 1.88]
    """

    shape = ("side", "concat")

    def __init__(
        self,
        bins=BINS,
        side=128,
        concat=True,
        exits=(0, 1, 3, LAST),
        input_mean=0.0,
        input_std=1.0,
        thresholds=(),
        deepest=None,
    ):
        super().__init__(
            bins, exits, input_mean, input_std, thresholds, deepest
        )
        both = bins + side
        below = both if concat else side
        self.side, self.concat = side, concat
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
        z = _run(side, seen, state, ("side", index))
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
        exits, bins, input_mean, input_std and, where layers are not split,
        widths.

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


def check_waveform(waveform):
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


def _checked_thresholds(thresholds):
    """Pairs of numbers: the more multiplications, the lower the threshold."""
    pairs = [(float(macs), float(value)) for macs, value in thresholds]
    if pairs != sorted(pairs) or pairs[::-1] != sorted(
        pairs, key=lambda pair: pair[1]
    ):
        raise ValueError(
            f"thresholds {thresholds} are not [multiplications, threshold], "
            "the first ascending and the second descending"
        )
    return tuple(pairs)


def _window(like):
    """Square-root Hann: twice applied, windows add up to one."""
    return torch.hann_window(N_FFT, dtype=like.dtype, device=like.device).sqrt()


def windowed_spectra(frames):
    """[..., 512] -> complex [..., 257]."""
    return torch.fft.rfft(frames * _window(frames))


def windowed_frames(spectrum):
    """Complex [..., 257] -> [..., 512], to be overlapped and added."""
    return torch.fft.irfft(spectrum, N_FFT) * _window(spectrum.real)


def compressed_loss(estimate, target, alpha=0.3, compression=0.3):
    """Distance of compressed spectra, partly with their phases.

    alpha | |S|^c e^(j arg S) - |E|^c e^(j arg E) |^2
    + (1 - alpha) (|S|^c - |E|^c)^2, of spectra at the target's level 1.

    Arguments
    ---------
    estimate, target : torch.Tensor
        Complex [B, frames, bins].
    alpha : float
        Share of the term with phases.
    compression : float
        c.

    Returns
    -------
    torch.Tensor
        [B], the mean over frames and bins. A silent target has no level: the
        estimate's own takes its place.

    Example
    -------
    >>> target = torch.randn(2, 5, 257, dtype=torch.cfloat)
    >>> bool((compressed_loss(target, target).abs() < 1e-5).all())
    True
    >>> bool((compressed_loss(-target, target) > 0.1).all())
    True
    """
    target, estimate = torch.view_as_real(target), torch.view_as_real(estimate)
    power, own_power = target.square().sum(-1), estimate.square().sum(-1)
    level = _mean(power)
    # a silent target has no level: then it is the estimate's
    level = torch.where(level > 0, level, _mean(own_power.detach()))
    level = level.clamp(min=1e-16)
    power, own_power = power / level, own_power / level
    common = (target * estimate).sum(-1) / level
    # Real numbers only, |a - b|^2 = |a|^2 + |b|^2 - 2 Re(a b*): the complex
    # products take twice as long
    size, gain = _compress(power, compression)
    own_size, own_gain = _compress(own_power, compression)
    with_phase = (
        power * gain.square()
        + own_power * own_gain.square()
        - 2 * common * gain * own_gain
    )
    without = (size - own_size).square()
    return (alpha * with_phase + (1 - alpha) * without).mean((1, 2))


def _mean(power):
    """Mean of a spectrum's power, [B, 1, 1]."""
    return power.mean((1, 2), keepdim=True)


def _compress(power, compression):
    """Compressed magnitudes, and what a spectrum is multiplied by for them."""
    # no gradient at zero: 60 dB below the level is near enough
    exponent = 0.5 * (power + 1e-6).log()
    return (
        (compression * exponent).exp(),
        ((compression - 1) * exponent).exp(),
    )
