"""Features in one loop over the bins, compiled by Numba, in front of engines.

PyTorch makes them in some twenty passes over memory, each of them a kernel of
its own; where an engine runs the network in int8, that is a large part of the
time. Here every bin is read once and every feature written once, a few frames
at a time, so that windows, spectra and what is in between stay in the
processor's cache. PyTorch does what it has fast kernels for: transforms,
logarithms and arcs.

The numbers are PyTorch's up to rounding: sums may be fused multiply-adds.
The machine code is kept in a folder `__pycache__` beside this file or, where
none can be written, in Numba's cache of the user.
"""

import logging

import numpy as np
import torch
import torch.nn.functional as F

from ...lobes.models.spatial_features import (
    BLOCK_FRAMES,
    EPS,
    MIN_POWER,
    PHASES,
    SpatialFeatures,
    pair_phase,
)

try:
    import numba
except ImportError as error:
    numba, _why = None, error

logger = logging.getLogger(__name__)
IPD, STEERED = PHASES.index("ipd"), PHASES.index("steered")
OFFSET, LEAST = np.float32(EPS), np.float32(MIN_POWER)


def fused(features):
    """Choose the fast form of features, where there is one.

    Arguments
    ---------
    features : SpatialFeatures

    Returns
    -------
    features : SpatialFeatures
        `FusedFeatures` of the same settings; without Numba those given.

    Example
    -------
    >>> fused(SpatialFeatures([(8, 1)])).microphones
    [1, 8]
    """
    if numba is None:
        logger.info(
            "features in PyTorch, which takes two to three times as long "
            "(%s): pip install 'speechbrain_mpq[fast]'",
            _why,
        )
        return features
    return FusedFeatures(**features.settings)


def _compiled(function):
    """Compile a function when it is first called, with its cache on disk."""
    if numba is None:
        return function
    options = {
        "nogil": True,
        "error_model": "numpy",  # no exceptions for divisions by zero
        "fastmath": {"contract"},  # fused multiply-adds, nothing else
    }
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for it: once in every process
        return numba.njit(**options)(function)


@_compiled
def _unit(spectrum, power, real, imag):
    """Power of a spectrum [2 * bins], and the spectrum at unit size."""
    for i in range(len(power)):
        a, b = spectrum[2 * i], spectrum[2 * i + 1]
        size = a * a + b * b
        power[i] = size + OFFSET
        size = LEAST if size < LEAST else size  # NaN stays NaN
        factor = np.float32(1) / np.sqrt(size)
        real[i], imag[i] = a * factor, b * factor


@_compiled
def _ratio(one, other, turn, real, imag, total):
    """The phase ratio of two microphones; its cosine after turning."""
    (a, b), (c, d), (cosine, sine) = one, other, turn
    for i in range(len(total)):
        x = a[i] * c[i] + b[i] * d[i]
        y = b[i] * c[i] - a[i] * d[i]
        real[i], imag[i] = x, y
        total[i] += x * cosine[i] + y * sine[i]


@_compiled
def _turned_ratio(one, other, turn, real, imag, total):
    """The phase ratio of two microphones, turned to the target."""
    (a, b), (c, d), (cosine, sine) = one, other, turn
    for i in range(len(total)):
        x = a[i] * c[i] + b[i] * d[i]
        y = b[i] * c[i] - a[i] * d[i]
        turned = x * cosine[i] + y * sine[i]
        real[i], imag[i] = turned, y * cosine[i] - x * sine[i]
        total[i] += turned


@_compiled
def _fill(spectra, pairs, turns, maps, sines, start, stop, kind):
    """Write the maps of some frames; logarithms and arcs are not taken yet.

    spectra: [mics, frames, 2 * bins] from frame `start` on, pairs: [pairs,
    2], turns: [targets, frames or 1, 2, pairs, bins], maps: [targets, all
    frames, maps, bins], sines: [frames, pairs, bins] that are no features.
    """
    mics, bins, count = len(spectra), maps.shape[3], len(pairs)
    power = np.empty(bins, np.float32)
    real = np.empty((mics, bins), np.float32)
    imag = np.empty((mics, bins), np.float32)
    part = np.float32(1) / np.float32(count)
    for f in range(stop - start):
        for m in range(mics - 1, -1, -1):  # the reference's power stays
            _unit(spectra[m, f], power, real[m], imag[m])
        for k in range(len(maps)):
            own, turn = maps[k, start + f], turns[k, f % turns.shape[1]]
            level, total = own[0], own[len(own) - 1]
            for i in range(bins):
                level[i] = power[i]
                total[i] = 0
            for p in range(count):
                m, n = pairs[p]
                one, other = (real[m], imag[m]), (real[n], imag[n])
                angle = turn[0, p], turn[1, p]
                if kind == IPD:
                    _ratio(one, other, angle, own[1 + p], sines[f, p], total)
                    continue
                sine = sines[f, p]
                if kind == STEERED:
                    sine = own[1 + count + p]
                _turned_ratio(one, other, angle, own[1 + p], sine, total)
            for i in range(bins):
                total[i] *= part


class FusedFeatures(SpatialFeatures):
    """`SpatialFeatures` on a CPU, in float32 and without gradients, faster.

    On other devices, for other types and for gradients it is its base class.

    Arguments
    ---------
    **settings
        Of `SpatialFeatures`.

    Example
    -------
    >>> torch.manual_seed(0)
    <torch._C.Generator object at ...>
    >>> plain = SpatialFeatures(pairs=[(8, 1), (15, 1)], phase="cosine")
    >>> spectra = plain.stft(torch.randn(1, 8000, 3))
    >>> doa = torch.tensor([[60.0]])
    >>> difference = fused(plain)(spectra, doa) - plain(spectra, doa)
    >>> bool(difference.abs().max() < 1e-5)
    True
    """

    def forward(self, spectra, doa):
        """Compute the features, as `SpatialFeatures.forward`."""
        if not _is_covered(spectra, torch.complex64):
            return super().forward(spectra, doa)
        batch, _, _, frames = spectra.shape
        self._check(doa, frames)
        maps = _Maps(self, batch, doa, frames)
        for item, start, stop in maps.blocks():
            block = spectra[item, ..., start:stop].transpose(1, 2)
            maps.fill(item, start, stop, block.contiguous())
        return maps.finished()

    def analyse(self, waveforms, level, doa):
        """Analyse waveforms, as `SpatialFeatures.analyse`."""
        if not _is_covered(waveforms, torch.float32):
            return super().analyse(waveforms, level, doa)
        batch, samples, mics = waveforms.shape
        frames = (samples + self.n_fft // 2 * 2 - self.n_fft) // self.hop + 1
        self._check(doa, frames)
        maps = _Maps(self, batch, doa, frames)
        rows = waveforms.transpose(1, 2).contiguous()  # [B, mics, samples]
        scaled = self.window / level  # [B, n_fft]
        windows = rows.new_empty(mics, BLOCK_FRAMES, self.n_fft)
        shape = mics, BLOCK_FRAMES, self.bins
        spectra = rows.new_empty(shape, dtype=torch.complex64)
        shape = batch, frames, self.bins
        reference = rows.new_empty(shape, dtype=torch.complex64)
        for item, start, stop in maps.blocks():
            signals = self._block(rows[item], start)
            torch.mul(signals, scaled[item], out=windows)
            torch.fft.rfft(windows, out=spectra)
            reference[item, start:stop] = spectra[0, : stop - start]
            maps.fill(item, start, stop, spectra)
        return maps.finished(), reference.transpose(1, 2)

    def _block(self, rows, start):
        """Samples of frames from `start` on, [mics, block, n_fft]."""
        first = start * self.hop - self.n_fft // 2
        last = first + (BLOCK_FRAMES - 1) * self.hop + self.n_fft
        samples = rows.shape[1]
        rows = rows[:, max(first, 0) : min(last, samples)]
        if first < 0 or last > samples:
            rows = F.pad(rows, (max(-first, 0), max(last - samples, 0)))
        return rows.unfold(1, self.n_fft, self.hop)


class _Maps:
    """Features that are filled a block of frames at a time."""

    def __init__(self, setup, batch, doa, frames):
        self.setup, self.frames = setup, frames
        self.kind = PHASES.index(setup.phase)
        shape = batch, doa.shape[1], frames, setup.inputs
        self.maps = torch.empty(shape).unflatten(3, (-1, setup.bins))
        self.pairs = torch.stack([setup.first, setup.second], dim=1).numpy()
        shape = BLOCK_FRAMES, len(self.pairs), setup.bins
        self.sines = torch.empty(shape)
        self.doa = doa
        self.turns = self._turns(doa[..., None]) if doa.dim() == 2 else None

    def blocks(self):
        """Item of the batch, first frame and the frame behind the last."""
        for item in range(len(self.maps)):
            for start in range(0, self.frames, BLOCK_FRAMES):
                yield item, start, min(start + BLOCK_FRAMES, self.frames)

    def fill(self, item, start, stop, spectra):
        """Write maps of spectra [mics, frames, bins], `start` being first."""
        if self.turns is not None:
            turns = self.turns[item]
        else:  # talkers who move: of all frames they would take much memory
            turns = self._turns(self.doa[item, :, start:stop])
        maps = self.maps[item]  # [K, all frames, maps, bins]
        _fill(
            torch.view_as_real(spectra).flatten(2).numpy(),
            self.pairs,
            turns.numpy(),
            maps.numpy(),
            self.sines.numpy(),
            start,
            stop,
            self.kind,
        )
        if self.kind == IPD:
            cosines = maps[:, start:stop, 1:-1]
            torch.atan2(self.sines[: stop - start], cosines, out=cosines)

    def finished(self):
        """The features [B, K, inputs, frames], all of them filled."""
        self.maps[..., 0, :].log10_()
        return self.maps.flatten(3).transpose(2, 3)

    def _turns(self, doa):
        """Phases of the targets (Eq. 3), [..., frames, 2, pairs, bins]."""
        setup = self.setup
        phase = pair_phase(doa, setup.distances, setup.frequencies)
        return torch.stack([phase.cos(), phase.sin()], dim=-3)


def _is_covered(values, dtype):
    """Tell whether the compiled loop takes them."""
    return (
        values.dtype == dtype
        and values.device.type == "cpu"
        and not values.requires_grad
    )
