"""Work on recordings one after the other, and tell how fast it went."""

import sys
import time
from pathlib import Path

from ..utils import error_text

LONG = 20.0  # seconds of audio from where on progress is shown


def each_recording(files, work, quiet=False):
    """Work on many recordings; a bad one stops no other.

    Arguments
    ---------
    files : list of str
    work : callable
        Takes a file and gives the seconds of sound in it and the lines to
        print, such as paths that were written; ValueError and OSError are
        told and do no more.
    quiet : bool
        Shows no progress.

    Returns
    -------
    int
        Exit status: 1 where any failed.

    Example
    -------
    >>> each_recording(["a.wav"], lambda file: (1.0, [file]), quiet=True)
    a.wav
    0
    """
    from tqdm import tqdm

    failed, sound, spent = [], 0.0, 0.0
    with tqdm(files, unit="file", disable=quiet) as bar:
        for file in bar:
            bar.set_postfix_str(Path(file).name)
            started = time.perf_counter()
            try:
                seconds, lines = work(file)
            except BrokenPipeError:
                raise
            except (ValueError, OSError) as error:
                failed.append(file)
                bar.write(error_text(error), file=sys.stderr)
                continue
            sound += seconds
            spent += time.perf_counter() - started
            for line in lines:
                bar.write(str(line), file=sys.stdout)
    if sound and not quiet:
        count = len(files) - len(failed)
        print(f"{count} recordings: {speed(sound, spent)}", file=sys.stderr)
    if failed and len(files) > 1:
        print(
            f"{len(failed)} of {len(files)} recordings failed: "
            f"{', '.join(failed)}",
            file=sys.stderr,
        )
    return 1 if failed else 0


def speed(sound, seconds):
    """How long work on some seconds of sound took, in words.

    Example
    -------
    >>> speed(10, 2.5)
    '10.0 s of sound in 2.5 s, 4 x real time'
    """
    return (
        f"{sound:.1f} s of sound in {seconds:.1f} s, "
        f"{sound / max(seconds, 1e-9):.3g} x real time"
    )
