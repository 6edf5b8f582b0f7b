"""Freed memory that stays in the process, for the next batch to take."""

import ctypes
import os
import sys

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
