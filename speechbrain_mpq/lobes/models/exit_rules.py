"""Exit rules: at which exit each frame of a signal leaves nsNet2.

A rule is asked at each exit but the last one, with the mask that the exit
would give and the noisy spectrum, [1, bins] each, of one signal. A stream asks
it frame by frame.
"""

import torch

from .nsnet2 import (
    HOP,
    N_FFT,
    check_waveform,
    log_power,
    windowed_frames,
    windowed_spectra,
)


class FixedExit:
    """Rule: stop at the same exit in every frame.

    Arguments
    ---------
    exit : int

    Example
    -------
    >>> rule = FixedExit(1)
    >>> rule(0, None, None), rule(1, None, None)
    (False, True)
    """

    def __init__(self, exit):
        self.exit = exit

    def reset(self):
        """Begin another signal."""

    def __call__(self, exit, mask, spectrum):
        """Whether to stop."""
        return exit >= self.exit


class RandomExit(FixedExit):
    """Control: leave at one exit or another by chance.

    Its quality lies on the line between two fixed exits: what a rule that
    listens has to beat.

    Arguments
    ---------
    early, late : int
        The exits.
    share : float
        Of the frames that leave early.
    seed : int

    Example
    -------
    >>> rule = RandomExit(1, 5, share=0.5)
    >>> rule(0, None, None)
    False
    """

    def __init__(self, early, late, share, seed=1234):
        super().__init__(late)
        self.early, self.share, self.seed = early, share, seed
        self.reset()

    def reset(self):
        """Begin another signal."""
        self.random = torch.Generator().manual_seed(self.seed)

    def __call__(self, exit, mask, spectrum):
        """Whether to stop."""
        if exit != self.early:
            return exit >= self.exit
        return torch.rand((), generator=self.random).item() < self.share


class _LevelWeighted:
    """What rules have that weigh a frame by its level.

    Compressed spectra are held against their running mean: what happens in a
    loud frame counts, what happens in a pause does not.
    """

    def __init__(self, threshold, first=0, memory=60, last=None):
        self.threshold, self.first, self.last = threshold, first, last
        self.memory = memory
        self.reset()

    def reset(self):
        """Begin another signal."""
        self.level, self.frame, self.masks = None, None, {}

    def __call__(self, exit, mask, spectrum):
        """Whether to stop."""
        size = spectrum.abs() ** 0.6
        if self.frame is not spectrum:  # the first exit of this frame
            self.frame, now = spectrum, size.mean()
            self.level = (
                now
                if self.level is None
                else self.level + (now - self.level) / self.memory
            )
        unrest = self.unrest(mask, self.masks.get(exit))
        self.masks[exit] = mask
        if exit < self.first:
            return False
        if self.last is not None and exit >= self.last:
            return True
        weighted = (size * unrest).mean() / (self.level + 1e-9)
        return weighted.item() < self.threshold


class MovingMask(_LevelWeighted):
    """Rule that listens: go on while the mask of what is loud moves.

    The mean distance of an exit's mask from the one that it gave the last time
    is held against the threshold: speech that begins or changes makes it
    large, steady noise and held sounds do not.

    Arguments
    ---------
    threshold : float
        Stop below it: 0 never stops, a large one always does.
    first : int
        First exit at which it may stop.
    memory : float
        Frames over which the level is averaged.
    last : int or None
        Exit at which it must stop; None: the network's last.

    Example
    -------
    >>> rule = MovingMask(threshold=0.2)
    >>> frames = torch.ones(3, 1, 257, dtype=torch.cfloat)
    >>> masks = [torch.full((1, 257), value) for value in (0.1, 0.5, 0.6)]
    >>> [rule(0, mask, frame) for mask, frame in zip(masks, frames)]
    [True, False, True]
    """

    def unrest(self, mask, before):
        """How far each bin has moved; nothing has in the first frame."""
        return (
            torch.zeros_like(mask) if before is None else (mask - before).abs()
        )


class UncertainMask(_LevelWeighted):
    """Rule that listens: go on while the mask of what is loud is undecided.

    A mask near 0 or 1 has decided. The mean of 4 m (1 - m) over the bins is
    held against the threshold. Arguments are those of `MovingMask`.

    Example
    -------
    >>> rule = UncertainMask(threshold=0.5)
    >>> spectrum = torch.ones(1, 257, dtype=torch.cfloat)
    >>> rule(0, torch.full((1, 257), 0.9), spectrum)
    True
    >>> rule(0, torch.full((1, 257), 0.5), spectrum)
    False
    """

    def unrest(self, mask, before):
        """How undecided each bin is."""
        return 4 * mask * (1 - mask)


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
    >>> from speechbrain_mpq.lobes.models.nsnet2 import EarlyExitNsNet2
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
            check_waveform(samples[None])
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
        if not finished.isfinite().all():
            raise ValueError(
                "the model puts out NaN or infinity: its weights are damaged "
                "or diverged; take another packed folder"
            )
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
        spectra = windowed_spectra(frames)  # [frames, bins]
        if type(self.rule) is FixedExit:
            # nothing to be asked: many frames at once take less time
            exit = self.network.exit_at(self.rule.exit)
            features = log_power(spectra)[None]
            mask = self.network(features, (exit,), self._state)[exit][0]
            self.exits += [exit] * len(frames)
        else:
            mask = torch.cat([self._mask(one[None]) for one in spectra])
        return windowed_frames(mask * spectra)

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
    >>> from speechbrain_mpq.lobes.models.nsnet2 import EarlyExitNsNet2
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
    >>> from speechbrain_mpq.lobes.models.nsnet2 import EarlyExitNsNet2
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
    >>> from speechbrain_mpq.lobes.models.nsnet2 import EarlyExitNsNet2
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


def _mean_macs(network, waveforms, rule):
    """Multiplications for a frame of some signals, on average."""
    exits = []
    for waveform in waveforms:
        stream = EnhancerStream(network, rule)
        stream.feed(waveform)
        stream.flush()
        exits += stream.exits
    return sum(map(network.macs, exits)) / len(exits)
