"""One separated talker as it grows: kept, brought to its level, written."""

import logging
import math
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import soundfile
import torch

from ..separation.features import SAMPLE_RATE
from ..whole_files import whole_file
from .files import audio_format

logger = logging.getLogger(__name__)

IN_MEMORY = 2**24  # bytes; what is longer goes to the disk
BLOCK_SAMPLES = 2**18
UNLIMITED = ("FLOAT", "DOUBLE")  # sample formats that go above full scale


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
        self.format = None
        if path is not None:
            self.format = audio_format(path)
            if not soundfile.check_format(self.format, subtype):
                raise ValueError(
                    f"{path}: {self.format} has no samples of type {subtype}, "
                    "only "
                    + ", ".join(soundfile.available_subtypes(self.format))
                )
        self.samples = 0
        self._common = self._energy = self._peak = 0.0

    def __enter__(self):
        self._stack = ExitStack()
        folder = None
        if self.path is not None:
            self._part = self._stack.enter_context(whole_file(self.path))
            folder = self.path.parent
        kept = tempfile.SpooledTemporaryFile(IN_MEMORY, dir=folder)
        self._kept = self._stack.enter_context(kept)
        return self

    def __exit__(self, *exception):
        return self._stack.__exit__(*exception)

    def push(self, estimate, mixture):
        """Take more of the target.

        Arguments
        ---------
        estimate : torch.Tensor
            [samples], at a level of its own.
        mixture : torch.Tensor
            [samples], reference channel.
        """
        estimate, mixture = estimate.numpy(), mixture.numpy()
        self._common += float(np.dot(estimate.astype(np.float64), mixture))
        self._energy += float(np.square(estimate, dtype=np.float64).sum())
        self._peak = max(self._peak, float(np.abs(estimate).max(initial=0)))
        self.samples += len(estimate)
        self._kept.write(estimate.tobytes())

    def finish(self):
        """Bring it to its level; the file appears when the context ends.

        Returns
        -------
        result : Path or torch.Tensor
            The file, or the waveform where there is none.
        """
        gain = np.float32(self._gain())
        blocks = (gain * block for block in self._blocks())
        if self.path is None:
            silence = np.zeros(0, np.float32)
            return torch.from_numpy(np.concatenate([silence, *blocks]))
        try:
            self._write(blocks)
        except soundfile.LibsndfileError as error:
            raise OSError(
                f"{self.path} cannot be written ({error.error_string}): is "
                "the disk full?"
            ) from error
        return self.path

    def _write(self, blocks):
        """The samples as an audio file."""
        with soundfile.SoundFile(
            self._part,
            "w",
            SAMPLE_RATE,
            channels=1,
            subtype=self.subtype,
            format=self.format,
        ) as file:
            for block in blocks:
                file.write(block)

    def _blocks(self):
        """The samples, from the first one."""
        self._kept.seek(0)
        while data := self._kept.read(4 * BLOCK_SAMPLES):
            yield np.frombuffer(data, np.float32)

    def _gain(self):
        """One factor for all samples."""
        energy = max(self._energy, 1e-12)
        if self.level == "mixture":
            gain = self._common / energy
        else:
            rms = math.sqrt(energy / max(1, self.samples))
            gain = 10 ** (self.level / 20) / rms if self._energy else 0.0
        peak = abs(gain) * self._peak
        if self.path is not None and self.subtype not in UNLIMITED and peak > 1:
            logger.warning(
                f"{self.path}: made {20 * math.log10(peak):.1f} dB softer, so "
                "that nothing is clipped: ask for FLOAT samples to keep the "
                "level"
            )
            gain /= peak
        return gain


def output_paths(out, doas):
    """Names of the files of several targets.

    Arguments
    ---------
    out : str, Path, sequence of these, or None
        One name for each target, or one that gets the directions added.
    doas : list of float
        Directions in degrees.

    Returns
    -------
    paths : list of Path or None

    Example
    -------
    >>> [str(path) for path in output_paths("a.wav", [60.0, 112.5])]
    ['a_60.wav', 'a_112.5.wav']
    >>> output_paths(None, [60.0])
    [None]
    """
    if out is None:
        return [None] * len(doas)
    if isinstance(out, list | tuple):
        paths = [Path(name) for name in out]
    elif len(doas) == 1:
        paths = [Path(out)]
    else:
        out = Path(out)
        paths = [out.with_stem(f"{out.stem}_{doa:g}") for doa in doas]
    if len(paths) != len(doas) or len(set(paths)) != len(paths):
        raise ValueError(
            f"{len(doas)} directions need as many different output files, got "
            + ", ".join(map(str, paths))
            + ": give a list of names"
        )
    return paths


def _check_level(level):
    """A level that can be."""
    if level == "mixture":
        return level
    if isinstance(level, int | float) and math.isfinite(level):
        return float(level)
    raise ValueError(
        f'level must be "mixture" or an RMS in dB of full scale, as -25.0, '
        f"not {level!r}"
    )
