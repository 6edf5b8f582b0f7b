"""Read the sound of a recorded corpus, and write its manifests.

Sound is decoded by the ffmpeg program: the one on the path, or the one that
the package imageio-ffmpeg carries.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from ..signals import worker_pool
from ..utils import SAMPLE_RATE, atomic_write, write_text
from .mixtures import MIN_SAMPLES

NEEDED = ("wav", "words", "speaker", "length")
RMS = 0.05  # of every recording
PEAK = 0.95
FADE = 0.005  # seconds at both ends of a recording


def ffmpeg_program() -> str:
    """Find the ffmpeg program, or say how to get it.

    Example
    -------
    >>> ffmpeg_program()  # doctest: +SKIP
    '/usr/bin/ffmpeg'
    """
    program = shutil.which("ffmpeg")
    if program:
        return program
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise ImportError(
            "sound in videos needs the ffmpeg program, which is not installed: "
            "get it from your system (apt install ffmpeg, brew install "
            "ffmpeg), or pip install imageio-ffmpeg"
        ) from error
    return imageio_ffmpeg.get_ffmpeg_exe()


def read_sound(path):
    """Read the sound of a video or audio file, mono at 16 kHz.

    Arguments
    ---------
    path : str or Path
        Any container and codec that ffmpeg reads; its first sound track,
        channels averaged.

    Returns
    -------
    samples : numpy.ndarray
        [samples], int16.

    Example
    -------
    >>> read_sound("no/such/clip.mp4")
    Traceback (most recent call last):
    FileNotFoundError: no file no/such/clip.mp4
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    command = [ffmpeg_program(), "-nostdin", "-v", "error", "-i", str(path)]
    command += ["-map", "0:a:0", "-ac", "1", "-ar", str(SAMPLE_RATE)]
    done = subprocess.run([*command, "-f", "s16le", "-"], capture_output=True)
    # ffmpeg ends with 0 where it has skipped what it could not decode
    if done.returncode or done.stderr.strip():
        raise ValueError(
            f"{path} cannot be decoded whole: {first_line(done)}: "
            "copy it again from the corpus"
        )
    samples = np.frombuffer(done.stdout, np.int16)
    if len(samples) < MIN_SAMPLES or not samples.any():
        raise ValueError(
            f"{path} has no sound ({len(samples)} samples at 16 kHz, none of "
            "them above zero): copy it again from the corpus"
        )
    return samples


def first_line(done):
    """What a program that was run complained of first.

    Arguments
    ---------
    done : subprocess.CompletedProcess

    Example
    -------
    >>> first_line(subprocess.CompletedProcess([], -9, b"", b""))
    'it ended with status -9'
    """
    text = done.stderr
    text = text if isinstance(text, str) else text.decode(errors="replace")
    ended = f"it ended with status {done.returncode}"
    return next(iter(text.strip().splitlines()), ended)


def set_level(samples):
    """Bring a recording to a fixed level, and fade it in and out.

    Arguments
    ---------
    samples : numpy.ndarray
        [samples], float, at 16 kHz.

    Returns
    -------
    samples : numpy.ndarray
        [samples], of an RMS of 0.05.

    Example
    -------
    >>> float(set_level(np.full(16000, 0.3)).max().round(4))
    0.0502
    """
    fade = min(round(FADE * SAMPLE_RATE), len(samples) // 2)
    ramp = np.arange(fade) / fade
    samples = samples.copy()
    samples[:fade] *= ramp
    samples[len(samples) - fade :] *= ramp[::-1]
    return samples * RMS / np.sqrt(np.mean(samples**2))


def limit_peak(samples):
    """Scale samples down where the loudest is above 0.95.

    Arguments
    ---------
    samples : numpy.ndarray
        [samples], float.

    Returns
    -------
    samples : numpy.ndarray

    Example
    -------
    >>> limit_peak(np.array([1.9, -0.5]))
    array([ 0.95, -0.25])
    """
    return samples * min(1, PEAK / np.abs(samples).max())


def write_flac(path, samples):
    """Write speech atomically, as FLAC.

    Arguments
    ---------
    path : Path
        Its folder is made.
    samples : numpy.ndarray
        [samples] at 16 kHz, int16 or float.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        soundfile.write(part, samples, SAMPLE_RATE, "PCM_16", format="FLAC")


def seconds_of(path):
    """Measure an audio file that may be missing.

    Arguments
    ---------
    path : Path

    Returns
    -------
    seconds : float or None
        None: it is not there, or cannot be read.

    Example
    -------
    >>> seconds_of(Path("no/such.flac"))
    """
    if not path.exists():
        return None
    try:
        return soundfile.info(path).duration
    except RuntimeError:
        return None


def run_jobs(work, jobs, workers, description):
    """Run jobs in several processes; failures are returned, not raised.

    Arguments
    ---------
    work : callable
        Takes a job; OSError and ValueError count as its failure.
    jobs : list
        Arguments of `work`.
    workers : int
        Processes.
    description : str
        For the progress bar, which terminals show.

    Returns
    -------
    failures : dict
        Job -> what was wrong with it.
    """
    failures = {}
    if not jobs:
        return failures
    with (
        worker_pool(min(workers, len(jobs))) as pool,
        tqdm(total=len(jobs), desc=description, disable=None) as bar,
    ):
        tried = pool.imap_unordered(_Attempt(work), jobs)
        for job, failure in tried:
            if failure is not None:
                failures[job] = failure
            bar.update()
    return failures


class _Attempt:
    """A job's failure as a value; a class, so that processes can take it."""

    def __init__(self, work):
        self.work = work

    def __call__(self, job):
        try:
            self.work(job)
        except (OSError, ValueError) as error:
            return job, str(error)
        return job, None


def write_manifests(data_folder, splits, transcribed=True):
    """Write the manifests that train.py takes, atomically.

    Nothing is written where one of them could not be mixed.

    Arguments
    ---------
    data_folder : str or Path
        `<split>_speech.json` goes there.
    splits : dict
        Split -> (id -> entry with "wav", "words", "speaker" and "length").
    transcribed : bool
        Whether each must have words; those of others are "".
    """
    needed = [name for name in NEEDED if transcribed or name != "words"]
    for split, entries in splits.items():
        for key, entry in entries.items():
            missing = [name for name in needed if not entry.get(name)]
            if missing:
                raise ValueError(f"{split}: {key} has no {missing}")
        speakers = {entry["speaker"] for entry in entries.values()}
        if len(speakers) < 2:
            raise ValueError(
                f"mixtures need two speakers, the {split} split has "
                f"{len(speakers)} ({len(entries)} utterances)"
            )
    data_folder = Path(data_folder)
    data_folder.mkdir(parents=True, exist_ok=True)
    for split, entries in splits.items():
        lines = [
            f"{json.dumps(key)}: {json.dumps(entries[key])}"
            for key in sorted(entries)
        ]
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        write_text(data_folder / f"{split}_speech.json", text)
        hours = sum(entry["length"] for entry in entries.values()) / 3600
        speakers = {entry["speaker"] for entry in entries.values()}
        print(
            f"{split}: {len(entries)} utterances, {hours:.2f} h, "
            f"{len(speakers)} speakers",
            file=sys.stderr,
        )
