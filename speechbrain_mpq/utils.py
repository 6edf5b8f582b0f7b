"""What every part needs: files, JSON, memory, constants.

Files are written whole or not at all, and what a killed process leaves is
removed by the next one. JSON is read strictly, and errors name the file.
"""

import codecs
import ctypes
import difflib
import errno
import io
import json
import math
import os
import re
import select
import shutil
import stat
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from uuid import uuid4

try:
    import fcntl
except ImportError:  # Windows: what killed processes leave is not found
    fcntl = None

# The packed models that come with the package; READMEs say what they do
BUNDLED_MODEL = Path(__file__).parent / "pretrained" / "separator_voices_4bit"
# The one that predicts speech quality
BUNDLED_QUALITY_MODEL = BUNDLED_MODEL.parent / "quality_bam_4bit"
BUNDLED_ENHANCER = BUNDLED_MODEL.parent / "enhancer_mini_4bit"
SAMPLE_RATE = 16000  # Hz, of all speech here
# Degrees between two talkers, [low, high); 180 belongs to the last.
BUCKETS = ((0, 15), (15, 45), (45, 90), (90, 180))
PARTIAL = ".partial"  # ending of a file that is being written
MAX_NAME = 255  # bytes, on all usual file systems
NAME_PART = 32  # characters of a name that a temporary name repeats
MAX_JSON = 2**28  # bytes
MAX_INTEGER = 2**64  # in JSON: what no tensor can hold is a mistake
# What SpeechBrain's manifests name a part of a file by
PART_KEYS = "start", "stop", "begin_time", "end_time"
PIPE_SECONDS = 10.0  # that a named pipe may take to begin
_ABANDONED = re.compile(rf"\..*\.[0-9a-f]{{32}}{re.escape(PARTIAL)}", re.DOTALL)
_SCRATCH = ".speechbrain_mpq."
_FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG


@contextmanager
def atomic_write(path):
    """A temporary file that becomes the file when all went well.

    It is made at once: a folder that cannot be written to is found before
    the work, not after it. Processes that write the same file do not meet:
    each has a temporary file of its own, and the last one to finish wins.
    Devices and pipes, such as /dev/null, are written to and stay what they
    are.
    """
    path = Path(path)
    check_output(path)
    if is_device(path):
        with scratch_folder() as folder:
            yield folder / path.name
            _copy_to_device(folder / path.name, path)
        return
    _remove_abandoned(path.parent.resolve())
    part, lock = _new_part(path)
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        if error.errno in _FULL and error.filename is None:
            error.filename = str(path)  # what is full is told by its place
        raise
    finally:
        part.unlink(missing_ok=True)
        lock.close()


def _copy_to_device(source, path):
    """Write a file to a device or pipe, which an error names."""
    try:
        with open(source, "rb") as part, open(path, "wb") as to:
            shutil.copyfileobj(part, to)
    except BrokenPipeError:
        raise
    except OSError as error:
        error.filename = str(path)
        raise


def save_figure(figure, path, **options):
    """Save a figure of Matplotlib, whole or not at all.

    Arguments
    ---------
    figure : matplotlib.figure.Figure
    path : str or Path
        Its ending says the format.
    **options
        As ``savefig`` takes them.
    """
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix[1:] or None, **options)
    with atomic_write(path) as part:
        part.write_bytes(content.getvalue())


def check_output(path, *inputs):
    """Refuses what cannot become a file, before the work for it.

    Arguments
    ---------
    path : str or Path
        File to write, or a device or pipe.
    *inputs : str or Path or None
        Files that are read for it, or written beside it, and folders of models:
        none of them, and no file of theirs, may be written over.

    Example
    -------
    >>> check_output(getfixture("tmpdir") / "out.json")
    >>> check_output(getfixture("tmpdir"))
    Traceback (most recent call last):
    ...
    IsADirectoryError: ... is a folder: name a file in it
    """
    refuse_stream(path)
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder: make it first")
    if len(os.fsencode(path.name)) > MAX_NAME:
        raise ValueError(f"{path.name}: more than {MAX_NAME} bytes for a name")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")
    for other in filter(None, inputs):
        if os.path.isdir(other) and path.exists():
            other = os.path.join(other, path.name)
        there = path.is_file() and os.path.exists(other)
        same = there and os.path.samefile(path, other)
        if same or os.path.abspath(path) == os.path.abspath(other):
            raise ValueError(
                f"{path} is the input, or another output: name another file"
            )


def refuse_stream(path):
    """Refuse the name - where nothing takes it for standard output."""
    if str(path) == "-":
        raise ValueError(
            "- is no name here: name a file, which may be /dev/stdout where "
            "a file is written, or a folder"
        )


def is_device(path):
    """Tells whether a path is no file of its own, as /dev/stdout and pipes."""
    path = Path(path)
    folder = str(path.parent.resolve())
    special = folder == "/dev" or folder.startswith("/proc/")
    # A name that is too long is none: pathlib raises
    return os.path.exists(path) and (special or not os.path.isfile(path))


def write_chunks(path, chunks):
    """Writes a file whole, and to the disk, or leaves what was there."""
    with atomic_write(path) as part, open(part, "wb") as file:
        file.writelines(chunks)
        file.flush()
        os.fsync(file.fileno())


def write_text(path, text):
    """Writes a text file, as UTF-8, whole or leaves what was there."""
    write_chunks(path, [text.encode()])


def plain_name(name):
    r"""A file's name as text that a file can hold, whatever its bytes are.

    Example
    -------
    >>> plain_name("café"), plain_name("caf\udce9")
    ('café', 'caf\\xe9')
    """
    content = str(name).encode("utf-8", "surrogateescape")
    return content.decode("utf-8", "backslashreplace")


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


@contextmanager
def scratch_folder(parent=None):
    """A folder for a process's own files, which end with it.

    Those of processes that were killed are removed first.

    Arguments
    ---------
    parent : str or Path or None
        Where to make it; None: the system's place for temporary files.

    Example
    -------
    >>> with scratch_folder(getfixture("tmpdir")) as folder:
    ...     _ = (folder / "a.wav").write_bytes(b"")
    >>> folder.exists()
    False
    """
    parent = Path(tempfile.gettempdir() if parent is None else parent)
    for path in parent.glob(f"{_SCRATCH}*"):
        with _abandoned(path / "lock") as free:
            if free:
                shutil.rmtree(path, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=parent) as folder:
        with ExitStack() as stack:
            if fcntl is not None:
                # It gets its name when it is locked: before nobody looks at it
                new, lock = Path(folder, "new"), Path(folder, "lock")
                _lock(stack.enter_context(open(new, "xb")))
                os.replace(new, lock)
            yield Path(folder)


@cache  # once a process: a folder may have many thousand files
def _remove_abandoned(folder):
    """Remove the temporary files that no living process writes."""
    try:
        names = [n for n in os.listdir(folder) if _ABANDONED.fullmatch(n)]
    except OSError:  # a folder to write to, not to look into
        return
    for name in names:
        with _abandoned(Path(folder, name)) as free:
            if free:
                Path(folder, name).unlink(missing_ok=True)


def _new_part(path):
    """A temporary file beside another, and its lock."""
    # A name may have 255 bytes: the temporary one has room beside its start
    start = path.name[:NAME_PART]
    while True:
        part = path.with_name(f".{start}.{uuid4().hex}{PARTIAL}")
        lock = open(part, "xb")  # never through a link that is there
        if fcntl is None:  # where open files cannot be renamed either
            lock.close()
            return part, lock
        _lock(lock)
        if os.fstat(lock.fileno()).st_nlink:
            return part, lock
        lock.close()  # somebody tidied up before it was locked


def _lock(file):
    """Mark a file as in use until it is closed, or the process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        pass


@contextmanager
def _abandoned(path):
    """Whether nobody uses a file, which then nobody can begin to."""
    free, file = False, None
    try:
        if fcntl is not None and path.stat().st_uid == os.getuid():
            file = open(path, "rb")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
    except OSError:  # used, gone, or not to be told
        pass
    try:
        yield free
    finally:
        if file is not None:
            file.close()


def open_input(path):
    """Opens a file to be read, or a pipe such as /dev/stdin or `<(...)`.

    Arguments
    ---------
    path : str or Path

    Returns
    -------
    binary file
        A pipe cannot be read twice. One that nobody writes to is an error,
        not a wait without end.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        return open(path, "rb")
    if not stat.S_ISFIFO(mode):
        raise FileNotFoundError(f"{path}: neither a file nor a pipe")
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        poll = select.poll()
        poll.register(file, select.POLLIN)
        if not poll.poll(1000 * PIPE_SECONDS):
            _check_writer(file, path)
        os.set_blocking(file, True)
        return os.fdopen(file, "rb")
    except BaseException:
        os.close(file)
        raise


def _check_writer(file, path):
    """Raise OSError on a pipe that nobody writes to."""
    try:  # nothing is there: the end without a writer, to be awaited with one
        os.read(file, 1)
    except BlockingIOError:
        return
    raise OSError(f"{path}: nobody wrote to this pipe")


def read_text(path, most=MAX_JSON):
    """Reads a text of UTF-8, with or without a byte order mark."""
    with open_input(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path}: more than {most} bytes")
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:  # whose repr has all of the file
        raise ValueError(f"not UTF-8: {error}") from error


def strict_json(text, packed=False):
    """Parses JSON that any reader understands alike.

    Refused with ValueError: duplicate keys, NaN and infinity, numbers beyond
    64-bit integers and floats, deep nesting, half characters.

    Arguments
    ---------
    text : str or bytes
        A byte order mark before bytes, as editors write it, is passed over.
    packed : bool
        Of a packed file, which programs write: a byte order mark is refused,
        and a module's state may have integers of any size.

    Example
    -------
    >>> strict_json('{"a": [1, 2.5], "b": null}')
    {'a': [1, 2.5], 'b': None}
    >>> strict_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ...
    ValueError: the key 'a' twice
    """
    if isinstance(text, bytes):
        mark = b"" if packed else codecs.BOM_UTF8
        text = text.removeprefix(mark).decode("utf-8")
    try:
        content = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=int if packed else _small,
        )
        if "\\u" in text:  # half a character passes the parser
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    return content


def read_json(
    path,
    missing="run the experiment that writes it",
    broken="delete it and evaluate again",
):
    """Reads a JSON file strictly; an error names it.

    Arguments
    ---------
    path : str or Path
        File, or a pipe.
    missing, broken : str
        What to do where it is not there, or no JSON.

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
    if not path.exists() or path.is_dir():
        raise FileNotFoundError(f"{path} does not exist: {missing}")
    try:
        return strict_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): {broken}") from error


def write_json(path, content):
    """Writes a JSON file whole or not at all."""
    try:
        text = json.dumps(content, indent=2, allow_nan=False, default=_plain)
    except ValueError as error:
        raise ValueError(f"{path} is not written: {error}") from error
    write_text(path, text + "\n")


def _plain(value):
    """Plain number of a numpy or torch scalar."""
    if hasattr(value, "item"):
        return value.item()
    raise ValueError(f"{type(value).__name__} has no place in a JSON file")


def _unique(pairs):
    """A dictionary; ValueError where a key comes twice."""
    content = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {key!r} twice")
        content[key] = value
    return content


def _finite(digits):
    """A float; ValueError where it is beyond all floats, as 1e999."""
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:40]} is no finite number")
    return value


def _small(digits):
    """An integer; ValueError where it is beyond 64 bits."""
    if len(digits) <= 21:
        value = int(digits)
        if abs(value) < MAX_INTEGER:
            return value
    raise ValueError(f"{digits[:40]}: an integer of more than 64 bits")


def _no_constant(word):
    """Refuse the words that Python takes for numbers and JSON does not."""
    raise ValueError(f"{word} is no JSON")


def is_number(value):
    """Tells whether a value read from JSON is a finite number.

    Example
    -------
    >>> [is_number(value) for value in (1, 2.5, True, "1", None)]
    [True, True, False, False, False]
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def check_numbers(value, what, null=False):
    """Refuses JSON that has something else where numbers are meant.

    NumPy takes true for 1 and "2" for 2.

    Arguments
    ---------
    value : object
        A number, or lists of numbers in any depth.
    what : str
        Its name, for the message.
    null : bool
        Whether null may stand where a number is not known.

    Returns
    -------
    object
        The value.

    Example
    -------
    >>> check_numbers([1, [2.5]], "doas")
    [1, [2.5]]
    >>> check_numbers([1, True], "doas")
    Traceback (most recent call last):
    ...
    ValueError: doas has True where a number is meant
    """
    if isinstance(value, list):
        for part in value:
            check_numbers(part, what, null)
    elif not (is_number(value) or null and value is None):
        raise ValueError(f"{what} has {value!r} where a number is meant")
    return value


def refuse_parts(name, entry):
    """Refuses a manifest's entry of a part of a file where whole ones are read.

    Example
    -------
    >>> refuse_parts("a", {"wav": "a.wav", "start": "", "duration": 2.0})
    """
    parts = [key for key in PART_KEYS if entry.get(key) not in (None, "")]
    parts += ["wav"] if isinstance(entry.get("wav"), dict) else []
    if parts:
        raise ValueError(
            f"entry {name!r} names a part of a file by {' and '.join(parts)}: "
            "whole files are read here, write the part into one of its own"
        )


def repeated_blocks(names):
    """Find the blocks of a network that repeat, by the names of their parts.

    Arguments
    ---------
    names : iterable of str
        Dotted names, as of clusters or parameters.

    Returns
    -------
    dict of str -> (str, str or None)
        Name -> block, and the part of it that others have as well; a name that
        is of no such block stands for itself.

    Example
    -------
    >>> names = ["conv_in", "tcn_0_0.conv", "tcn_0_1.conv"]
    >>> list(repeated_blocks(names).values())
    [('conv_in', None), ('tcn_0_0', 'conv'), ('tcn_0_1', 'conv')]
    """
    split = {name: name.rpartition(".")[::2] for name in names}
    count = Counter(part for block, part in split.values() if block)
    blocks = {block for block, part in split.values() if count[part] > 1}
    return {
        name: (block, part) if block in blocks - {""} else (name, None)
        for name, (block, part) in split.items()
    }


def did_you_mean(word, names):
    """Ends a message on a word that is not known.

    Arguments
    ---------
    word : str
        What was typed.
    known : iterable of str
        What there is.

    Returns
    -------
    str
        The nearest of them, or all where none is near.

    Example
    -------
    >>> did_you_mean("midrice", ["midtread", "midrise"])
    ': did you mean midrise?'
    >>> did_you_mean("x", ["midtread", "midrise"])
    ': there are midtread, midrise'
    """
    names = list(names)
    lower = {str(name).lower(): name for name in names}
    close = difflib.get_close_matches(str(word).lower(), lower, 1, 0.6)
    if close:
        return f": did you mean {lower[close[0]]}?"
    return f": there are {', '.join(map(str, names))}" if names else ""


def duration(seconds):
    """Minutes or hours, in words.

    Example
    -------
    >>> duration(20), duration(250), duration(8000)
    ('about 1 min', 'about 4 min', 'about 2.2 h')
    """
    minutes = max(1, round(seconds / 60))
    if minutes < 120:
        return f"about {minutes} min"
    return f"about {seconds / 3600:.1f} h"


def error_text(error):
    """Says what went wrong, without the system's number for it.

    Example
    -------
    >>> error_text(FileNotFoundError(2, "No such file or directory", "a.wav"))
    'a.wav: No such file or directory'
    """
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename2 or error.filename}: {error.strerror}"
    return str(error)


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
