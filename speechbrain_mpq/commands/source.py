"""What a recording is read from: a file, a pipe, or standard input."""

import sys
from contextlib import contextmanager
from pathlib import Path

STREAM = "-"
STREAM_NAME = "standard input"


@contextmanager
def open_source(name):
    """Check what the command line names, or read what is piped in.

    Example
    -------
    >>> path = getfixture("tmpdir") / "mix.wav"
    >>> _ = path.write_binary(b"")
    >>> with open_source(str(path)) as (source, name):
    ...     source == path, name
    (True, None)
    """
    if name == STREAM:
        with _standard_input() as file:
            yield file, STREAM_NAME
        return
    if not Path(name).exists() or Path(name).is_dir():
        raise FileNotFoundError(f"{name}: no such file")
    yield name, None


@contextmanager
def _standard_input():
    """What is piped in, as a file that can be read twice."""
    from ..inference.audio import seekable

    if sys.stdin is None:
        raise ValueError("standard input is closed: pipe a WAV file in")
    if sys.stdin.isatty():
        raise ValueError("standard input is a terminal: pipe a WAV file in")
    with seekable(sys.stdin.buffer) as file:
        yield file
