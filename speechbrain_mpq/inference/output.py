"""Separated talkers on their way out: names, levels, files.

The level of a talker is known when the last sample is. A file has one gain
from beginning to end; a stream follows with a running one.
"""

import logging
import math
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F

from ..lobes.models.separator import matching_gain
from ..utils import SAMPLE_RATE, atomic_write, check_output, is_device
from .audio import audio_format, system_path

logger = logging.getLogger(__name__)
IN_MEMORY = 2**24  # bytes; what is longer goes to the disk
BLOCK_SAMPLES = 2**18
UNLIMITED = ("FLOAT", "DOUBLE")  # sample formats that go above full scale
MAX_LEVEL = 90  # dB: 16-bit samples have no room for softer ones
MEMORY = 10.0  # seconds after which old levels count a third
GLIDE = 160  # samples from one gain to the next


def output_paths(out, doas, source=None):
    """Name the output files of several targets, and check them.

    Arguments
    ---------
    doas : list of float
        Directions in degrees.
    """
    if out is None:
        return [None] * len(doas)
    if isinstance(out, list | tuple):
        paths = [Path(name) for name in out]
    elif len(doas) == 1:
        paths = [Path(out)]
    else:
        paths = named_paths(out, doas)
    alike = len(set(paths)) != len(paths) and str(paths[0]) != os.devnull
    if len(paths) != len(doas) or alike:
        raise ValueError(
            f"{len(doas)} directions need as many different output files, got "
            + ", ".join(map(str, paths))
            + ": give a list of names"
        )
    for path in paths:
        _check_path(path, source)
    return paths


def named_paths(out, doas):
    """Add directions to a file's name; a device has one name for all."""
    out = Path(out)
    if is_device(out):
        return [out] * len(doas)
    return [out.with_stem(f"{out.stem}_{doa:g}") for doa in doas]


def _check_path(path, source):
    """Raise an error on a name that no output can have."""
    audio_format(path)
    check_output(path)
    if source is None or hasattr(source, "read") or not path.exists():
        return
    if os.path.samefile(path, source):
        raise ValueError(
            f"{path} is the input: name another file for the output"
        )


def check_subtype(path, subtype):
    """Raise ValueError where a file has no samples of some format."""
    kind = audio_format(path)
    if not soundfile.check_format(kind, subtype):
        raise ValueError(
            f"{path}: {kind} has no samples of type {subtype}, only "
            + ", ".join(soundfile.available_subtypes(kind))
        )


def write_blocks(blocks, path, part, subtype=None, channels=1):
    """Write an audio file as its samples come.

    Arguments
    ---------
    blocks : iterable of numpy.ndarray
        [samples], or [samples, channels].
    path : Path
        Its name, which tells the format.
    part : Path
        Where it is written, see `atomic_write`.
    subtype : str or None
        Sample format; None: the usual one of its kind.
    channels : int
    """
    try:
        with soundfile.SoundFile(
            system_path(part),
            "w",
            SAMPLE_RATE,
            channels=channels,
            subtype=subtype,
            format=audio_format(path),
        ) as file:
            for block in blocks:
                file.write(block)
    except soundfile.LibsndfileError as error:
        raise OSError(
            f"{path} cannot be written ({error.error_string}): is the disk "
            "full?"
        ) from error


class TargetOutput:
    """The waveform of one target, and the file that it becomes.

    The level is known when the last sample is. Until then the samples are in
    a temporary file; the output has one gain from beginning to end.

    Arguments
    ---------
    path : str, Path or None
        Audio file to write; None: none.
    level : str or float
        "mixture", see `separator.match_level`; or RMS in dB of full scale.
    subtype : str or None
        Sample format of the file; None: the usual one of its kind.

    Example
    -------
    >>> with TargetOutput(level=-20.0) as output:
    ...     output.push(torch.ones(4), torch.ones(4))
    ...     output.finish()
    tensor([0.1000, 0.1000, 0.1000, 0.1000])
    """

    def __init__(self, path=None, level="mixture", subtype=None):
        self.path = None if path is None else Path(path)
        self.level = _check_level(level)
        self.subtype = subtype
        if path is not None:
            check_subtype(path, subtype)
        self.samples = 0
        self._sums = _LevelSums(1)
        self._peak = 0.0

    def __enter__(self):
        self._stack = ExitStack()
        folder = None
        if self.path is not None:
            self._part = self._stack.enter_context(atomic_write(self.path))
            folder = self.path.parent
        kept = tempfile.SpooledTemporaryFile(IN_MEMORY, dir=folder)
        self._kept = self._stack.enter_context(kept)
        return self

    def __exit__(self, *exception):
        return self._stack.__exit__(*exception)

    def push(self, estimate, mixture):
        """Append samples of the target.

        Arguments
        ---------
        estimate : torch.Tensor
            [samples], at a level of its own.
        mixture : torch.Tensor
            [samples], reference channel.
        """
        self._sums.update(estimate[None], mixture)
        estimate = estimate.numpy()
        self._peak = max(self._peak, float(np.abs(estimate).max(initial=0)))
        self.samples += len(estimate)
        self._kept.write(estimate.tobytes())

    def finish(self):
        """Bring it to its level; the file appears when the context ends."""
        gain = np.float32(self._gain())
        blocks = (gain * block for block in self._blocks())
        if self.path is None:
            silence = np.zeros(0, np.float32)
            return torch.from_numpy(np.concatenate([silence, *blocks]))
        write_blocks(blocks, self.path, self._part, self.subtype)
        return self.path

    def _blocks(self):
        """The samples, from the first one."""
        self._kept.seek(0)
        while data := self._kept.read(4 * BLOCK_SAMPLES):
            yield np.frombuffer(data, np.float32)

    def _gain(self):
        """One factor for all samples."""
        energy = self._sums.energy.item()
        if self.level == "mixture":
            gain = self._sums.gain.item()
        else:
            rms = math.sqrt(max(energy, 1e-12) / max(1, self.samples))
            gain = 10 ** (self.level / 20) / rms if energy else 0.0
        peak = abs(gain) * self._peak
        if self.path is not None and self.subtype not in UNLIMITED and peak > 1:
            logger.warning(
                f"{self.path}: made {20 * math.log10(peak):.1f} dB softer, so "
                "that nothing is clipped: ask for FLOAT samples to keep the "
                "level"
            )
            gain /= peak
        return gain


def _check_level(level):
    """A level that can be."""
    if level == "mixture":
        return level
    if isinstance(level, int | float) and abs(level) <= MAX_LEVEL:
        return float(level)
    raise ValueError(
        f'level must be "mixture" or an RMS in dB of full scale, as -25.0, '
        f"from -{MAX_LEVEL} to {MAX_LEVEL}, not {level!r}"
    )


class _LevelSums:
    """What `separator.match_level` sums, of a signal that comes in pieces."""

    def __init__(self, targets):
        self.common = torch.zeros(targets, dtype=torch.float64)
        self.energy = torch.zeros(targets, dtype=torch.float64)

    def update(self, estimate, mixture, keep=1.0):
        """Update the sums by [targets, samples] and the mixture [samples]."""
        estimate, mixture = estimate.double(), mixture.double()
        self.common = keep * self.common + (estimate @ mixture).cpu()
        self.energy = keep * self.energy + estimate.square().sum(1).cpu()

    @property
    def gain(self):
        """The gain for all that has come, [targets]."""
        return matching_gain(self.common, self.energy)


class RunningLevel:
    """RMS of a signal so far, the last seconds counting most.

    Example
    -------
    >>> level = RunningLevel()
    >>> level.update(torch.full((16000,), 0.5))
    >>> level.rms
    0.5
    """

    def __init__(self):
        self._power = self._weight = 0.0

    def update(self, signal):
        """Update the level.

        Arguments
        ---------
        signal : torch.Tensor
            [samples].
        """
        keep = _decay(len(signal))
        self._power = keep * self._power + float(signal.double().square().sum())
        self._weight = keep * self._weight + len(signal)

    @property
    def rms(self):
        """Root of the mean square; 0 where nothing has come."""
        return math.sqrt(self._power / max(self._weight, 1e-12))


class RunningGain:
    """`separator.match_level` over what has come out so far.

    Arguments
    ---------
    targets : int
    fixed : float or torch.Tensor or None
        A gain that is known, for all targets or [targets]: nothing is
        followed.

    Example
    -------
    >>> gain = RunningGain(1)
    >>> gain.apply(torch.full((1, 4), 2.0), torch.ones(4))
    tensor([[1., 1., 1., 1.]])
    >>> gain.value
    tensor([0.5000])
    """

    def __init__(self, targets, fixed=None):
        self._sums = _LevelSums(targets)
        self._fixed = fixed is not None
        self.value = None
        if self._fixed:
            gain = torch.as_tensor(fixed, dtype=torch.float32).cpu()
            self.value = gain.expand(targets)

    def apply(self, estimate, mixture):
        """Bring a block to its level.

        Arguments
        ---------
        estimate : torch.Tensor
            [targets, samples].
        mixture : torch.Tensor
            [samples], reference channel.

        Returns
        -------
        estimate : torch.Tensor
            [targets, samples].
        """
        samples = estimate.shape[1]
        if not samples:
            return estimate
        last = self.value
        if not self._fixed:
            self._sums.update(estimate, mixture, _decay(samples))
            self.value = self._sums.gain.float()
        gain = self.value[:, None]
        last = gain if last is None else last[:, None]
        # Gliding for longer than a click lasts would let the onset of a
        # talker have the gain of the pause before it
        glide = torch.linspace(0, 1, GLIDE, dtype=torch.float32)[:samples]
        glide = F.pad(glide, (0, samples - len(glide)), value=1.0)
        return estimate * torch.lerp(last, gain, glide).to(estimate.device)


def _decay(samples):
    """How much of a running sum is left after some samples."""
    return math.exp(-samples / (MEMORY * SAMPLE_RATE))
