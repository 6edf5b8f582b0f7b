"""Formats of audio files, and streams that can be read twice."""

import tempfile
from contextlib import contextmanager
from pathlib import Path

import soundfile


def audio_format(path):
    """Name of the audio format that a file's ending asks for.

    Arguments
    ---------
    path : str or Path

    Returns
    -------
    name : str

    Example
    -------
    >>> audio_format("out.wav"), audio_format("out.flac")
    ('WAV', 'FLAC')
    >>> audio_format("out.mp4")
    Traceback (most recent call last):
    ...
    ValueError: out.mp4: cannot write .mp4 files: name a .wav or .flac file
    """
    ending = Path(path).suffix
    name = ending[1:].upper()
    if name not in soundfile.available_formats() or name == "RAW":
        raise ValueError(
            f"{path}: cannot write {ending or 'nameless'} files: name a .wav "
            "or .flac file"
        )
    return name


@contextmanager
def seekable(stream):
    """A stream's content in a temporary file, to be read more than once.

    Arguments
    ---------
    stream : binary file
        Such as sys.stdin.buffer.

    Example
    -------
    >>> import io
    >>> with seekable(io.BytesIO(b"data")) as file:
    ...     file.read()
    b'data'
    """
    with tempfile.TemporaryFile() as file:
        while piece := stream.read(2**20):
            file.write(piece)
        file.seek(0)
        yield file
