"""Predicted mean opinion score, without a reference: DNSMOS P.808.

The network comes with the package `speechmos` (MIT) and runs in onnxruntime.
Its features are computed here: that package's own code needs librosa.

Reference: Reddy et al., "DNSMOS: A Non-Intrusive Perceptual Objective Speech
Quality metric to evaluate Noise Suppressors", 2020,
https://arxiv.org/abs/2010.15258
"""

import importlib.util
from pathlib import Path

import numpy as np

SAMPLE_RATE = 16000  # Hz
SECONDS = 9.01  # of a window
N_FFT, HOP, N_MELS = 321, 160, 120
FLOOR, RANGE = 1e-10, 80  # power, and dB below the loudest value
LINEAR, KNEE = 200 / 3, 1000  # Hz per mel up to the knee, in Hz
STEP = np.log(6.4) / 27  # above it, of the logarithm


class P808:
    """The network of the package `speechmos`.

    Up to 10 s the score is the package's. Of longer files the package skips
    windows that come out a sample short in its floating point; here all count.

    Example
    -------
    >>> score = P808()  # doctest: +SKIP
    >>> score(0.1 * np.random.default_rng(0).standard_normal(16000))
    ... # doctest: +SKIP
    2.3
    """

    def __init__(self):
        package = importlib.util.find_spec("speechmos")
        try:
            import onnxruntime
        except ImportError:
            onnxruntime = None
        if package is None or onnxruntime is None:
            raise ImportError(
                "DNSMOS needs two packages: pip install onnxruntime speechmos"
            )
        folder = Path(package.submodule_search_locations[0])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # one file at a time, a core each
        self.session = onnxruntime.InferenceSession(
            folder / "dnsmos_models/model_v8.onnx", options
        )

    def __call__(self, waveform):
        """Score of a waveform, the mean of windows a second apart.

        Arguments
        ---------
        waveform : numpy.ndarray
            [samples] at 16 kHz between -1 and 1; shorter ones than 9.01 s
            are repeated.

        Returns
        -------
        float
        """
        waveform = np.asarray(waveform, np.float64)
        if waveform.ndim != 1 or not np.isfinite(waveform).all():
            raise ValueError("DNSMOS needs finite [samples]")
        if not waveform.any():
            raise ValueError("DNSMOS is undefined: the waveform is silent")
        size = int(SECONDS * SAMPLE_RATE)
        while len(waveform) < size:
            waveform = np.append(waveform, waveform)
        # whole seconds only, as the package counts
        count = int(len(waveform) // SAMPLE_RATE - SECONDS) + 1
        windows = [
            log_mel(waveform[start : start + size - HOP])
            for start in range(0, count * SAMPLE_RATE, SAMPLE_RATE)
        ]
        scores = [
            self.session.run(None, {"input_1": window[None]})[0].item()
            for window in windows
        ]
        return float(np.mean(scores))


def log_mel(waveform):
    """What the network sees.

    Arguments
    ---------
    waveform : numpy.ndarray
        [samples].

    Returns
    -------
    numpy.ndarray
        float32 [frames, 120]; 1 is the loudest value, 0 is 40 dB below.
    """
    padded = np.pad(waveform, N_FFT // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)
    power = np.abs(np.fft.rfft(frames * window)) ** 2
    mels = power @ mel_bands().T  # [frames, mels]
    decibels = 10 * np.log10(np.maximum(mels, FLOOR))
    below = np.maximum(decibels - decibels.max(), -RANGE)
    return ((below + 40) / 40).astype(np.float32)


def mel_bands():
    """Triangles of equal area on Slaney's scale.

    Returns
    -------
    numpy.ndarray
        [120, 161].
    """
    bins = np.arange(N_FFT // 2 + 1) * SAMPLE_RATE / N_FFT
    top = KNEE / LINEAR + np.log(SAMPLE_RATE / 2 / KNEE) / STEP
    mels = np.linspace(0, top, N_MELS + 2)
    above = KNEE * np.exp(STEP * (mels - KNEE / LINEAR))
    edges = np.where(mels < KNEE / LINEAR, mels * LINEAR, above)  # Hz
    low, middle, high = (edges[i : i + N_MELS, None] for i in range(3))
    rising = (bins - low) / (middle - low)
    falling = (high - bins) / (high - middle)
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)
