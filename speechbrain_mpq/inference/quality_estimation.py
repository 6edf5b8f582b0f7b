"""Speech quality of recordings, without a reference, by a packed model.

A network with binary activation maps is run with a bit a value (`BitDNSMOS`);
its scores are those of the training graph to the last bit.
"""

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch

from ..evaluation.signal_tasks import SPEECH_QUALITY
from ..lobes.models.dnsmos import DNSMOS, BinaryDNSMOS, BitDNSMOS, LogMel
from ..utils import BUNDLED_QUALITY_MODEL, SAMPLE_RATE
from .audio import AudioError, AudioFile, as_waveforms
from .chunks import relative_lengths
from .folder import fetch_folder, save_separator
from .loading import load
from .registry import flag, number, register, several, whole

logger = logging.getLogger(__name__)
SECONDS = 3  # of sound that get one score
LEVEL = 0.05  # RMS of what the network hears
RANGES = {"pesq": (1.0, 4.65), "p808": (1.0, 5.0)}  # of the measures
PAUSE = 1e-3  # of the recording's RMS: what is below has nothing to judge


@dataclass(frozen=True)
class Quality:
    """How good a recording sounds.

    Arguments
    ---------
    score : float
        Mean of the windows.
    measure : str
        What it estimates: "pesq" or "p808".
    seconds : float
        Length of the recording.
    windows : tuple of (float, float)
        Start in seconds and score of each window.
    """

    score: float
    measure: str
    seconds: float
    windows: tuple


class QualityEstimator:
    """Predicts the quality of speech, without a reference.

    Windows of 3 s get scores, each begins 1.5 s behind the one before and the
    last one ends with the recording; their mean counts. What is shorter is
    repeated until it fills a window, pauses are left out. The level has no
    share in it. Scores of windows stay in the range of the measure.

    Arguments
    ---------
    network : DNSMOS or BinaryDNSMOS

    Example
    -------
    >>> estimator = QualityEstimator.from_pretrained()
    >>> noise = torch.randn(2, 16000, generator=torch.manual_seed(0))
    >>> bool((estimator.estimate_batch(noise) < 2).all())
    True
    """

    sample_rate = SAMPLE_RATE

    def __init__(self, network):
        self.network = network.eval()
        self.measure = network.settings["measure"]
        self.features = LogMel(SAMPLE_RATE)
        self._bits = None
        if isinstance(network, BinaryDNSMOS):
            self._bits = BitDNSMOS(network)

    @classmethod
    def from_pretrained(cls, source=BUNDLED_QUALITY_MODEL, **hub):
        """Load a folder or hub repository; nothing in it is executed.

        Arguments
        ---------
        source : str or Path
            Packed folder, or "user/name" on the hub; the model that comes
            with the package if not given.
        **hub
            `revision`, `cache_dir`, `token`, `endpoint` and
            `local_files_only` of `folder.fetch_folder`.

        Returns
        -------
        QualityEstimator
        """
        folder = fetch_folder(source, **hub)
        network = load(folder)
        if not isinstance(network, DNSMOS):
            raise ValueError(
                f"{folder} holds a {type(network).__name__}, which predicts "
                "no speech quality: name another folder"
            )
        return cls(network)

    def estimate_file(self, source, name=None, channel=1) -> Quality:
        """Score a recording of any length; memory does not grow with it.

        Arguments
        ---------
        source : str, Path or binary file
            Anything that libsndfile reads, 16 kHz or more.
        name : str or None
            For messages; None: the source.
        channel : int
            Which of several is judged, from 1.

        Returns
        -------
        Quality
        """
        audio = AudioFile(
            source, [channel], None, name, min_samples=self.features.n_fft
        )
        stats = audio.scan()
        if stats.silent:
            raise _silence(audio.name)
        audio.log_warnings()
        blocks = (block[:, 0] for block in audio.blocks())
        return self._judge(blocks, stats.samples, stats.rms, audio.name)

    def estimate_batch(self, wavs, wav_lens=None):
        """Score waveforms of 16 kHz.

        Arguments
        ---------
        wavs : torch.Tensor
            [batch, samples].
        wav_lens : torch.Tensor or None
            Relative lengths [batch], as in SpeechBrain; None: all are whole.

        Returns
        -------
        torch.Tensor
            [batch].
        """
        wavs = as_waveforms(wavs)
        if wavs.ndim != 2:
            raise ValueError(
                f"wavs must be [batch, samples], not {tuple(wavs.shape)}"
            )
        size = wavs.shape[1]
        lens = relative_lengths(wav_lens, wavs)
        scores = []
        for index, wav in enumerate(wavs):
            wav = wav[: round(size * lens[index].item())]
            name = f"waveform {index}"
            if not torch.isfinite(wav).all():
                raise AudioError(name, "holds NaN or infinity", "repair it")
            if len(wav) < self.features.n_fft:
                raise AudioError(
                    name,
                    f"{len(wav)} samples are shorter than one window of "
                    f"{self.features.n_fft}",
                    "record more",
                )
            wav = wav - wav.mean()  # as of files
            rms = wav.double().square().mean().sqrt().item()
            if not rms > 0:
                raise _silence(name)
            scores.append(self._judge([wav], len(wav), rms, name).score)
        return torch.tensor(scores)

    def _judge(self, blocks, samples, rms, name):
        """Score what comes in blocks, [samples] each."""
        size = SECONDS * SAMPLE_RATE
        if samples < size:
            logger.warning(
                f"{name}: {samples / SAMPLE_RATE:.2f} s are repeated to fill "
                f"{SECONDS} s; longer recordings are judged more reliably"
            )
            wave = torch.cat(list(blocks))
            blocks = [wave.repeat(-(-size // len(wave)))[:size]]
        scored = []
        for start, window in _windows(blocks, max(samples, size), size):
            if window.std(correction=0) < PAUSE * rms:
                continue
            score = self._score(window * (LEVEL / rms))
            scored.append((start / SAMPLE_RATE, score))
        mean = float(np.mean([score for _, score in scored]))
        seconds = samples / SAMPLE_RATE
        return Quality(mean, self.measure, seconds, tuple(scored))

    @torch.inference_mode()
    def _score(self, window):
        """Score of one window, [samples]."""
        features = self.features(window[None].float())  # [1, T, mels]
        if self._bits:
            score = float(self._bits(features[0]))
        else:
            score = self.network(features).item()
        if not math.isfinite(score):  # which limits would make a good one
            raise ValueError(
                f"the model puts out {score}: its weights are damaged or "
                "diverged: take another folder"
            )
        low, high = RANGES.get(self.measure, (-np.inf, np.inf))
        return min(max(score, low), high)


def save_quality_estimator(network, folder, metadata=None, **card):
    """Save a network as the packed folder of a `QualityEstimator`.

    Arguments
    ---------
    network : DNSMOS or BinaryDNSMOS
        Quantized, or in full precision; it is left as it is.
    folder : str or Path
        Made if it is not there.
    metadata : dict or None
        Anything that JSON can hold, for quantization_config.json.
    **card
        What `card.model_card` takes: `metrics`, `reference`, `base_model`,
        `license`.

    Returns
    -------
    Path

    Example
    -------
    >>> folder = getfixture("tmpdir") / "quality"
    >>> _ = save_quality_estimator(BinaryDNSMOS(), folder)
    >>> QualityEstimator.from_pretrained(folder).measure
    'pesq'
    """
    card = {"task": SPEECH_QUALITY, **card}
    return save_separator(network, folder, metadata, **card)


def _windows(blocks, samples, size):
    """(start, [size]) of windows half of which overlap, and of the last."""
    starts = list(range(0, samples - size + 1, size // 2))
    if starts[-1] < samples - size:
        starts.append(samples - size)
    held, begin = torch.zeros(0), 0  # samples from `begin` on
    for block in blocks:
        held = torch.cat([held, block])
        while starts and starts[0] + size <= begin + len(held):
            held, begin = held[starts[0] - begin :], starts[0]
            yield starts.pop(0), held[:size]


def _silence(name):
    """The error about a recording in which nothing is heard."""
    return AudioError(
        name, "it is silent: there is nothing to judge", "give another one"
    )


def _layer(value, place):
    """Check of [channels, pooled]."""
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{place} must be [channels, pooled]")
    return [whole(1, 2**12)(value[0], place), flag(value[1], place)]


def _word(value, place):
    """Check of a short name."""
    if not isinstance(value, str) or not value.isidentifier():
        raise ValueError(f"{place} must be a name of letters and digits")
    return value[:32]


def _probe(network):
    """What a network makes of some noise."""
    generator = torch.Generator().manual_seed(0)
    return network(torch.randn(1, 32, 120, generator=generator) / 4)


_SIZES = {
    "shape": several(_layer, 1, 16),
    "dense": several(whole(1, 2**12), 1, 8),
    "dropout": number(0, 1),
    "measure": _word,
}
register(DNSMOS, _SIZES, probe=_probe)
register(
    BinaryDNSMOS,
    {
        **_SIZES,
        "signed": flag,
        "beta": number(0, 1e6),
        "binary_weights": flag,
    },
    probe=_probe,
)
