"""Words to classes: log-mel features, a GRU of integers, a linear classifier.

The features are of float32, as everything before a network; what they are
rounded to and all behind it are integers (`nnet/integer_gru.py`). Settings and
statistics of the features are part of the integer GRU's file.
"""

import math

import torch
from speechbrain.lobes.features import Fbank

from ...nnet.integer_gru_file import load_integer_gru

WINDOW = 25  # ms
DIGITS = 4  # of statistics behind the point: they are text in the file
LEAST_DEVIATION = 1e-3
RATES = 1000, 192000  # Hz
MOST_MELS = 512


class NormalizedFbank(torch.nn.Module):
    """Log-mel features with the mean and the deviation of a training set.

    Arguments
    ---------
    sample_rate : int
        Hz.
    n_mels : int
    hop_length : int or float
        ms, from frame to frame.
    most_seconds : float
        What is behind is cut.
    mean, deviation : sequence of float or None
        [n_mels]; None: from `fit`.

    Example
    -------
    >>> features = NormalizedFbank(8000, 24, 20)
    >>> noise = torch.randn(3, 8000)
    >>> features.fit(noise)
    >>> frames = features(noise[0])
    >>> frames.shape, features.settings["n_mels"]
    (torch.Size([51, 24]), 24)
    """

    def __init__(
        self,
        sample_rate,
        n_mels,
        hop_length,
        most_seconds=1.0,
        mean=None,
        deviation=None,
    ):
        super().__init__()
        self.sample_rate, self.n_mels = sample_rate, n_mels
        self.hop_length, self.most_seconds = hop_length, most_seconds
        self.window = round(sample_rate * WINDOW / 1000)
        self.compute = Fbank(
            sample_rate=sample_rate,
            n_mels=n_mels,
            hop_length=hop_length,
            n_fft=self.window,
            f_max=sample_rate // 2,
        )
        values = (0.0, mean), (1.0, deviation)
        for name, (default, statistic) in zip(("mean", "deviation"), values):
            statistic = [default] * n_mels if statistic is None else statistic
            self.register_buffer(name, torch.tensor(statistic).float())

    @property
    def settings(self):
        """Arguments, for JSON."""
        return {
            "sample_rate": self.sample_rate,
            "n_mels": self.n_mels,
            "hop_length": self.hop_length,
            "most_seconds": self.most_seconds,
            "mean": [round(v, DIGITS) for v in self.mean.tolist()],
            "deviation": [round(v, DIGITS) for v in self.deviation.tolist()],
        }

    def fit(self, waveforms):
        """Take mean and deviation of all frames of waveforms [samples]."""
        frames = torch.cat([self._frames(wave) for wave in waveforms])
        deviation = frames.std(0).clamp(min=LEAST_DEVIATION)
        self.mean = frames.mean(0).round(decimals=DIGITS)
        self.deviation = deviation.round(decimals=DIGITS)

    def forward(self, waveform):
        """Features [frames, n_mels] of a waveform [samples]."""
        return (self._frames(waveform) - self.mean) / self.deviation

    @torch.no_grad()
    def _frames(self, waveform):
        """Log-mel frames as they are."""
        waveform = torch.as_tensor(waveform, dtype=torch.float32)
        if waveform.ndim != 1 or len(waveform) < self.window:
            raise ValueError(
                f"a waveform {list(waveform.shape)}: give one channel of at "
                f"least {self.window} samples, {WINDOW} ms at "
                f"{self.sample_rate} Hz"
            )
        if not torch.isfinite(waveform).all():
            raise ValueError(
                "a waveform with NaN or infinity: repair or leave it out"
            )
        most = round(self.most_seconds * self.sample_rate)
        return self.compute(waveform[None, :most])[0]


class IntegerClassifier(torch.nn.Module):
    """Classes of spoken words by an integer GRU.

    Arguments
    ---------
    integer : IntegerGRU
        With a classifier, and with features in its description.
    """

    def __init__(self, integer):
        super().__init__()
        description = integer.description
        if not description["classes"]:
            raise ValueError(
                "an integer GRU without a classifier: save it with one"
            )
        settings = check_features(description.get("features"))
        if settings["n_mels"] != description["input_size"]:
            raise ValueError(
                f"{settings['n_mels']} features for a GRU of "
                f"{description['input_size']}"
            )
        self.integer, self.features = integer, NormalizedFbank(**settings)
        count = description["classes"]
        self.labels = description["labels"] or [str(i) for i in range(count)]

    @classmethod
    def read(cls, path):
        """The classifier of a file of `save_integer_gru`."""
        return cls(load_integer_gru(path))

    @torch.no_grad()
    def forward(self, waveforms):
        """Scores of waveforms, a list of [samples].

        Returns
        -------
        torch.Tensor
            [waveforms, classes], int32; the largest is the class.
        """
        frames = [self.features(waveform) for waveform in waveforms]
        padded = torch.nn.utils.rnn.pad_sequence(frames, batch_first=True)
        lengths = torch.tensor([len(row) for row in frames])
        return self.integer.classify(self.integer.quantize(padded), lengths)


def check_features(settings):
    """Refuse settings that no `NormalizedFbank` has, whoever wrote them.

    Arguments
    ---------
    settings : dict or None
        From a file.

    Returns
    -------
    dict

    Example
    -------
    >>> check_features(None)
    Traceback (most recent call last):
    ...
    ValueError: the file does not say what its features are: ...
    """
    if settings is None:
        raise ValueError(
            "the file does not say what its features are: it classifies "
            "features, not sounds (see load_integer_gru)"
        )
    names = "sample_rate n_mels hop_length most_seconds mean deviation".split()
    if not isinstance(settings, dict) or sorted(settings) != sorted(names):
        raise ValueError(f"features are {', '.join(names)}")

    def numbers(values, least, most, whole=False):
        kinds = (int,) if whole else (int, float)
        return all(
            type(v) in kinds and math.isfinite(v) and least <= v <= most
            for v in values
        )

    def check(name, good, range_text):
        if not good:
            raise ValueError(
                f"features out of their range: {name} must be {range_text}"
            )

    for name, least, most, whole in (
        ("sample_rate", *RATES, True),
        ("n_mels", 1, MOST_MELS, True),
        ("hop_length", 1, 1000, False),
        ("most_seconds", 0.1, 60, False),
    ):
        good = numbers([settings[name]], least, most, whole=whole)
        check(name, good, f"{least} to {most}")
    size = settings["n_mels"]
    for name, least in (("mean", -1e6), ("deviation", LEAST_DEVIATION / 2)):
        values = settings[name]
        good = isinstance(values, list) and len(values) == size
        good = good and numbers(values, least, 1e6)
        check(name, good, f"{size} numbers from {least:g} to 1e6")
    return settings
