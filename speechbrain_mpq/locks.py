"""Folders to write to: that can be, by one process at a time.

A lock ends with its process, however that ends. Forked workers do not keep it:
those of a process that was killed may live on for a while.
"""

import atexit
import errno
import inspect
import logging
import os
import time
import weakref
import zlib
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path

from .utils import MAX_NAME, refuse_stream, scratch_folder

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None

logger = logging.getLogger(__name__)
IN_USE = ".in_use"  # held by who is at work in a folder
_TRIES = 20  # to take a lock that somebody may only have looked at
_PAUSE = 0.01  # seconds between two of them
_LOCKS = weakref.WeakSet()  # those of this process
_MINE = set()  # folders that `alone_in` holds
_HELD = {}  # folder -> its lock, until this process ends


class Lock:
    """A file that is locked; it goes with its lock, or with this object.

    Arguments
    ---------
    file : file
        Open.
    """

    def __init__(self, file):
        self.file = file
        self._path = os.path.abspath(file.name)

    def close(self):
        """Give it back."""
        if self.file.closed:
            return
        if self.is_at(self._path):  # its folder may have been moved
            with suppress(OSError):  # what cannot be written to any more
                os.unlink(self._path)
        self.file.close()

    def is_at(self, path):
        """Whether this is the lock of a path."""
        if self.file.closed or not os.path.exists(path):
            return False
        there = os.fstat(self.file.fileno())
        return os.path.samestat(there, os.stat(path))

    def __del__(self):
        self.close()


def _leave_to_parent():
    """In a forked child: the locks stay its parent's alone."""
    for lock in list(_LOCKS):
        lock.file.close()
    _MINE.clear()
    _HELD.clear()


@atexit.register
def _release():
    """Give all locks back, while there is a Python to do it."""
    for lock in list(_LOCKS):
        lock.close()


if fcntl is not None:
    os.register_at_fork(after_in_child=_leave_to_parent)


def check_folder(path, change="name another folder"):
    """Refuses what cannot be a folder to write to, before the work for it.

    Arguments
    ---------
    path : str or Path
        Folder that is there or is made later, with those above it.
    change : str
        What to do, for the message.

    Returns
    -------
    Path
        Without links: where a link leads a folder can be made.

    Example
    -------
    >>> file = Path(getfixture("tmpdir")) / "file"
    >>> file.touch()
    >>> check_folder(file / "results", "change --folder")
    Traceback (most recent call last):
    ...
    ValueError: nothing can be written to ...results (Not a directory): ...
    """
    refuse_stream(path)
    path = Path(path).resolve()
    try:
        there = next(p for p in (path, *path.parents) if os.path.lexists(p))
        for name in path.relative_to(there).parts:
            if len(os.fsencode(name)) > MAX_NAME:
                raise OSError(errno.ENAMETOOLONG, "File name too long")
        with scratch_folder(there):
            pass
    except OSError as error:
        raise ValueError(
            f"nothing can be written to {path} ({error.strerror}): {change}"
        ) from error
    return path


def hold_folder(folder, again=False):
    """Marks a folder as in use, until this process ends, however it ends.

    Arguments
    ---------
    folder : Path
    again : bool
        Whether this process may hold it already: then it gives that lock.

    Returns
    -------
    Lock or None
        To be kept; None where there are no locks. A folder that another
        process holds is a BlockingIOError.

    Example
    -------
    >>> held = hold_folder(Path(getfixture("tmpdir")))
    >>> hold_folder(Path(getfixture("tmpdir")), again=True) is held
    True
    """
    path = Path(folder) / IN_USE
    own = [lock for lock in _LOCKS if lock.is_at(path)] if again else []
    lock = own[0] if own else _taken(path)
    if lock is False:
        raise BlockingIOError(
            f"another process is at work in {folder}: wait for its end, or "
            "name another folder"
        )
    return lock


def _taken(path):
    """The lock of a file; None without locks, False where it is another's."""
    if fcntl is None:
        return None
    for _ in range(_TRIES):
        file = open(path, "w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            time.sleep(_PAUSE)
            continue
        except OSError:  # a file system without locks
            return Lock(file)
        if os.fstat(file.fileno()).st_nlink:
            lock = Lock(file)
            _LOCKS.add(lock)
            return lock
        file.close()  # its owner removed it meanwhile
    return False


def hold_results(folder):
    """Keeps others out of a folder of results until this process ends.

    Of the processes of a distributed training the main one does it.

    Arguments
    ---------
    folder : str or Path
        Made if it is not there.

    Example
    -------
    >>> folder = getfixture("tmpdir") / "results"
    >>> hold_results(folder)
    >>> folder_in_use(Path(folder))
    True
    """
    from speechbrain.utils.distributed import if_main_process

    if if_main_process():
        folder = Path(folder).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        _HELD[folder] = hold_folder(folder, again=True)


def folder_in_use(folder):
    """Whether another process holds a folder.

    Example
    -------
    >>> folder = Path(getfixture("tmpdir"))
    >>> held = hold_folder(folder)
    >>> folder_in_use(folder)
    True
    >>> held.close()
    >>> folder_in_use(folder)
    False
    """
    path = folder / IN_USE
    if fcntl is None or not path.exists():
        return False
    with open(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


@contextmanager
def alone_in(folder, wait=False, beside=False):
    """Keeps other processes out of a folder meanwhile; nothing is left of it.

    Within one process calls may be nested.

    Arguments
    ---------
    folder : str or Path
        Made if it is not there, unless `beside`.
    wait : bool
        Wait for the end of another process; else it is a BlockingIOError.
    beside : bool
        The lock is in the folder that it is in.

    Example
    -------
    >>> folder = Path(getfixture("tmpdir"))
    >>> with alone_in(folder):
    ...     folder_in_use(folder)
    True
    >>> list(folder.iterdir())
    []
    """
    folder = Path(folder).resolve()
    if folder in _MINE:
        yield
        return
    made = not (folder.exists() or beside)
    path = folder / IN_USE
    if beside:  # a name may have 255 bytes
        name = f".{zlib.crc32(os.fsencode(folder.name)):08x}{IN_USE}"
        path = folder.with_name(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = _taken(path)
    except OSError:  # where nothing can be written, nobody else writes
        lock = None
    if lock is False and not wait:
        raise BlockingIOError(
            f"another process is at work in {folder}: wait for its end, or "
            "name another folder"
        )
    if lock is False:
        logger.warning(f"Another process is at work in {folder}: waiting")
    while lock is False:
        time.sleep(1)
        lock = _taken(path)
    _MINE.add(folder)
    try:
        yield
    finally:
        _MINE.discard(folder)
        if lock is not None:
            lock.close()
        if made:
            with suppress(OSError):  # something is in it
                folder.rmdir()


def one_at_a_time(prepare):
    """Lets one process prepare a data folder, and others wait for its end.

    Arguments
    ---------
    prepare : callable
        With an argument `data_folder`; what is there already it leaves.

    Returns
    -------
    callable
    """
    signature = inspect.signature(prepare)

    @wraps(prepare)
    def prepare_alone(*arguments, **options):
        bound = signature.bind(*arguments, **options).arguments
        with alone_in(bound["data_folder"], wait=True):
            return prepare(*arguments, **options)

    return prepare_alone
