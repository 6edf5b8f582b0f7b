"""Files that appear whole or not at all."""

import os
import time
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

PARTIAL = ".partial"  # ending of a file that is being written


@contextmanager
def whole_file(path):
    """A temporary file that becomes the file when all went well.

    It is made at once: a folder that cannot be written to is found before
    the work, not after it. Processes that write the same file do not meet:
    each has a temporary file of its own, and the last one to finish wins.

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
    part = path.with_name(f".{path.name}.{uuid4().hex}{PARTIAL}")
    open(part, "xb").close()  # never through a link that somebody left there
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path, chunks):
    """Writes a file whole, and to the disk, or leaves what was there.

    Arguments
    ---------
    path : str or Path
        The file; its folder must exist.
    chunks : iterable of bytes
        The content.
    """
    with whole_file(path) as part, open(part, "wb") as file:
        file.writelines(chunks)
        file.flush()
        os.fsync(file.fileno())


def write_text(path, text):
    """Writes a text file, as UTF-8, whole or leaves what was there.

    Arguments
    ---------
    path : str or Path
        The file; its folder must exist.
    text : str
        Its content.
    """
    write_whole(path, [text.encode()])


def remove_partial(folder, age=3600):
    """Tidies up after processes that were killed while they wrote.

    Arguments
    ---------
    folder : str or Path
        Folders in it count too.
    age : float
        Seconds since the last change; what is younger may be somebody's who
        is writing.

    Example
    -------
    >>> folder = Path(getfixture("tmpdir"))
    >>> _ = (folder / f".a.flac.0{PARTIAL}").write_bytes(b"half")
    >>> remove_partial(folder)
    >>> len(list(folder.iterdir()))
    1
    >>> remove_partial(folder, age=0)
    >>> len(list(folder.iterdir()))
    0
    """
    latest = time.time() - age
    for path in Path(folder).rglob(f"*{PARTIAL}"):
        if path.stat().st_mtime <= latest:
            path.unlink(missing_ok=True)
