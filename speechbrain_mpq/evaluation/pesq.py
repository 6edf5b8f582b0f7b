"""Compute wide-band PESQ (ITU-T P.862.2), through the `pesq` package."""

import multiprocessing

import numpy as np
from tqdm import tqdm

SHORTEST = 0.25  # seconds; PESQ is not defined below


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
        with multiprocessing.Pool(min(workers, len(jobs))) as pool:
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
