"""What recordings are read from: files, folders, pipes, standard input."""

import glob
import os
import sys
from contextlib import contextmanager
from pathlib import Path

STREAM = "-"
STREAM_NAME = "standard input"
ENDINGS = (".wav", ".flac", ".w64", ".rf64", ".caf", ".aif", ".aiff", ".au")


def recordings(names):
    """List the recordings of a command line, each once and in order.

    Arguments
    ---------
    names : list of str
        Files, folders (the audio files in them, not in those below), patterns
        such as `*.wav` that no shell has replaced, or `-` alone.

    Returns
    -------
    list of str
        As `open_source` takes them; a folder's are sorted.

    Example
    -------
    >>> folder = getfixture("tmpdir")
    >>> for name in ("b.wav", "a.flac", "notes.txt"):
    ...     _ = (folder / name).write_binary(b"")
    >>> [Path(name).name for name in recordings([str(folder)])]
    ['a.flac', 'b.wav']
    """
    if STREAM in names and len(names) > 1:
        raise ValueError("- is standard input: give it alone")
    found = {}
    for name in names:
        for file in _files_of(name):
            found.setdefault(_identity(file), file)
    return list(found.values())


def _files_of(name):
    """The files that a name of the command line stands for."""
    path = Path(name)
    if os.path.isdir(name):
        files = sorted(map(str, path.iterdir()))
        files = [file for file in files if file.lower().endswith(ENDINGS)]
        if not files:
            raise FileNotFoundError(
                f"{name}: no audio files ({', '.join(ENDINGS)}) in this "
                f"folder: name files, or a pattern such as {path / '*.ogg'}"
            )
        return files
    if glob.has_magic(name) and not os.path.exists(name):
        files = sorted(glob.glob(name))
        if not files:
            raise FileNotFoundError(f"{name}: no file has such a name")
        return files
    return [name]


def _identity(name):
    """What two names of one file have in common."""
    return os.path.realpath(name) if os.path.isfile(name) else name


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
