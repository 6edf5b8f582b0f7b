"""Spectral and spatial features of a mixture (Section 2.1 of the paper).

They are the power of the reference channel, phases between pairs of channels,
and how well those fit a plane wave from the target's direction. Microphones
are numbered from 1 as in the paper; everything is in metres along the array's
axis, measured from microphone 1, the reference. A direction of arrival (DOA)
is the angle between that axis (from microphone 1 towards the last one) and the
talker: at 0 degrees the last microphone hears the talker first, at 90 degrees
all hear it together, at 180 degrees microphone 1 does.

Planar arrays, circular or of any other shape, have positions [mics, 2] in
metres, and DOAs of the full circle: 0 to 360 degrees, counterclockwise from the
x axis as seen from above, so that 90 degrees is the y axis.

Layout: waveforms are [batch, samples, mics]; complex spectra are
[batch, mics, bins, frames]; features are [batch, inputs, frames], which is
what the convolutions behind them take.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from ...utils import SAMPLE_RATE

SPEED_OF_SOUND = 343.0  # metres per second, air at 20 degrees Celsius
LINEAR_15_SPACINGS = (7, 6, 5, 4, 3, 2, 1, 1, 2, 3, 4, 5, 6, 7)  # cm
EPS = 1e-8  # added to a power before its logarithm
MIN_POWER = 1e-20  # smaller ones count as this where phases are taken
STFT_SAMPLES = 2**18  # at a time: less memory to take and give back
BLOCK_FRAMES = 32  # frames at a time: what is in between stays in the cache
PHASES = ("ipd", "steered", "cosine")
# Six pairs that span the nine spacings named in the paper's reference [25].
PAPER_PAIRS = ((1, 15), (2, 14), (3, 13), (12, 4), (7, 10), (8, 9))
# Six pairs on seven microphones: 56, 28, 20, 10, 6 and 3 cm apart.
MINI_PAIRS = ((15, 1), (8, 1), (12, 4), (8, 4), (10, 6), (8, 6))


def linear_array(spacings_cm=LINEAR_15_SPACINGS):
    """Compute a linear array's positions from its gaps.

    Returns
    -------
    positions : torch.Tensor
        [mics], metres from microphone 1, float64.
    """
    gaps = torch.tensor([0.0, *spacings_cm], dtype=torch.float64) / 100
    return gaps.cumsum(0)


def planar_array(positions_cm):
    """Compute a planar array's positions.

    Arguments
    ---------
    positions_cm : sequence of (float, float)
        x and y of every microphone, from any origin.

    Returns
    -------
    positions : torch.Tensor
        [mics, 2], metres, float64.

    Example
    -------
    >>> planar_array([(0, 0), (10, 0), (0, 5)])[2]
    tensor([0.0000, 0.0500], dtype=torch.float64)
    >>> planar_array([(0, 0), (10, 0), (5, 0)])
    Traceback (most recent call last):
    ...
    ValueError: all microphones lie on one line, ...: give spacings_cm instead
    """
    positions = torch.tensor(positions_cm, dtype=torch.float64)
    if positions.dim() != 2 or positions.shape[1] != 2 or len(positions) < 3:
        raise ValueError(
            "positions_cm must be (x, y) of three microphones or more, got "
            f"{list(positions.shape)}"
        )
    if not positions.isfinite().all():
        raise ValueError("positions_cm must be finite numbers")
    apart = torch.pdist(positions)
    if apart.min() <= 0:
        raise ValueError("positions_cm has two microphones in one place")
    spread = torch.linalg.svdvals(positions - positions.mean(0))
    if spread[1] < 1e-6 * spread[0]:
        raise ValueError(
            "all microphones lie on one line, which cannot tell front from "
            "back: give spacings_cm instead"
        )
    return positions / 100


def used_microphones(pairs, reference=1):
    """List the microphones that pairs and reference need, ascending."""
    return sorted({reference, *(mic for pair in pairs for mic in pair)})


def pair_phase(doa, distances, frequencies, speed=SPEED_OF_SOUND):
    """Compute the phase difference of a plane wave (from Eq. 2).

    Arguments
    ---------
    doa : torch.Tensor
        [...], degrees, 0 to 180; 0 to 360 for a planar array.
    distances : torch.Tensor
        [pairs], position of the pair's first microphone minus position of
        its second, metres; [pairs, 2] for a planar array.
    frequencies : torch.Tensor
        [bins], Hz.

    Returns
    -------
    phase : torch.Tensor
        [..., pairs, bins], radians, not wrapped: the expected
        angle(y_m / y_n).
    """
    delay = projected(doa, distances) / speed
    return 2 * math.pi * delay[..., None] * frequencies  # [..., pairs, bins]


def projected(doa, positions):
    """Project positions on directions.

    Arguments
    ---------
    doa : torch.Tensor
        [...], degrees.
    positions : torch.Tensor
        [mics] or, planar, [mics, 2], metres.

    Returns
    -------
    along : torch.Tensor
        [..., mics], metres by which each is nearer to a talker far away.
    """
    angle = torch.deg2rad(doa)
    if positions.dim() == 1:
        return torch.cos(angle)[..., None] * positions
    x, y = positions.unbind(1)
    return torch.cos(angle)[..., None] * x + torch.sin(angle)[..., None] * y


def check_doa(doa, planar=False):
    """Raise ValueError unless every direction lies in 0 to 180 degrees.

    Arguments
    ---------
    doa : torch.Tensor
        Directions of arrival in degrees.
    planar : bool
        Whether the array is planar: 0 to 360 degrees then.
    """
    bad = doa[~((doa >= 0) & (doa <= (360 if planar else 180)))]
    if bad.numel() and planar:
        raise ValueError(
            f"DOA must lie in 0 to 360 degrees, got {bad.flatten()[0]:.1f}: "
            "measure it counterclockwise from the array's x axis, seen from "
            "above"
        )
    if bad.numel():
        raise ValueError(
            f"DOA must lie in 0 to 180 degrees, got {bad.flatten()[0]:.1f}: "
            "measure it from the array's axis (0 = towards the last "
            "microphone, 90 = straight ahead)"
        )


def overlap_add(frames, hop):
    """Add up windows that begin every `hop` samples.

    Arguments
    ---------
    frames : torch.Tensor
        [batch, frames, samples of a window].
    hop : int

    Returns
    -------
    signal : torch.Tensor
        [batch, samples].

    Example
    -------
    >>> overlap_add(torch.ones(1, 3, 4), 2)
    tensor([[1., 1., 2., 2., 2., 2., 1., 1.]])
    """
    batch, count, samples = frames.shape
    parts = -(-samples // hop)
    frames = F.pad(frames, (0, parts * hop - samples))
    signal = frames.new_zeros(batch, count + parts - 1, hop)
    for i in range(parts):
        own = frames[:, :, i * hop : (i + 1) * hop]
        signal[:, i : i + count] += own
    return signal.flatten(1)[:, : (count - 1) * hop + samples]


def _times_conjugate(one, other):
    """One complex number times another's conjugate."""
    (a, b), (c, d) = one, other
    return torch.addcmul(a * c, b, d), torch.addcmul(b * c, a, d, value=-1)


class SpatialFeatures(nn.Module):
    """STFT, log-power spectrum, phase differences and angle feature.

    Arguments
    ---------
    pairs : sequence of (int, int)
        Microphone pairs (m, n), numbered from 1.
    phase : str
        "ipd": the angle of y_m / y_n in radians, as the paper's Eq. 1, one
        map a pair. "steered": cosine and sine of the IPD minus the phase
        that the target's direction causes, two maps a pair. "cosine": its
        cosine only, one map a pair.
    n_fft : int
        Window length in samples (512 = 32 ms).
    hop : int
        Hop in samples (256 = 16 ms).
    spacings_cm : sequence of float
        Gaps of the linear array; None for the paper's 15 microphones.
    positions_cm : sequence of (float, float)
        Of a planar array instead: x and y of each of its microphones.

    Example
    -------
    >>> features = SpatialFeatures()
    >>> features.microphones  # channels that `forward` expects, in this order
    [1, 4, 6, 8, 10, 12, 15]
    >>> spectra = features.stft(torch.randn(2, 16000, 7))
    >>> features(spectra, torch.tensor([[90.0], [30.0]])).shape
    torch.Size([2, 1, 3598, 63])
    >>> square = [(0, 0), (5, 0), (5, 5), (0, 5)]
    >>> planar = SpatialFeatures([(1, 3), (2, 4)], positions_cm=square)
    >>> spectra = planar.stft(torch.randn(1, 16000, 4))
    >>> planar(spectra, torch.tensor([[270.0]])).shape
    torch.Size([1, 1, 1542, 63])
    """

    def __init__(
        self,
        pairs=MINI_PAIRS,
        phase="steered",
        n_fft=512,
        hop=256,
        spacings_cm=None,
        positions_cm=None,
    ):
        super().__init__()
        if phase not in PHASES:
            raise ValueError(f"phase must be one of {PHASES}, got {phase!r}")
        self.settings = {  # what builds them again
            "pairs": pairs,
            "phase": phase,
            "n_fft": n_fft,
            "hop": hop,
            "spacings_cm": spacings_cm,
        }
        if positions_cm is not None:
            if spacings_cm is not None:
                raise ValueError(
                    "spacings_cm are of linear arrays, positions_cm of planar "
                    "ones: give one of them"
                )
            planar_array(positions_cm)  # refused where it is none
            self.settings["positions_cm"] = [[*place] for place in positions_cm]
        self.phase = phase
        self.n_fft = n_fft
        self.hop = hop
        self.bins = n_fft // 2 + 1
        self.microphones = used_microphones(pairs)
        positions = self.array_positions
        self.planar = positions.dim() == 2
        self.array_size = len(positions)
        if self.microphones[-1] > self.array_size:
            raise ValueError(
                f"pair names microphone {self.microphones[-1]}, the array has "
                f"{self.array_size}"
            )
        self._hold_constants(pairs, positions)
        self.maps = _map_names(pairs, phase)
        self.inputs = len(self.maps) * self.bins

    def _hold_constants(self, pairs, positions):
        """Buffers of the set-up, not of the training: not in state_dict."""
        index = {mic: i for i, mic in enumerate(self.microphones)}
        first = torch.tensor([index[m] for m, _ in pairs])
        second = torch.tensor([index[n] for _, n in pairs])
        used = positions[torch.tensor(self.microphones) - 1]
        constants = {
            "window": torch.hann_window(self.n_fft).sqrt(),
            "first": first,
            "second": second,
            "distances": (used[first] - used[second]).float(),
            "frequencies": torch.arange(self.bins) * SAMPLE_RATE / self.n_fft,
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    @property
    def array_positions(self):
        """Metres of all microphones of the array, [mics] or [mics, 2]."""
        if "positions_cm" in self.settings:
            return planar_array(self.settings["positions_cm"])
        return linear_array(self.settings["spacings_cm"] or LINEAR_15_SPACINGS)

    @property
    def positions(self):
        """Metres of the microphones that are used, [mics] or [mics, 2]."""
        return self.array_positions[torch.tensor(self.microphones) - 1]

    def stft(self, waveforms):
        """Compute the short-time Fourier transform of every channel.

        Arguments
        ---------
        waveforms : torch.Tensor
            [batch, samples, mics].

        Returns
        -------
        spectra : torch.Tensor
            [batch, mics, bins, frames], complex.
        """
        batch, samples, mics = waveforms.shape
        margin = self.n_fft // 2
        flat = F.pad(waveforms.transpose(1, 2), (margin, margin)).flatten(0, 1)
        spectra = self.frame_spectra(flat).transpose(1, 2)
        return spectra.view(batch, mics, *spectra.shape[1:])

    def frame_spectra(self, signals):
        """Spectra of all whole windows: an STFT without padding.

        Arguments
        ---------
        signals : torch.Tensor
            [channels, samples].

        Returns
        -------
        spectra : torch.Tensor
            [channels, frames, bins], complex.
        """
        frames = signals.unfold(1, self.n_fft, self.hop)
        few = max(1, STFT_SAMPLES // signals.shape[1])  # channels
        if signals.requires_grad:
            return torch.fft.rfft(frames * self.window)
        kind = torch.promote_types(signals.dtype, torch.complex32)
        shape = *frames.shape[:2], self.bins
        spectra = torch.empty(shape, dtype=kind, device=signals.device)
        for part, own in zip(frames.split(few), spectra.split(few)):
            torch.fft.rfft(part * self.window, out=own)
        return spectra

    def istft(self, spectrum, samples):
        """Synthesise the waveform of one-channel spectra.

        Arguments
        ---------
        spectrum : torch.Tensor
            [batch, bins, frames], complex.
        samples : int
            Length of the waveform.

        Returns
        -------
        waveform : torch.Tensor
            [batch, samples].
        """
        if spectrum.requires_grad:
            # The same signal, and the gradients that earlier trainings had.
            options = {"window": self.window, "length": samples}
            return torch.istft(spectrum, self.n_fft, self.hop, **options)
        frames = torch.fft.irfft(spectrum.transpose(1, 2), n=self.n_fft)
        signal = overlap_add(frames * self.window, self.hop)
        energy = self.window.square().expand(1, frames.shape[1], -1)
        energy = overlap_add(energy, self.hop)
        start = self.n_fft // 2
        kept = slice(start, start + samples)
        return signal[:, kept] / energy[:, kept]

    def forward(self, spectra, doa):
        """Compute the features for the talkers at `doa`.

        Arguments
        ---------
        spectra : torch.Tensor
            [batch, mics, bins, frames], complex; reference channel first.
        doa : torch.Tensor
            [batch, targets], degrees from the array's axis, 0 to 180 (planar
            arrays: 0 to 360, counterclockwise from the x axis); or [batch,
            targets, frames] for talkers who move, frame t being centred on
            the sample t * hop.

        Returns
        -------
        features : torch.Tensor
            [batch, targets, inputs, frames].
        """
        frames = spectra.shape[-1]
        self._check(doa, frames)
        shape = (*doa.shape[:2], frames, self.inputs)
        features = spectra.real.new_empty(shape)
        maps = features.unflatten(3, (-1, self.bins))  # [B, K, ..., maps, bins]
        for start in range(0, frames, BLOCK_FRAMES):
            block = slice(start, start + BLOCK_FRAMES)
            block_doa = doa[..., block] if doa.dim() == 3 else doa
            self._fill(maps[:, :, block], spectra[..., block], block_doa)
        return features.transpose(2, 3)

    def analyse(self, waveforms, level, doa):
        """Compute the features of waveforms at unit level.

        Arguments
        ---------
        waveforms : torch.Tensor
            [batch, samples, mics], reference channel first.
        level : torch.Tensor
            [batch, 1], what they are divided by.
        doa : torch.Tensor
            As `forward` takes it.

        Returns
        -------
        features : torch.Tensor
            [batch, targets, inputs, frames].
        reference : torch.Tensor
            [batch, bins, frames], complex spectrum of the reference channel.
        """
        spectra = self.stft(waveforms / level[..., None])
        return self(spectra, doa), spectra[:, 0]

    def _check(self, doa, frames):
        """Raise ValueError on DOAs that these features cannot take."""
        if doa.dim() not in (2, 3) or doa.shape[2:] not in ((), (frames,)):
            raise ValueError(
                f"expected DOAs [batch, targets] or [batch, targets, {frames}],"
                " one for each frame of the spectrogram, got "
                f"{list(doa.shape)}"
            )
        check_doa(doa, self.planar)

    def _fill(self, maps, spectra, doa):
        """Write the maps [batch, targets, frames, maps, bins] of a block."""
        # As the STFT leaves them in memory: [B, mics, frames, bins, 2]
        parts = torch.view_as_real(spectra.transpose(2, 3)).unbind(-1)
        real, imag = (part.contiguous() for part in parts)
        power = torch.addcmul(real * real, imag, imag)
        size = power.clamp_min(MIN_POWER).rsqrt()
        unit = real * size, imag * size
        ratio = _times_conjugate(
            [part.index_select(1, self.first) for part in unit],
            [part.index_select(1, self.second) for part in unit],
        )  # [B, pairs, frames, bins] twice
        cosine, sine = self._turned(ratio, doa)  # [B, K, frames, pairs, bins]
        maps[..., 0, :] = torch.log10(power[:, :1] + EPS)
        pairs = len(self.first)
        if self.phase == "ipd":
            angles = torch.atan2(ratio[1], ratio[0])
            maps[..., 1:-1, :] = angles.transpose(1, 2)[:, None]
        else:
            maps[..., 1 : pairs + 1, :] = cosine
        if self.phase == "steered":
            maps[..., pairs + 1 : -1, :] = sine
        maps[..., -1, :] = cosine.mean(3)

    def _turned(self, ratio, doa):
        """Cosine and sine of the phase ratios, turned to the targets (Eq. 3).

        The cosine is 1 where a bin comes from the target's direction, the
        sine tells on which side of it it lies.
        """
        phase = pair_phase(doa, self.distances, self.frequencies)
        if doa.dim() == 2:
            phase = phase[:, :, None]  # [B, K, frames, pairs, bins]
        ratio = [part.transpose(1, 2)[:, None] for part in ratio]
        return _times_conjugate(ratio, (phase.cos(), phase.sin()))


def _map_names(pairs, phase):
    """What the inputs are, `bins` of each: LPS, phases, angle feature."""
    kinds = {"steered": ("cosine", "sine")}.get(phase, (phase,))
    phases = [f"{kind} {m}-{n}" for kind in kinds for m, n in pairs]
    return ["lps", *phases, "af"]
