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

from ...nnet.exit_rules import FixedExit, MovingMask

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
        _check_waveform(waveform)
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
        found = {name: getattr(self, name) for name in (*names, "thresholds")}
        return {
            **{n: list(v) if type(v) is tuple else v for n, v in found.items()},
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
        super().__init__()
        sizes = [bins, *widths, bins]
        self.bins = bins
        self.exits = _checked_exits(exits)
        self.input_mean, self.input_std = input_mean, input_std
        self.thresholds = _checked_thresholds(thresholds)
        self.deepest = deepest
        if deepest is not None:
            self._check_exits((deepest,))
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
        super().__init__()
        both = bins + side
        below = both if concat else side
        self.bins, self.side, self.concat = bins, side, concat
        self.exits = _checked_exits(exits)
        self.input_mean, self.input_std = input_mean, input_std
        self.thresholds = _checked_thresholds(thresholds)
        self.deepest = deepest
        if deepest is not None:
            self._check_exits((deepest,))
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
        if len(self._kept) >= N_FFT:
            frames = self._kept.unfold(-1, N_FFT, HOP)
            self._kept = self._kept[HOP * len(frames) :]
            first, second = self._enhanced(frames).split(HOP, dim=-1)
            begin = [] if self._tail is None else [self._tail + first[0]]
            finished += [*begin, (second[:-1] + first[1:]).flatten()]
            self._tail = second[-1]
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

    def _enhanced(self, frames):
        """[frames, 512] -> [frames, 512]."""
        spectra = _spectrum(frames)  # [frames, bins]
        if type(self.rule) is FixedExit:
            # nothing to be asked: many frames at once take less time
            exit = self.network.exit_at(self.rule.exit)
            features = log_power(spectra)[None]
            mask = self.network(features, (exit,), self._state)[exit][0]
            self.exits += [exit] * len(frames)
        else:
            mask = torch.cat([self._mask(one[None]) for one in spectra])
        return _frames(mask * spectra)

    def _mask(self, spectrum):
        """Mask of a frame, [1, bins] both."""
        mask, exit = self.network.step(
            log_power(spectrum),
            self._state,
            lambda exit, mask: self.rule(exit, mask, spectrum),
        )
        self.exits.append(exit)
        return mask


def frame_rule(network, threshold, kind=MovingMask):
    """A rule that chooses an exit for each frame.

    The first exit never is: it does little for a network that has others.

    Arguments
    ---------
    network : NsNet2 or EarlyExitNsNet2
    threshold : float
    kind : type
        `MovingMask` or `UncertainMask`.

    Example
    -------
    >>> rule = frame_rule(EarlyExitNsNet2(deepest=3), 0.1)
    >>> rule.first, rule.last
    (1, 3)
    """
    first, deepest = network.exits[:2][-1], network.deepest
    first = first if deepest is None else min(first, deepest)
    return kind(threshold, first, last=deepest)


def threshold_for(network, waveforms, macs, kind=MovingMask, steps=8) -> float:
    """Threshold of `frame_rule` that spends a number of multiplications.

    Arguments
    ---------
    network : NsNet2 or EarlyExitNsNet2
        In eval mode.
    waveforms : list of torch.Tensor
        [samples], as the network is going to hear.
    macs : float
        For a frame, on average; not to be exceeded where that is possible.
    kind : type
        `MovingMask` or `UncertainMask`.
    steps : int
        How often the interval is halved, once a power of 4 is found.

    Example
    -------
    >>> network = EarlyExitNsNet2(side=8).eval()
    >>> macs = network.macs(3)
    >>> threshold_for(network, [torch.randn(2000)], macs) > 0
    True
    """

    def spent(threshold):
        rule = frame_rule(network, threshold, kind)
        return _mean_macs(network, waveforms, rule)

    low, high = 0.0, 2.0**-8
    while spent(high) > macs:
        low, high = high, 4 * high
        if high > 1e6:
            raise ValueError(
                f"no threshold of {kind.__name__} keeps to {macs:.0f} "
                f"multiplications a frame: exits {network.exits} take "
                f"{[network.macs(exit) for exit in network.exits]}"
            )
    for _ in range(steps):
        middle = (low + high) / 2
        if spent(middle) > macs:
            low = middle
        else:
            high = middle
    return high


AUTO = "auto"
AUTO_SHARE = 0.5  # of the last exit's multiplications, where none are named


def exit_rule(network, exit=None, macs=None):
    """The rule that an exit or a budget asks for.

    Arguments
    ---------
    network : NsNet2 or EarlyExitNsNet2
    exit : int, "auto" or None
        "auto": for each frame, by `MovingMask`. None: the last one, or
        the latest within the budget.
    macs : float or None
        Multiplications for a frame: at most or, with "auto", on average of
        what the network's thresholds were found on (half the last exit's if
        not given).

    Returns
    -------
    callable
        For `EnhancerStream`.

    Example
    -------
    >>> network = EarlyExitNsNet2(thresholds=[[500e3, 0.4], [900e3, 0.2]])
    >>> exit_rule(network, macs=700e3).exit
    1
    >>> exit_rule(network, "auto", macs=700e3).threshold
    0.4
    """
    if exit == AUTO:
        if macs is None:
            macs = AUTO_SHARE * network.macs(network.exits[-1])
        deepest = network.exits[-1]
        if network.deepest is not None:
            deepest = network.deepest
        if macs >= network.macs(deepest):
            return FixedExit(deepest)
        if not network.thresholds:
            raise ValueError(
                "this network has no thresholds for exits chosen frame by "
                "frame: name an exit, or find some with threshold_for"
            )
        within = [value for cost, value in network.thresholds if cost <= macs]
        if within:
            return frame_rule(network, within[-1])
        return FixedExit(network.exit_within(macs))
    if exit is not None and macs is not None:
        raise ValueError('give an exit, or a budget with exit="auto" or none')
    if macs is not None:
        exit = network.exit_within(macs)
    exit = network.exits[-1] if exit is None else exit
    network.macs(exit)  # refuses exits that there are not
    return FixedExit(exit)


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
