"""Utterances in noise, made while they are needed.

A clip depends on (seed, epoch, key) alone. Waveforms are [samples].
"""

from collections.abc import Sequence

import numpy as np
import soundfile
from scipy.signal import oaconvolve

from .noise import draw_by, mix_at_snr


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
    sample_rate : int
        Hz.
    rirs : sequence of numpy.ndarray
        Impulse responses of rooms to draw from, [samples] each.
    reverberant_share : float
        Share of the utterances that are heard in one of these rooms; the
        clean speech is then that of the room without its noise.

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
        sample_rate=16000,
        rirs=(),
        reverberant_share=1.0,
    ):
        if not speech:
            raise ValueError("the manifest has no utterances")
        self.speech = speech
        self.noise = noise
        self.samples = seconds and round(seconds * sample_rate)
        self.snr, self.gain = snr, gain
        self.seed = seed
        self.sample_rate = sample_rate
        self.rirs, self.reverberant_share = rirs, reverberant_share

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
        speech = _read_speech(self.speech[key]["wav"], self.sample_rate)
        if self.samples:
            speech = _fitted(rng, speech, self.samples)
        if len(self.rirs) and rng.random() < self.reverberant_share:
            rir = self.rirs[rng.integers(len(self.rirs))]
            speech = oaconvolve(speech, rir)[: len(speech)]
        noise, kind = self.noise.draw(key, len(speech), epoch, kind)
        snr = rng.uniform(*self.snr)
        speech = speech * 10 ** (rng.uniform(*self.gain) / 20)
        noisy, clean = mix_at_snr(speech, noise, snr, self.sample_rate)
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
