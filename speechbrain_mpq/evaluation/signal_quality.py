"""Measure signals: SI-SNR, wide-band PESQ, and DNSMOS without a reference.

SI-SNR is a loss too; waveforms are [..., time]. PESQ (ITU-T P.862.2) is that of
the `pesq` package. The network of DNSMOS P.808 comes with the package
`speechmos` (MIT) and runs in onnxruntime; its features are computed here: that
package's own code needs librosa.

Reference: Reddy et al., "DNSMOS: A Non-Intrusive Perceptual Objective Speech
Quality metric to evaluate Noise Suppressors", 2020,
https://arxiv.org/abs/2010.15258
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..signals import worker_pool
from ..utils import SAMPLE_RATE

SHORTEST = 0.25  # seconds; PESQ is not defined below
SECONDS = 9.01  # of a window
N_FFT, HOP, N_MELS = 321, 160, 120
FLOOR, RANGE = 1e-10, 80  # power, and dB below the loudest value
LINEAR, KNEE = 200 / 3, 1000  # Hz per mel up to the knee, in Hz
STEP = np.log(6.4) / 27  # above it, of the logarithm


def si_snr(estimate, target, zero_mean=True, eps=1e-8):
    """Compute the scale-invariant signal-to-noise ratio in dB.

    The estimate is split into its projection on the target and the rest, and
    their energies are compared. The negative of the mean is a training loss.

    A silent target has no projection: the result is then finite, very low and
    falls with the energy of the estimate (0 dB for a silent estimate), so that
    it neither breaks a batch nor looks like a good score.

    Arguments
    ---------
    estimate : torch.Tensor
        Estimated waveforms [..., time].
    target : torch.Tensor
        Target waveforms of the same shape.
    zero_mean : bool
        Take the mean over time away from both first.
    eps : float
        Energy added to both sides of the ratio, and to the target's.

    Returns
    -------
    torch.Tensor
        dB, one value for every waveform [...].

    Example
    -------
    >>> target = torch.tensor([1.0, -1.0, 1.0, -1.0])
    >>> noise = torch.tensor([1.0, 1.0, -1.0, -1.0])
    >>> round(si_snr(5 * target + 0.5 * noise, target).item(), 2)
    20.0
    >>> round(si_snr(target, torch.zeros(4)).item(), 1)  # silent target
    -86.0
    """
    if estimate.shape != target.shape:
        raise ValueError(
            f"estimate {tuple(estimate.shape)} and target "
            f"{tuple(target.shape)} differ in shape: cut both to one length"
        )
    if estimate.shape[-1] == 0:
        raise ValueError("SI-SNR of waveforms without a sample is undefined")
    if zero_mean:
        estimate = estimate - estimate.mean(-1, keepdim=True)
        target = target - target.mean(-1, keepdim=True)
    scale = (estimate * target).sum(-1, keepdim=True) / (
        target.square().sum(-1, keepdim=True) + eps
    )
    projection = scale * target
    signal = projection.square().sum(-1)
    noise = (estimate - projection).square().sum(-1)
    return 10 * torch.log10((signal + eps) / (noise + eps))


def wideband_pesq(estimate, target, sample_rate=16000):
    """Compute wide-band PESQ as MOS-LQO, from about 1.0 to 4.64.

    The score does not depend on the level of either waveform.

    Arguments
    ---------
    estimate : numpy.ndarray | torch.Tensor
        Waveform to judge [time].
    target : numpy.ndarray | torch.Tensor
        Clean waveform [time].
    sample_rate : int
        Hz; the wide-band measure is defined at 16000 only.

    Returns
    -------
    float
        The score.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> bursts = np.sin(np.arange(16000) / 600) > 0
    >>> target = rng.standard_normal(16000) * bursts
    >>> round(wideband_pesq(target, target), 2)
    4.64
    >>> wideband_pesq(0 * target, target)
    Traceback (most recent call last):
    ...
    ValueError: PESQ is undefined: the estimate is silent
    """
    if sample_rate != 16000:
        raise ValueError(
            f"wide-band PESQ needs 16000 Hz, not {sample_rate}: resample both"
        )
    try:
        import pesq
    except ImportError as error:
        raise ImportError(
            "PESQ scores need the `pesq` package: "
            'pip install "speechbrain_mpq[evaluate]"'
        ) from error
    estimate = _checked(estimate, "estimate", sample_rate)
    target = _checked(target, "target", sample_rate)
    if len(estimate) != len(target):
        raise ValueError(
            f"PESQ of {len(estimate)} against {len(target)} samples: "
            "cut both to one length"
        )
    try:
        return float(pesq.pesq(sample_rate, target, estimate, "wb"))
    except pesq.PesqError as error:
        reason = error.args[0]
        reason = reason.decode() if isinstance(reason, bytes) else reason
        raise ValueError(f"PESQ is undefined: {reason}") from error


def pesq_many(pairs, sample_rate=16000, workers=2, skip_undefined=False):
    """Compute wide-band PESQ of many waveforms in several processes.

    Arguments
    ---------
    pairs : iterable[tuple]
        (estimate, target), each as for `wideband_pesq`.
    sample_rate : int
        Hz, of all waveforms.
    workers : int
        Processes; with 1 the work is done in this one.
    skip_undefined : bool
        Give None for a pair without a defined score, as a silent estimate,
        instead of raising ValueError.

    Returns
    -------
    list[float | None]
        Scores in the order of the pairs.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> bursts = np.sin(np.arange(16000) / 600) > 0
    >>> target = rng.standard_normal(16000) * bursts
    >>> pairs = [(target, target), (0 * target, target)]
    >>> scores = pesq_many(pairs, workers=1, skip_undefined=True)
    >>> [score and round(score, 2) for score in scores]
    [4.64, None]
    """
    jobs = [
        (np.asarray(estimate), np.asarray(target), sample_rate)
        for estimate, target in pairs
    ]
    if workers > 1 and len(jobs) > 1:
        with worker_pool(min(workers, len(jobs))) as pool:
            scored = _with_progress(pool.imap(_score, jobs), len(jobs))
    else:
        scored = _with_progress(map(_score, jobs), len(jobs))
    for index, (_, reason) in enumerate(scored):
        if reason and not skip_undefined:
            raise ValueError(f"pair {index}: {reason}")
    return [score for score, _ in scored]


def _with_progress(results, total):
    """Collect results under a progress bar, which only terminals show."""
    return list(tqdm(results, total=total, desc="PESQ", disable=None))


def _score(job):
    """(score, None) or (None, why there is none) of one pair."""
    estimate, target, sample_rate = job
    try:
        return wideband_pesq(estimate, target, sample_rate), None
    except ValueError as error:
        return None, str(error)


def _checked(waveform, name, sample_rate):
    """The waveform as float64 [time], or ValueError with the reason."""
    waveform = np.asarray(waveform, dtype=np.float64)
    if waveform.ndim != 1:
        raise ValueError(f"the {name} must be [time], not {waveform.shape}")
    if len(waveform) < SHORTEST * sample_rate:
        raise ValueError(
            f"PESQ is undefined: the {name} has {len(waveform)} samples, "
            f"fewer than {SHORTEST} s"
        )
    if not np.isfinite(waveform).all():
        raise ValueError(f"PESQ is undefined: the {name} holds NaN or infinity")
    if not waveform.any():
        raise ValueError(f"PESQ is undefined: the {name} is silent")
    return waveform


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

    def __call__(self, waveform) -> float:
        """Score of a waveform, the mean of windows a second apart.

        Arguments
        ---------
        waveform : numpy.ndarray
            [samples] at 16 kHz between -1 and 1; shorter ones than 9.01 s
            are repeated.
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
