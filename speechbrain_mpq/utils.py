"""Files that appear whole or not at all.

Freed memory that stays in the process, for the next batch to take.

Files of results: written whole or not at all, named where broken.
"""

import ctypes
import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

PARTIAL = ".partial"  # ending of a file that is being written
SAMPLE_RATE = 16000  # Hz, of all speech here
# Degrees between two talkers, [low, high); 180 belongs to the last.
BUCKETS = ((0, 15), (15, 45), (45, 90), (90, 180))


@contextmanager
def atomic_write(path):
    """A temporary file that becomes the file when all went well.

    It is made at once: a folder that cannot be written to is found before
    the work, not after it. Processes that write the same file do not meet:
    each has a temporary file of its own, and the last one to finish wins.
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


def write_chunks(path, chunks):
    """Writes a file whole, and to the disk, or leaves what was there."""
    with atomic_write(path) as part, open(part, "wb") as file:
        file.writelines(chunks)
        file.flush()
        os.fsync(file.fileno())


def write_text(path, text):
    """Writes a text file, as UTF-8, whole or leaves what was there."""
    write_chunks(path, [text.encode()])


def remove_partial(folder, age=3600):
    """Tidies up after processes that were killed while they wrote.

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


# Parameters of glibc's mallopt (malloc.h) and their values. Left alone, glibc
# returns every buffer above 32 MiB to the system; the next batch gets it back
# page by page, zeroed, in every training step.
TRIM_THRESHOLD = -1, 2_000_000_000
TOP_PAD = -2, 200_000_000
MMAP_THRESHOLD = -3, 1_000_000_000
MMAP_MAX = -4, 0  # the same for glibc before 2.35, whose limit is 32 MiB


def keep_freed_memory():
    """Let the C library keep what is freed instead of giving it back.

    For programs that train or separate on a CPU; call it first. Whoever has
    set glibc's own variables (`MALLOC_...`, `GLIBC_TUNABLES`) is left alone,
    as are systems without glibc. The peak of the memory stays what it is, but
    the process keeps up to 2 GB of it to its end.

    Returns
    -------
    kept : bool
        Whether anything was changed.

    Example
    -------
    >>> kept = keep_freed_memory()
    """
    own = ("MALLOC_", "GLIBC_TUNABLES")
    if any(name.startswith(own) for name in os.environ):
        return False
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mallopt(*TRIM_THRESHOLD)
    mallopt(*TOP_PAD)
    return bool(mallopt(*MMAP_THRESHOLD) or mallopt(*MMAP_MAX))


def write_json(path, content):
    """Write a JSON file whole or not at all."""
    try:
        text = json.dumps(content, indent=2, allow_nan=False, default=_plain)
    except ValueError as error:
        raise ValueError(f"{path} is not written: {error}") from error
    write_text(path, text + "\n")


def read_json(path):
    """Read a JSON file; an error names it.

    Example
    -------
    >>> path = getfixture("tmpdir") / "plan.json"
    >>> path.write_text("[1, ", "utf-8")
    >>> read_json(path)
    Traceback (most recent call last):
    ...
    ValueError: ...plan.json is no JSON (...): delete it and evaluate again
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: run the experiment that writes it"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is no JSON ({error}): delete it and evaluate again"
        ) from error


def _plain(value):
    """Plain number of a numpy or torch scalar."""
    if hasattr(value, "item"):
        return value.item()
    raise ValueError(f"{type(value).__name__} has no place in a JSON file")
