"""Audio files that appear whole, and streams that can be read twice."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import soundfile


@contextmanager
def whole_file(path):
    """A temporary file that becomes the file when all went well.

    It is made at once: a folder that cannot be written to is found before
    the work, not after it.

    Arguments
    ---------
    path : str or Path
        The file; its folder must exist.

    Example
    -------
    >>> path = Path(getfixture("tmpdir")) / "out.wav"
    >>> with whole_file(path) as part:
    ...     _ = part.write_bytes(b"data")
    ...     path.exists()
    False
    >>> path.read_bytes()
    b'data'
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder: make it first")
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    open(part, "xb").close()  # never through a link that somebody left there
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


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
