"""Find where talkers are: directions of arrival and how much each one says.

Every bin of the spectrogram is dominated by at most one talker, most of the
time, and what an array hears first of a sound has not been reflected yet. So
the bins that begin are taken (`onsets`), each is compared with plane waves
from all directions (`steered_response`), and a mixture model tells how many of
the bins came from where (`direction_shares`). Its peaks are the talkers.

Directions are degrees from the array's axis, as the separator takes them; one a
degree is looked at, 0 to 180 of a linear array, which cannot tell what is in
front of it from its mirror image behind, and 0 to 359 of a planar one.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..lobes.models.spatial_features import SPEED_OF_SOUND, projected
from ..utils import SAMPLE_RATE

DIRECTIONS = torch.arange(181.0)  # degrees, of a linear array
AROUND = torch.arange(360.0)  # of a planar one
WINDOW, HOP = 256, 64  # samples: beginnings are seen sharply
BAND = (300.0, 8000.0)  # Hz: below, the array is small against the waves
RISE = 3.0  # times the power that is left of the past
DECAY = 0.9  # of that power, from frame to frame
QUIET = 1e-5  # of the loudest bin: what is softer is no talker
SHARPNESS = 16.0  # of the model: a response 1 / 16 below 1 is e times rarer
BACKGROUND = 0.55  # response that bins of no direction are as likely as
ITERATIONS = 12
MIN_BINS = 50  # fewer say nothing
MAX_BINS = 40_000  # of a long recording, evenly chosen
CONTEXT = 4096  # samples of the past that a block is compared with
MIN_MICROPHONES = 3
LEAST_SHARE = 0.06  # of all onsets: what fewer come from is no talker
LEAST_RATIO = 0.1  # of the strongest talker's share
MOST_TALKERS = 4
PEAK_WIDTH, APART = 0.05, 0.12  # in cosines of directions
MIN_WIDTH, MIN_APART, MAX_APART = 2.0, 8.0, 14.0  # degrees
PLANAR_WIDTH, PLANAR_APART = 5.0, 15.0  # degrees, the same all around


@dataclass(frozen=True)
class Talker:
    """A talker that was found.

    Arguments
    ---------
    doa : float
        Degrees from the array's axis, 0 to 180, of planar arrays below 360.
    share : float
        Part of the onsets that come from there, 0 to 1.

    Example
    -------
    >>> Talker(60.0, 0.4).doa
    60.0
    """

    doa: float
    share: float


@dataclass(frozen=True)
class Localization:
    """What `Localizer.locate` finds.

    Arguments
    ---------
    talkers : tuple of Talker
        The strongest first; none where nothing stands out.
    curve : torch.Tensor
        [directions], part of the onsets from 0, 1, ... degrees; they sum up to
        1 at most, the rest being of no direction.

    Example
    -------
    >>> curve = torch.zeros(181)
    >>> curve[60] = 0.4
    >>> Localization((Talker(60.0, 0.4),), curve).share_at(63)
    0.4
    """

    talkers: tuple
    curve: torch.Tensor

    def share_at(self, doa, tolerance=8.0):
        """Sum the shares near a direction, 0 to 1."""
        near = _degrees_between(_directions(self.curve), doa) <= tolerance
        return round(self.curve[near].sum().item(), 4)


def _directions(curve):
    """Degrees of the entries of a curve [directions, ...]."""
    return AROUND if len(curve) == len(AROUND) else DIRECTIONS


def _degrees_between(one, other):
    """Degrees between directions, the short way around the circle."""
    away = (one - other).abs()
    return torch.minimum(away, 360 - away)


def onsets(spectra, rise=RISE, decay=DECAY, quiet=QUIET, band=BAND):
    """Find the bins in which a sound begins.

    What is reflected comes later than the sound itself, so a bin is taken
    where its power is above what may be left of the past,

        P(t) > rise * max_k P(t - k) decay^(k - 1), k = 1, 2, ...

    (The precedence effect: Huang, Ohnishi and Sugie, "Sound localization in
    reverberant environment based on the model of the precedence effect",
    IEEE Trans. Instrum. Meas. 46, 1997.)

    Arguments
    ---------
    spectra : torch.Tensor
        [mics, bins, frames], complex.
    rise, decay, quiet : float
        See the constants of this module.
    band : (float, float)
        Hz.

    Returns
    -------
    begins : torch.Tensor
        [bins, frames], bool.

    Example
    -------
    >>> spectra = torch.zeros(2, 257, 8, dtype=torch.complex64)
    >>> spectra[:, 64, 3:] = 1.0
    >>> onsets(spectra).nonzero().tolist()
    [[64, 3]]
    """
    power = spectra.abs().square().mean(0)  # [bins, frames]
    left = torch.zeros_like(power)
    for t in range(1, power.shape[1]):
        left[:, t] = torch.maximum(power[:, t - 1], decay * left[:, t - 1])
    frequencies = torch.linspace(0, SAMPLE_RATE / 2, len(power))
    inside = (frequencies >= band[0]) & (frequencies <= band[1])
    loud = power > quiet * power.max()
    return (power > rise * left) & loud & inside[:, None]


def steered_response(bins, frequencies, positions):
    """Compute how well bins fit plane waves from all directions.

    The mean over all pairs (m, n) of microphones of

        cos(angle(y_m / y_n) - 2 pi f (x_m - x_n) cos(doa) / c),

    steered response power with phase transform (SRP-PHAT; DiBiase, PhD thesis,
    Brown University, 2000) of every bin by itself. It is the separator's angle
    feature with all pairs, which one sum over microphones gives: with phases
    u_m, sum_{m != n} = |sum_m u_m exp(-j 2 pi f x_m cos(doa) / c)|^2 - M.

    Arguments
    ---------
    bins : torch.Tensor
        [mics, points], complex.
    frequencies : torch.Tensor
        [points], Hz.
    positions : torch.Tensor
        [mics], metres along the array's axis; [mics, 2] of a planar array,
        for which x cos(doa) + y sin(doa) takes the place of x cos(doa).

    Returns
    -------
    response : torch.Tensor
        [directions, points], at most 1; 0 on average for independent phases.
    """
    mics = len(positions)
    phases = bins / bins.abs().clamp_min(1e-20)
    directions = DIRECTIONS if positions.dim() == 1 else AROUND
    # [directions, mics] metres that a microphone is nearer to the talker
    advance = projected(directions, positions)
    turn = -2 * math.pi * advance.float() / SPEED_OF_SOUND
    response = torch.empty(len(directions), len(frequencies))
    for frequency in frequencies.unique():  # one matrix for each
        points = frequencies == frequency
        angle = turn * frequency
        steering = torch.polar(torch.ones_like(angle), angle)
        power = (steering @ phases[:, points]).abs().square()
        response[:, points] = (power - mics) / (mics * (mics - 1))
    return response


def direction_shares(
    response,
    sharpness=SHARPNESS,
    background=BACKGROUND,
    iterations=ITERATIONS,
):
    """Estimate which part of the bins comes from which direction.

    Bins are drawn from a mixture over directions d, in which the likelihood of
    a bin is exp(sharpness * (response_d - 1)), and of one without direction
    exp(sharpness * (background - 1)). Expectation maximization (Dempster, Laird
    and Rubin 1977) finds the weights; on a grid of directions it sharpens what
    the steered response blurs, as in Mandel, Weiss and Ellis, "Model-based
    expectation-maximization source separation and localization", IEEE Trans.
    Audio Speech Lang. Process. 18, 2010.

    Arguments
    ---------
    response : torch.Tensor
        [directions, points].

    Returns
    -------
    shares : torch.Tensor
        [directions]; with the part that has no direction they sum up to 1.
    """
    count, points = response.shape
    likelihood = torch.empty(count + 1, points)
    likelihood[:count] = torch.exp(sharpness * (response - 1))
    likelihood[count] = math.exp(sharpness * (background - 1))
    weights = torch.full([count + 1], 1 / (count + 1))
    for _ in range(iterations):
        # mean over points of the posteriors, without a matrix of them
        total = weights @ likelihood
        weights = weights * (likelihood @ (1 / total)) / points
    return weights[:count]


def find_talkers(
    curve, count=None, least_share=LEAST_SHARE, least_ratio=LEAST_RATIO
):
    """Find the peaks of the shares, the strongest first.

    A peak is as wide as the array sees sharply: a range of cosines for a linear
    array, which is wider in degrees towards the ends of the axis; a range of
    degrees for a planar one.

    Arguments
    ---------
    curve : torch.Tensor
        [directions], from `direction_shares`.
    """
    curve, directions = curve.clone(), _directions(curve)
    planar = directions is AROUND
    cosines = torch.cos(torch.deg2rad(directions))
    degrees = _degrees_between(directions[:, None], directions)
    near = (cosines[:, None] - cosines).abs() <= PEAK_WIDTH
    near = (near | (degrees <= MIN_WIDTH)).float()
    if planar:
        near = (degrees <= PLANAR_WIDTH).float()
    talkers = []
    while len(talkers) < (MOST_TALKERS if count is None else count):
        shares = near @ curve
        peak = int(shares.argmax())
        share = shares[peak].item()
        least = max(least_share, least_ratio * _strongest(talkers))
        if share <= 0 or (count is None and share < least):
            break
        places = directions
        if planar:  # as they are seen from the peak, -180 to 180
            places = (directions - peak + 180) % 360 - 180
        doa = (near[peak] * curve * places).sum().item() / share
        if planar:
            doa = (doa + peak) % 360
        talkers.append(Talker(round(doa, 2) % 360, round(share, 4)))
        away = _degrees_between(directions, doa)
        if planar:
            curve[away <= PLANAR_APART] = 0
            continue
        apart = cosines - math.cos(math.radians(doa))
        same = (apart.abs() <= APART) & (away <= MAX_APART)
        curve[same | (away <= MIN_APART)] = 0
    return tuple(talkers)


class Localizer:
    """Find the talkers in recordings of an array.

    Arguments
    ---------
    positions : torch.Tensor
        [mics], metres along the array's axis, from microphone 1 towards the
        last, or [mics, 2]; see `SpatialFeatures.positions`.

    Example
    -------
    >>> from speechbrain_mpq.lobes.models.spatial_features import linear_array
    >>> positions = linear_array((5, 7, 9))
    >>> clicks = torch.zeros(16000, 1)
    >>> clicks[::2000] = 1.0
    >>> found = Localizer(positions).locate(clicks.expand(-1, 4))
    >>> [talker.doa for talker in found.talkers]
    [90.0]
    """

    def __init__(self, positions):
        if len(positions) < MIN_MICROPHONES:
            raise ValueError(
                f"{len(positions)} microphones cannot tell where talkers are: "
                f"take a model of {MIN_MICROPHONES} or more, or say where "
                "(--doa, --face, --track)"
            )
        self.positions = torch.as_tensor(positions)
        self.window = torch.hann_window(WINDOW).sqrt()

    def locate(self, waveforms, count=None) -> Localization:
        """Find the talkers of a signal.

        Arguments
        ---------
        waveforms : torch.Tensor
            [samples, mics], 16 kHz, without constant offset.
        count : int or None
            How many talkers there are; None: as many as stand out.
        """
        return self.locate_blocks([waveforms], len(waveforms), count)

    def locate_blocks(self, blocks, samples, count=None):
        """Find the talkers of a signal that comes in pieces.

        Arguments
        ---------
        blocks : iterable of torch.Tensor
            [samples, mics] each, one after the other.
        samples : int
            Of all of them: of long signals fewer onsets are taken a second.
        count : int or None
            How many talkers there are; None: as many as stand out.

        Returns
        -------
        found : Localization
            Silence raises ValueError.
        """
        parts, past = [], torch.zeros(0, len(self.positions))
        for block in blocks:
            if len(block):
                most = math.ceil(MAX_BINS * len(block) / samples)
                parts.append(self._onsets(block, past, most))
                past = torch.cat([past, block])[-CONTEXT:]
        if not parts or not any(peak > 0 for _, _, peak in parts):
            raise ValueError("the signal is silent: nobody talks there")
        bins, frequencies = (torch.cat(p, -1) for p in list(zip(*parts))[:2])
        loudest = max(peak for _, _, peak in parts)
        loud = bins.abs().square().mean(0) > QUIET * loudest
        if loud.sum() < MIN_BINS:
            planar = self.positions.dim() == 2
            return Localization(
                (), torch.zeros(len(AROUND if planar else DIRECTIONS))
            )
        response = steered_response(
            bins[:, loud], frequencies[loud], self.positions
        )
        curve = direction_shares(response)
        return Localization(find_talkers(curve, count), curve)

    def _onsets(self, block, past, most):
        """Bins [mics, points] that begin in a block, their Hz, its peak."""
        signal = torch.cat([past, block]).T
        signal = F.pad(signal, (0, max(0, WINDOW - signal.shape[1])))
        spectra = torch.stft(
            signal,
            WINDOW,
            HOP,
            window=self.window,
            return_complex=True,
            pad_mode="constant",
        )
        begins = onsets(spectra)
        # Seen before; and what the first frame holds may have begun earlier
        begins[:, : max(1, len(past) // HOP)] = False
        bin_, frame = begins.nonzero(as_tuple=True)
        some = torch.linspace(0, len(bin_) - 1, min(most, len(bin_))).long()
        bin_, frame = bin_[some], frame[some]
        peak = spectra.abs().square().mean(0).max().item()
        return spectra[:, bin_, frame], bin_ * SAMPLE_RATE / WINDOW, peak


def _strongest(talkers):
    """Share of the first talker, 0 where there is none."""
    return talkers[0].share if talkers else 0.0
