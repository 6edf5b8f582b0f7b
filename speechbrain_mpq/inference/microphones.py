"""What is wrong with the signals of microphones, and offsets that move.

Layout: [samples, mics]. An offset carries no speech: where it is constant the
mean is taken off; where it moves, as with warming preamplifiers or wind, it
is followed.
"""

import math
import zlib

import numpy as np
import torch

from ..utils import SAMPLE_RATE

OFFSET_SECONDS = 0.16  # in which an offset is followed
MOVING = 0.1  # of the power of the rest, from where on an offset is followed
SAME = 1e-6  # of the peak: channels that differ by less are copies
SLOW_SECONDS = 0.004  # means of it hold what is below about 200 Hz
OPPOSITE = -0.5  # correlation of such means, of neighbours
STRANGE = 20.0  # dB between a microphone and most others of its array


class OffsetFilter:
    """Takes the offset off blocks, whose lengths do not change the result.

    Arguments
    ---------
    step : int
        Samples after which the offset is looked at again.

    Example
    -------
    >>> follower = OffsetFilter(256)
    >>> first = follower.push(torch.full((600, 1), 0.5))
    >>> rest = follower.push(torch.full((10, 1), 0.5), last=True)
    >>> len(first) + len(rest), float(first.abs().max())
    (610, 0.0)
    """

    def __init__(self, step):
        self.step = step
        self._rate = 1 - math.exp(-step / (OFFSET_SECONDS * SAMPLE_RATE))
        self._kept = []  # samples that the first estimate waits for
        self._before = self._now = None  # estimates, [mics]
        self._sum, self._count = 0.0, 0  # of the step that is under way

    def push(self, block, last=False):
        """Remove the offset, as far as it is known.

        Arguments
        ---------
        block : torch.Tensor
            [samples, mics].
        last : bool

        Returns
        -------
        torch.Tensor
            [samples, mics].
        """
        if self._now is None:
            block = torch.cat([*self._kept, block])
            self._kept = [block]
            if len(block) < 2 * self.step and not (last and len(block)):
                return block[:0]
            first = block[: 2 * self.step].double().mean(0)
            self._before = self._now = first
            self._kept = []
        pieces = []
        while len(block):
            part = block[: self.step - self._count]
            block = block[len(part) :]
            pieces.append(self._without(part.double()))
        return torch.cat(pieces).float() if pieces else block

    def _without(self, part):
        """Samples of one step without their offset, which glides."""
        place = torch.arange(len(part), dtype=torch.float64) + self._count
        weight = (place / self.step)[:, None].to(part)
        signal = part - torch.lerp(self._before, self._now, weight)
        self._sum = self._sum + part.sum(0)
        self._count += len(part)
        if self._count == self.step:
            mean = self._sum / self.step
            change = self._rate * (mean - self._now)
            self._before, self._now = self._now, self._now + change
            self._sum, self._count = 0.0, 0
        return signal


class Drift:
    """Whether the offset of a signal moves enough to be heard by a network.

    Arguments
    ---------
    rate : int
        Hz.

    Example
    -------
    >>> drift = Drift(16000)
    >>> time = np.arange(32000)[:, None] / 16000
    >>> speech = np.sin(2 * np.pi * 200 * time)
    >>> drift.update(speech)
    >>> drift.is_heard()
    False
    >>> drift.update(speech + 2 * time)
    >>> drift.is_heard()
    True
    """

    def __init__(self, rate):
        self.piece = round(OFFSET_SECONDS * rate)
        self._means, self._powers = [], []

    def update(self, block):
        """Take more of the signal, [samples, mics]."""
        if self._means and 2 * len(block) < self.piece:
            return  # the mean of a few samples at the end is no offset
        count = max(1, len(block) // self.piece)
        for piece in np.array_split(block, count):
            self._means.append(piece.mean(0, dtype=np.float64))
            self._powers.append(piece.var(0, dtype=np.float64))

    def power(self):
        """Power of what moves, [mics]."""
        return np.var(self._means, axis=0)

    def is_heard(self):
        """Whether any channel's offset moves as much."""
        rest = np.mean(self._powers, axis=0)
        return bool((self.power() > MOVING * rest).any())


class Copies:
    """Finds channels that are one signal.

    Example
    -------
    >>> copies, noise = Copies(), np.random.default_rng(0).random((9, 3))
    >>> noise[:, 2] = noise[:, 0]
    >>> copies.update(noise)
    >>> copies.differ, list(copies.pairs())
    (True, [(0, 2)])
    """

    def __init__(self):
        self.differ = False  # whether any two do, offsets aside
        self._sums = None  # of all channels
        self._least, self._most, self._peak = np.inf, -np.inf, 0.0

    def update(self, block):
        """Take more of the signal, [samples, mics]."""
        sums = self._sums or [0] * block.shape[1]
        self._sums = [
            zlib.crc32(row.tobytes(), total)
            for row, total in zip(block.T, sums, strict=True)
        ]
        if self.differ:
            return
        apart = block - block[:, :1]
        self._least = np.minimum(self._least, apart.min(0))
        self._most = np.maximum(self._most, apart.max(0))
        self._peak = max(self._peak, float(np.abs(block).max()))
        spread = (self._most - self._least).max()
        self.differ = bool(spread > SAME * self._peak)

    def pairs(self):
        """Places of channels that are the same to the last bit."""
        first = {}
        for place, total in enumerate(self._sums or ()):
            if total in first:
                yield first[total], place
            first.setdefault(total, place)


class Polarity:
    """Finds microphones with swapped wires, by what is slow.

    A wave of 150 Hz is 2.3 m long: neighbours in an array hear the same of it,
    wherever it comes from. With its sign turned one of them hears the opposite.

    Arguments
    ---------
    rate : int
        Hz.

    Example
    -------
    >>> polarity, time = Polarity(16000), np.arange(16000)[:, None] / 16000
    >>> polarity.update(np.sin(800 * time - [0.0, 0.1, 0.2]) * [1, 1, -1])
    >>> polarity.swapped()
    [2]
    """

    def __init__(self, rate):
        self.width = max(1, round(SLOW_SECONDS * rate))
        self._products = 0.0  # [mics, mics]

    def update(self, block):
        """Take more of the signal, [samples, mics]."""
        count = len(block) // self.width
        shape = count, self.width, block.shape[1]
        pieces = block[: count * self.width].reshape(shape)
        # Differences leave out offsets and rumble
        change = np.diff(pieces.mean(1, dtype=np.float64), axis=0)
        self._products = self._products + change.T @ change

    def swapped(self):
        """Places of those that are opposite to most others."""
        if np.ndim(self._products) < 2:
            return []
        scale = np.sqrt(np.diag(self._products))
        heard = np.flatnonzero(scale > 0)
        if len(heard) < 3:  # of two nobody can tell which
            return []
        alike = self._products / np.maximum(np.outer(scale, scale), 1e-300)
        signs = [1]
        for before, now in zip(heard, heard[1:]):
            turned = alike[before, now] < OPPOSITE
            signs.append(-signs[-1] if turned else signs[-1])
        few = 1 if sum(signs) < 0 else -1
        return [int(mic) for mic, sign in zip(heard, signs) if sign == few]


def channel_warnings(numbers, power, copies, polarity, array, moving):
    """Says what is odd about the channels of a recording.

    Arguments
    ---------
    numbers : sequence of int
        Of the microphones.
    power : numpy.ndarray
        [mics], without offsets.
    copies : Copies
    polarity : Polarity
    array : bool
        Whether they are the microphones of an array.
    moving : bool
        Whether an offset moves.

    Returns
    -------
    iterator of str
        To be put behind a name.

    Example
    -------
    >>> powers = np.array([1.0, 1.1, 1e-4])
    >>> found = Copies(), Polarity(16000)
    >>> list(channel_warnings([1, 4, 15], powers, *found, True, False))
    [': microphone 15 is 40 dB softer than the others: check its cable ...']
    """
    if not power.any():
        made = "is separated from" if array else "is made of"
        yield f" is silent: so is what {made} it"
        return
    if moving:
        yield (
            ": the microphones' offset moves, or there is rumble below "
            "speech: it is followed and taken off"
        )
    usual = np.median(power[power > 0])
    for number, value in zip(numbers, power):
        apart = 10 * math.log10(value / usual) if value else -math.inf
        if not array:
            if value == 0:
                yield f": channel {number} is silent"
        elif value == 0:
            yield (
                f": microphone {number} is silent: check its cable; the "
                "separation suffers"
            )
        elif abs(apart) > STRANGE:
            how = "louder" if apart > 0 else "softer"
            yield (
                f": microphone {number} is {abs(apart):.0f} dB {how} than the "
                "others: check its cable and gain; the separation suffers"
            )
    for first, second in copies.pairs() if array else ():
        if power[first]:
            yield (
                f": microphones {numbers[first]} and {numbers[second]} have "
                "one signal: check their cables; the separation suffers"
            )
    for place in polarity.swapped() if array else ():
        yield (
            f": microphone {numbers[place]} has the opposite polarity of the "
            "others: swap its wires; the separation suffers"
        )
