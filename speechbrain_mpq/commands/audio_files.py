"""Audio files of a command line: listed, worked on, and named where written.

A command works on its recordings one after the other and tells how fast it
went; one of them may be what is piped in.
"""

import glob
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from ..utils import error_text, is_device

STREAM = "-"
STREAM_NAME = "standard input"
ENDINGS = (
    *(".wav", ".wave", ".flac", ".w64", ".rf64", ".caf", ".aif", ".aiff"),
    *(".aifc", ".au", ".snd", ".ogg", ".oga", ".opus", ".mp3", ".sph"),
)


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
    >>> for name in ("b.mp3", "a.flac", "notes.txt"):
    ...     _ = (folder / name).write_binary(b"")
    >>> [Path(name).name for name in recordings([str(folder)])]
    ['a.flac', 'b.mp3']
    """
    if STREAM in names and len(names) > 1:
        raise ValueError("- is standard input: give it alone")
    files = {}
    for name in names:
        for file in _files_of(name):
            files.setdefault(_identity(file), file)
    return list(files.values())


def _files_of(name):
    """The files that a name of the command line stands for."""
    path = Path(name)
    if os.path.isdir(name):
        files = sorted(map(str, path.iterdir()))
        files = [file for file in files if file.lower().endswith(ENDINGS)]
        if not files:
            raise FileNotFoundError(
                f"{name}: no audio files ({', '.join(ENDINGS)}) in this "
                f"folder: name files, or a pattern such as {path / '*.dat'}"
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


def print_names(paths):
    """Print what was written; not into a device, as /dev/stdout, itself.

    Example
    -------
    >>> print_names([Path("a.wav"), Path("/dev/null")])
    a.wav
    """
    for path in paths:
        if not is_device(path):
            print(path)


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


SUFFIXES = (".wav", ".flac")


class OutputNames:
    """Name a file for every recording and direction, no two alike.

    Arguments
    ---------
    out : str or None
        File or folder of the command line; `-` for standard output; None for
        the current folder. Several recordings need a folder, which is made.
    files : list of str
        The recordings; none of them is ever written to.
    word : str or None
        What is added to a recording's name where there are no directions.

    Example
    -------
    >>> names = OutputNames(None, ["a.wav", "b.flac"])
    >>> names.check([60.0])
    >>> [str(path) for path in names.of("b.flac", [60.0, 112.5])]
    ['b_60.wav', 'b_112.5.wav']
    >>> OutputNames(None, ["a/mix.wav", "b/mix.wav"]).check([60.0])
    Traceback (most recent call last):
    ...
    ValueError: a/mix.wav and b/mix.wav would both become mix_60.wav: ...
    """

    def __init__(self, out, files, word=None):
        self.out, self.files, self.word = out, files, word
        several = len(files) > 1
        ending = Path(out or "").suffix.lower()
        if several and out == STREAM:
            raise ValueError(
                "standard output takes one recording: name a folder with -o"
            )
        if several and out and ending in SUFFIXES and not os.path.isdir(out):
            raise ValueError(
                f"-o {out}: {len(files)} recordings need a folder, such as "
                f"-o {Path(out).with_suffix('')}{os.sep}"
            )
        is_folder = out and (os.path.isdir(out) or out[-1:] in "/" + os.sep)
        self.folder = Path(out) if several and out or is_folder else None

    def check(self, doas):
        """Refuse what cannot be written, before any work.

        Arguments
        ---------
        doas : list of float or None
            Directions in degrees; None where they are yet to be found.
        """
        if self.out == STREAM:
            _check_stream(doas)
            return
        taken = self.folder is not None and os.path.lexists(self.folder)
        if taken and not self.folder.is_dir():
            raise FileExistsError(
                f"-o {self.folder} is no folder: name another"
            )
        if self.folder is None or self.folder.is_dir():
            for file in self.files:
                self.of(file, doas or [0.0], named=doas is None)
        elif not self.folder.absolute().parent.is_dir():
            raise FileNotFoundError(
                f"{self.folder.parent} is no folder: make it first"
            )
        self._check_different(doas)

    def of(self, file, doas, named=False):
        """Name the files of a recording; their folder is made.

        Arguments
        ---------
        file : str
            One of the recordings.
        doas : list of float
            Directions in degrees.
        named : bool
            Whether a direction is in the name where it is the only one, too.

        Returns
        -------
        list of Path
            One for each direction.
        """
        from ..inference.output import named_paths, output_paths

        if self.folder is not None:
            self.folder.mkdir(exist_ok=True)
        out = self._names(file, doas)
        if named and not isinstance(out, list):
            out = named_paths(out, doas)
        source = Path(file)
        paths = output_paths(
            out, doas, source if os.path.exists(file) else None
        )
        for path in paths:
            self._check_no_input(path)
        return paths

    def _names(self, file, doas):
        """Paths of a recording; the name given where it is for one alone."""
        if self.out and self.folder is None:
            return self.out
        # Pipes have names that tell nothing
        is_file = os.path.isfile(file) or not os.path.exists(file)
        pipe = file == STREAM or not is_file
        folder = self.folder or Path()
        if self.word:
            stem = "" if pipe else f"{Path(file).stem}_"
            return [folder / f"{stem}{self.word}.wav"]
        stem = "separated" if pipe else Path(file).stem
        return [folder / f"{stem}_{doa:g}.wav" for doa in doas]

    def _check_different(self, doas):
        """Raise ValueError where two recordings would have one name."""
        taken = {}
        for file in self.files if len(self.files) > 1 else ():
            path = self._names(file, [0.0] if doas is None else doas)[0]
            other = taken.setdefault(os.path.normcase(path), file)
            if other != file:
                shown = path.name if doas else f"{Path(file).stem}_...wav"
                raise ValueError(
                    f"{other} and {file} would both become {shown}: rename "
                    "one, or write them into folders of their own with -o"
                )

    def _check_no_input(self, path):
        """Raise ValueError where a recording would be written over."""
        if not os.path.exists(path):
            return
        for file in self.files:
            if os.path.exists(file) and os.path.samefile(path, file):
                raise ValueError(
                    f"{path} is one of the recordings: name another folder "
                    "with -o"
                )


def _check_stream(doas):
    """Raise ValueError unless standard output can take it."""
    if doas is None or len(doas) > 1:
        raise ValueError(
            "standard output takes one direction: name files with -o"
        )
    if sys.__stdout__ is None:  # as `>&-` leaves it
        raise ValueError("standard output is closed: name a file with -o")
