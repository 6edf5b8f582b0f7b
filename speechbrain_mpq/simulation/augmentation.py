"""Vary training data: voices, noise, talkers, microphones, utterances in noise.

One recorded voice becomes many by another speed and other formants; what a
living room and a cheap array add is added. All of it is drawn from the
mixture's own random number, so that an epoch can be repeated exactly; an
utterance in noise depends on (seed, epoch, key) alone. Waveforms are [samples].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.fft
import soundfile
from scipy.signal import oaconvolve, resample_poly

from ..utils import SAMPLE_RATE
from .noise import NoiseMaker, draw_by, mix_at_snr

WINDOW, HOP = 512, 128  # samples: 32 and 8 ms at 16 kHz
LIFTER = 30  # cepstral coefficients of an envelope: below the shortest pitch
STEEPEST = 20  # dB that the envelope is changed by at most
EQUALIZER = (100, 400, 1000, 2500, 6000)  # Hz, whose levels are drawn
MU = 255  # of the mu-law (ITU-T G.711)


class Augmentation:
    """What is changed in training mixtures, and how often.

    Arguments
    ---------
    voice : float
        Share of voices that get another speed (and pitch, up to 15 %),
        formants (up to 15 %) and equalization (up to 6 dB); one of five of
        those is cut at 4 kHz, as on a telephone, half of these in mu-law.
    noise : float
        Share of mixtures with a generated noise from a place of its own.
    snr : (float, float)
        Lowest and highest ratio of target to noise, dB.
    third_talker : float
        Share of mixtures with a third talker.
    microphones : float
        Share of mixtures whose microphones differ: gains by 1 dB, phases by
        5 degrees (standard deviations), an offset of up to 1 %, and in one of
        50 of them a dead microphone (never the reference).
    doa : float
        Largest error of the given directions, degrees. It is at most a third
        of the angle to the other talker: who points nearer to that one means
        that one.
    doa_share : float
        Share of directions with an error.

    Example
    -------
    >>> augmentation = Augmentation()
    >>> rng = np.random.default_rng(0)
    >>> augmentation.voice(rng, np.ones(16000, np.float32)).dtype
    dtype('float32')
    """

    def __init__(
        self,
        voice=0.5,
        noise=0.5,
        snr=(-5.0, 30.0),
        third_talker=0.1,
        microphones=0.5,
        doa=5.0,
        doa_share=0.5,
    ):
        shares = {
            "voice": voice,
            "noise": noise,
            "third_talker": third_talker,
            "microphones": microphones,
            "doa_share": doa_share,
        }
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is a share, 0 to 1, not {share}")
        low, high = snr
        if low > high or doa < 0:
            raise ValueError(
                f"snr {snr} must rise, and doa {doa} not be negative"
            )
        self.shares, self.snr, self.doa = shares, (low, high), doa

    def happens(self, rng, name):
        """Draw whether something of a share is done.

        Arguments
        ---------
        rng : numpy.random.Generator
        name : str
            "voice", "noise", "third_talker", "microphones" or "doa_share".
        """
        return rng.random() < self.shares[name]

    def voice(self, rng, samples):
        """Draw whether, and how, a voice is changed.

        Arguments
        ---------
        rng : numpy.random.Generator
        samples : numpy.ndarray
            [samples] at 16 kHz.

        Returns
        -------
        samples : numpy.ndarray
            [samples], float32; another number of them.
        """
        if not self.happens(rng, "voice"):
            return samples
        samples = change_speed(samples, rng.uniform(0.85, 1.15))
        narrow = rng.random() < 0.2
        samples = shape_spectrum(
            samples,
            formants=rng.uniform(0.87, 1.15),
            levels=rng.uniform(-6, 6, len(EQUALIZER)),
            highest=rng.uniform(3400, 4000) if narrow else None,
        )
        if narrow and rng.random() < 0.5:
            samples = mu_law(samples)
        return samples.astype(np.float32)

    def noise(self, rng, samples, voices, kind=None):
        """A noise of one of the types that training hears.

        Arguments
        ---------
        rng : numpy.random.Generator
        samples : int
        voices : sequence of numpy.ndarray
            For babble and speech-shaped noise.
        kind : str or None
            One of `NoiseMaker.types`; None draws it.

        Returns
        -------
        noise : numpy.ndarray
            [samples], float32.
        snr : float
            dB below the target.
        """
        maker = NoiseMaker(voices, seed=int(rng.integers(2**31)))
        noise, _ = maker.draw("", samples, kind=kind)
        return noise.astype(np.float32), float(rng.uniform(*self.snr))

    def response(self, rng, microphones):
        """Draw how an array's microphones differ from the reference.

        Arguments
        ---------
        rng : numpy.random.Generator
        microphones : int

        Returns
        -------
        gains : numpy.ndarray
            [mics], complex; 1 for the first, the reference. 0: dead.
        offset : numpy.ndarray
            [mics], of full scale.
        """
        if not self.happens(rng, "microphones"):
            return np.ones(microphones, np.complex64), np.zeros(microphones)
        level = 10 ** (rng.standard_normal(microphones) / 20)
        phase = np.radians(5 * rng.standard_normal(microphones))
        gains = level * np.exp(1j * phase)
        gains[0] = 1
        if microphones > 1 and rng.random() < 1 / 50:
            gains[rng.integers(1, microphones)] = 0
        offset = rng.uniform(-0.01, 0.01, microphones)
        return gains.astype(np.complex64), offset * (gains != 0)

    def direction(self, rng, doa, angle, planar=False):
        """The direction as somebody would point it out.

        Arguments
        ---------
        rng : numpy.random.Generator
        doa : float
            Degrees.
        angle : float
            Between this talker and the other one, degrees.
        planar : bool
            Whether the array tells all around, 0 to 360 degrees.

        Returns
        -------
        doa : float
            Within 0 to 180 degrees of a linear array.
        """
        if not self.happens(rng, "doa_share"):
            return doa
        largest = min(self.doa, angle / 3)
        error = rng.uniform(-largest, largest)
        if planar:
            return float((doa + error) % 360)
        return float(np.clip(doa + error, 0, 180))


def change_speed(samples, factor):
    """Play faster or slower: pitch and formants move with the speed.

    Arguments
    ---------
    samples : numpy.ndarray
        [samples].
    factor : float
        1.1: a tenth faster. Rounded to hundredths.

    Returns
    -------
    samples : numpy.ndarray
        [samples], another number of them.

    Example
    -------
    >>> len(change_speed(np.ones(1100), 1.1)), len(change_speed(np.ones(5), 1))
    (1000, 5)
    """
    percent = round(100 * factor)
    return resample_poly(samples, 100, percent) if percent != 100 else samples


def shape_spectrum(
    samples, formants=1.0, levels=None, highest=None, sample_rate=16000
):
    """Move the formants, with pitch and speed kept, and equalize.

    The envelope of each window's spectrum, smooth by its cepstrum, is
    stretched; the fine structure and the phases stay.

    Arguments
    ---------
    samples : numpy.ndarray
        [samples].
    formants : float
        1.1: a tenth higher, as of a shorter vocal tract.
    levels : numpy.ndarray or None
        dB at the frequencies of `EQUALIZER`, between them interpolated over
        the logarithm of the frequency.
    highest : float or None
        Hz, from where on nothing is left.
    sample_rate : int
        Hz.

    Returns
    -------
    samples : numpy.ndarray
        [samples], as many as there were.

    Example
    -------
    >>> tone = np.sin(np.arange(4000) / 3)
    >>> bool(np.allclose(shape_spectrum(tone), tone, atol=1e-6))
    True
    """
    count = len(samples)
    # a window in front of and behind the signal, so that all of it is covered
    frames = -(-count // HOP) + WINDOW // HOP
    padded = np.zeros((frames - 1) * HOP + WINDOW)
    padded[WINDOW - HOP :][:count] = samples
    window = np.sqrt(np.hanning(WINDOW + 1)[:-1])
    index = np.arange(frames)[:, None] * HOP + np.arange(WINDOW)
    spectra = scipy.fft.rfft(padded[index] * window)  # [frames, bins]
    frequencies = np.fft.rfftfreq(WINDOW, 1 / sample_rate)
    gain = _warped_gain(spectra, formants)  # nepers
    if levels is not None:
        logs = np.log(np.maximum(frequencies, 20))
        decibels = np.interp(logs, np.log(EQUALIZER), levels)
        gain = gain + decibels * np.log(10) / 20
    spectra = spectra * np.exp(gain)
    if highest is not None:
        spectra = spectra * (frequencies < highest)
    pieces = scipy.fft.irfft(spectra, WINDOW) * window
    result = np.zeros_like(padded)
    for row, piece in enumerate(pieces):
        result[row * HOP :][:WINDOW] += piece
    # squared windows at a quarter of their length add up to 2
    return result[WINDOW - HOP :][:count] / 2


def _warped_gain(spectra, formants):
    """Natural logarithm of the gain [frames, bins] that moves the formants."""
    if formants == 1:
        return np.zeros(spectra.shape[1])
    power = np.abs(spectra)
    floor = 1e-4 * power.max(initial=1e-12)
    cepstra = scipy.fft.irfft(np.log(power + floor), WINDOW)
    cepstra[:, LIFTER : WINDOW - LIFTER + 1] = 0
    envelope = scipy.fft.rfft(cepstra).real  # [frames, bins]
    last = envelope.shape[1] - 1
    place = np.minimum(np.arange(last + 1) / formants, last)
    low = np.minimum(place.astype(int), last - 1)
    share = place - low
    moved = envelope[:, low] * (1 - share) + envelope[:, low + 1] * share
    most = STEEPEST * np.log(10) / 20
    return (moved - envelope).clip(-most, most)


def mu_law(samples):
    """Through a telephone's codec: 8 bits by the mu-law (G.711).

    Arguments
    ---------
    samples : numpy.ndarray
        [samples], full scale 1.

    Returns
    -------
    samples : numpy.ndarray

    Example
    -------
    >>> np.round(mu_law(np.array([0.0, 0.001, 0.1, 1.0])), 4)
    array([0.    , 0.001 , 0.0997, 1.    ])
    """
    small = np.log1p(MU * np.abs(samples)) / np.log1p(MU)
    levels = np.round(small * 127) / 127
    return np.sign(samples) * np.expm1(levels * np.log1p(MU)) / MU


class Voices(Sequence):
    """Utterances of a manifest as waveforms, read when they are asked for.

    Arguments
    ---------
    speech : dict
        Manifest with absolute "wav" paths.
    sample_rate : int
        Hz, of all files.

    Example
    -------
    >>> path = getfixture("tmpdir") / "a.wav"
    >>> soundfile.write(path, np.ones(800) / 2, 16000)
    >>> voices = Voices({"a": {"wav": str(path)}})
    >>> len(voices), voices[0].shape
    (1, (800,))
    """

    def __init__(self, speech, sample_rate=16000):
        self.paths = [speech[key]["wav"] for key in sorted(speech)]
        self.sample_rate = sample_rate

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return _read_speech(self.paths[index], self.sample_rate)


@dataclass(frozen=True)
class Reverberation:
    """Rooms that utterances are heard in, and how many of them are.

    Arguments
    ---------
    rirs : sequence of numpy.ndarray
        Impulse responses to draw from, [samples] each.
    share : float
        Share of the utterances that are in one of these rooms, 0 to 1.
    """

    rirs: Sequence = ()
    share: float = 1.0


class NoisySpeech:
    """Puts noise under the utterances of a split.

    Arguments
    ---------
    speech : dict
        Manifest with absolute "wav" paths.
    noise : NoiseMaker or NoiseFolder
    seconds : float or None
        Length of a clip: longer utterances are cut, shorter ones have
        silence around them; None: as long as the utterance.
    snr : sequence of float
        Lowest and highest ratio in dB, drawn evenly.
    gain : sequence of float
        Lowest and highest gain of the whole in dB, drawn evenly.
    seed : int
    reverberation : Reverberation or None
        Rooms in which utterances are heard; the clean speech is then that of
        the room without its noise.

    Example
    -------
    >>> from speechbrain_mpq.simulation.noise import NoiseMaker
    >>> path = getfixture("tmpdir") / "a.wav"
    >>> soundfile.write(path, np.sin(np.arange(8000)) / 2, 16000)
    >>> clips = NoisySpeech({"a": {"wav": str(path)}}, NoiseMaker(), seconds=1)
    >>> noisy, clean, drawn = clips.draw("a")
    >>> noisy.shape, noisy.dtype, sorted(drawn)
    ((16000,), dtype('float32'), ['noise', 'snr'])
    """

    def __init__(
        self,
        speech,
        noise,
        seconds=None,
        snr=(-5.0, 20.0),
        gain=(0.0, 0.0),
        seed=1234,
        reverberation=None,
    ):
        if not speech:
            raise ValueError("the manifest has no utterances")
        self.speech = speech
        self.noise = noise
        self.samples = seconds and round(seconds * SAMPLE_RATE)
        self.snr, self.gain = snr, gain
        self.seed = seed
        self.reverberation = reverberation or Reverberation()

    def draw(self, key, epoch=0, kind=None):
        """One clip.

        Arguments
        ---------
        key : str
            Name of the utterance.
        epoch : int
        kind : str or None
            Type of noise; None draws one.

        Returns
        -------
        noisy, clean : numpy.ndarray
            float32 [samples].
        drawn : dict
            "noise", its type, and "snr" in dB.
        """
        rng = draw_by(self.seed, epoch, key)
        speech = _read_speech(self.speech[key]["wav"])
        if self.samples:
            speech = _fitted(rng, speech, self.samples)
        rirs, share = self.reverberation.rirs, self.reverberation.share
        if len(rirs) and rng.random() < share:
            rir = rirs[rng.integers(len(rirs))]
            speech = oaconvolve(speech, rir)[: len(speech)]
        noise, kind = self.noise.draw(key, len(speech), epoch, kind)
        snr = rng.uniform(*self.snr)
        speech = speech * 10 ** (rng.uniform(*self.gain) / 20)
        noisy, clean = mix_at_snr(speech, noise, snr, SAMPLE_RATE)
        drawn = {"noise": kind, "snr": float(snr)}
        return noisy.astype(np.float32), clean.astype(np.float32), drawn


def _read_speech(path, sample_rate=16000):
    """An utterance [samples] of this sampling rate, checked."""
    speech, rate = soundfile.read(path)
    if rate != sample_rate or speech.ndim != 1:
        raise ValueError(
            f"{path} has {rate} Hz and shape {speech.shape}: convert it to "
            f"one channel at {sample_rate} Hz"
        )
    if not np.isfinite(speech).all() or not speech.any():
        raise ValueError(f"{path} is silent or holds NaN: remove it")
    return speech


def _fitted(rng, speech, samples):
    """A stretch of the speech, or silence around it."""
    if len(speech) <= samples:
        before = int(rng.integers(samples - len(speech) + 1))
        return np.pad(speech, (before, samples - len(speech) - before))
    start = int(rng.integers(len(speech) - samples + 1))
    stretch = speech[start : start + samples]
    if stretch.any():
        return stretch
    # all of it a pause: take it around the loudest sample
    peak = int(np.abs(speech).argmax())
    start = min(max(peak - samples // 2, 0), len(speech) - samples)
    return speech[start : start + samples]
