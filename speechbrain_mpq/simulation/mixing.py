"""Two voices and their impulse responses to the sound of both."""

import numpy as np
import scipy.fft

PEAK = 0.9  # full scale = 1


def place(lengths, overlap, target_first):
    """Start times so that the shorter utterance is overlapped by a share.

    Arguments
    ---------
    lengths : (int, int)
        Samples of target and interferer.
    overlap : float
        Share of the shorter utterance during which both talk.
    target_first : bool
        Who starts.

    Returns
    -------
    offsets : (int, int)
        First sample of target and interferer.

    Example
    -------
    >>> place((100, 60), overlap=0.5, target_first=True)
    (0, 70)
    >>> place((100, 60), overlap=0.5, target_first=False)
    (30, 0)
    """
    target, interferer = lengths
    common = round(overlap * min(lengths))
    if target_first:
        return 0, target - common
    return interferer - common, 0


def at_offsets(voices, offsets):
    """Voices in one array, each where it begins.

    Arguments
    ---------
    voices : (numpy.ndarray, numpy.ndarray)
        [samples] each.
    offsets : (int, int)
        First sample of each.

    Returns
    -------
    placed : numpy.ndarray
        [2, samples], float32.

    Example
    -------
    >>> at_offsets((np.ones(2), np.ones(1)), (0, 2))
    array([[1., 1., 0.],
           [0., 0., 1.]], dtype=float32)
    """
    samples = max(o + len(v) for o, v in zip(offsets, voices))
    placed = np.zeros((len(voices), samples), np.float32)
    for row, offset, voice in zip(placed, offsets, voices):
        row[offset : offset + len(voice)] = voice
    return placed


def mix(voices, rirs, sir):
    """Convolve two voices with their impulse responses and add them up.

    Arguments
    ---------
    voices : numpy.ndarray
        Target and interferer, [2, samples], from `at_offsets`.
    rirs : numpy.ndarray
        [2, mics, taps].
    sir : float
        Signal-to-interference ratio at the reference microphone in dB, over
        the reverberant signals.

    Returns
    -------
    signals : dict
        "mixture" [samples, mics], "target", "interferer" [samples], float32,
        scaled together so that no sample exceeds 0.9.

    Example
    -------
    >>> clicks = at_offsets((np.ones(1), np.ones(1)), (0, 1))
    >>> rirs = np.ones((2, 3, 1), np.float32)
    >>> signals = mix(clicks, rirs, sir=0.0)
    >>> signals["mixture"].shape, f"{signals['target'][0]:.2f}"
    ((2, 3), '0.90')
    """
    samples = voices.shape[1]
    n_fft = scipy.fft.next_fast_len(samples + rirs.shape[2], real=True)
    dry = scipy.fft.rfft(voices[:, None], n_fft)
    spectra = dry * scipy.fft.rfft(rirs, n_fft)
    target, interferer = scipy.fft.irfft(spectra[:, 0], n_fft)[:, :samples]
    ratio = np.sum(target**2) / max(np.sum(interferer**2), 1e-12)
    gain = np.float32(np.sqrt(ratio * 10 ** (-sir / 10)))
    total = spectra[0] + gain * spectra[1]
    mixture = scipy.fft.irfft(total, n_fft)[:, :samples]
    scale = np.float32(PEAK / max(np.abs(mixture).max(), 1e-12))
    return {
        "mixture": np.ascontiguousarray(mixture.T) * scale,
        "target": target * scale,
        "interferer": interferer * (gain * scale),
    }
