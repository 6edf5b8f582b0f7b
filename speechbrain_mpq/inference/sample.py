"""A recording to hear beside a model card, and what the model makes of it.

The direction and the licence are comments inside the FLAC file, so that a card
that is written again still has them.
"""

from pathlib import Path

import numpy as np
import soundfile

from ..utils import SAMPLE_RATE, atomic_write
from .audio import system_path
from .hub import SAMPLE_FILE, SEPARATED_FILE

MOST_SECONDS = 2.5  # half a megabyte with seven microphones
MOST_CHANNELS = 8  # of FLAC
LICENSE = "Apache-2.0"  # of the embedded corpus, as of all that makes it


def write_sample(folder, mixture, separated, doa, title, license=LICENSE):
    """Write a mixture and its separated talker as FLAC files.

    Arguments
    ---------
    folder : str or Path
        Packed folder.
    mixture : array
        [samples, microphones], 16 kHz, full scale 1; the loudest 2.5 seconds
        of it are kept.
    separated : array
        [samples], at any level.
    doa : float
        Direction of the talker in degrees.
    title : str
        What is heard.
    license : str
        Of the recording.

    Returns
    -------
    bool
        False where FLAC has not as many channels: nothing is written.

    Example
    -------
    >>> folder = getfixture("tmpdir")
    >>> noise = np.random.default_rng(0).standard_normal((16000, 2)) / 9
    >>> write_sample(folder, noise, noise[:, 0], 62.5, "noise")
    True
    >>> read_sample(folder)
    {'doa': 62.5, 'title': 'noise', 'license': 'Apache-2.0', 'channels': 2}
    """
    mixture, separated = np.asarray(mixture), np.asarray(separated)
    if mixture.shape[1] > MOST_CHANNELS:
        return False
    part = _loudest(separated)
    peak = np.abs(separated).max(initial=1e-9)
    level = np.abs(mixture[part]).max(initial=1e-9)
    tags = {"title": title, "license": license, "comment": f"doa={doa:g}"}
    for name, signal in (
        (SAMPLE_FILE, mixture[part]),
        (SEPARATED_FILE, 0.9 * min(level, 1.0) / peak * separated[part]),
    ):
        with (
            atomic_write(Path(folder, name)) as written,
            soundfile.SoundFile(
                system_path(written),
                "w",
                SAMPLE_RATE,
                channels=1 if signal.ndim == 1 else signal.shape[1],
                format="FLAC",
                subtype="PCM_16",
            ) as file,
        ):
            for key, value in tags.items():
                setattr(file, key, value)
            file.write(signal)
    return True


def read_sample(folder):
    """Read what the sample of a folder says of itself; None without one."""
    path = Path(folder, SAMPLE_FILE)
    try:
        with soundfile.SoundFile(system_path(path)) as file:
            key, _, doa = file.comment.partition("=")
            tags = {"title": file.title, "license": file.license}
            channels = file.channels
    except (OSError, soundfile.LibsndfileError):
        return None
    known = key == "doa" and doa.replace(".", "", 1).isdigit()
    return {"doa": float(doa) if known else None, **tags, "channels": channels}


def _loudest(signal):
    """The window of a signal that has most of its energy."""
    samples = round(MOST_SECONDS * SAMPLE_RATE)
    if len(signal) <= samples:
        return slice(0, len(signal))
    energy = np.concatenate([[0.0], np.cumsum(np.square(signal, dtype=float))])
    first = int(np.argmax(energy[samples:] - energy[:-samples]))
    return slice(first, first + samples)
