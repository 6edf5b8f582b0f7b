"""Multichannel audio files in blocks: read, checked, written whole.

Layout: [samples, channels]; full scale is 1.
"""

import logging
import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch

from ..separation.features import SAMPLE_RATE
from .resampling import BlockResampler

logger = logging.getLogger(__name__)

BLOCK_SECONDS = 3.0
MAX_FILTER = 2**24  # taps of a resampler: rates with no common divisor
CLIPPED = 0.9999  # of full scale
CLIPPED_SHARE = 1e-4  # of all samples, from where on it is worth a warning


class AudioError(ValueError):
    """Audio that cannot be separated.

    Arguments
    ---------
    path : str or Path
        The file.
    problem : str
        What is wrong with it.
    fix : str
        What to do.

    Example
    -------
    >>> print(AudioError("a.wav", "it is empty", "record it again"))
    a.wav: it is empty; record it again
    """

    def __init__(self, path, problem, fix):
        super().__init__(f"{path}: {problem}; {fix}")


def used_channels(channels, microphones, array_size, name="recording"):
    """Which channels of a recording are the microphones that are used.

    Arguments
    ---------
    channels : int
        Of the recording: all of the array, or just those that are used.
    microphones : sequence of int
        Numbers of those that are used, from 1.
    array_size : int
        Microphones of the array.
    name : str or Path
        For messages.

    Returns
    -------
    index : list of int

    Example
    -------
    >>> used_channels(15, [1, 4, 15], array_size=15)
    [0, 3, 14]
    >>> used_channels(3, [1, 4, 15], array_size=15)
    [0, 1, 2]
    """
    if channels == len(microphones):
        return list(range(channels))
    if channels == array_size:
        return [number - 1 for number in microphones]
    raise AudioError(
        name,
        f"{channels} channel{'s' * (channels != 1)}",
        f"the model needs all {array_size} microphones of its array, or just "
        f"the {len(microphones)} that it uses, {list(microphones)}, in order",
    )


@dataclass(frozen=True)
class Survey:
    """What a first pass over a file finds.

    Arguments
    ---------
    samples : int
        Length at 16 kHz.
    rms : float
        Of the reference channel; full scale = 1.
    warnings : tuple of str
        What is odd but no error.

    Example
    -------
    >>> Survey(16000, 0.1).warnings
    ()
    """

    samples: int
    rms: float
    warnings: tuple = ()


class AudioFile:
    """The channels of a file that a separator uses, at 16 kHz.

    Arguments
    ---------
    source : str, Path or binary file
        Anything that libsndfile reads; a stream must be seekable.
    microphones : sequence of int
        Numbers of the microphones that are used, from 1, reference first.
    array_size : int
        Microphones of the whole array. The file has these, in order, or
        just those that are used.
    name : str or None
        For messages; None: the source.
    min_samples : int
        Shortest signal, at 16 kHz.

    Example
    -------
    >>> path = getfixture("tmpdir") / "mix.wav"
    >>> soundfile.write(path, np.full((16000, 15), 0.25), 16000)
    >>> file = AudioFile(path, microphones=[1, 4, 15], array_size=15)
    >>> [tuple(block.shape) for block in file.blocks(9000)]
    [(9000, 3), (7000, 3)]
    """

    def __init__(
        self, source, microphones, array_size, name=None, min_samples=512
    ):
        self.source = source
        self.name = name or source
        self.microphones = list(microphones)
        with self._open() as file:
            self.rate, self.frames = file.samplerate, file.frames
            self.channels = file.channels
        self._index = used_channels(
            self.channels, self.microphones, array_size, self.name
        )
        self._check_rate()
        self.samples = math.ceil(self.frames * SAMPLE_RATE / self.rate)
        if self.samples < min_samples:
            raise AudioError(
                self.name,
                f"{self.frames} samples at {self.rate} Hz are shorter than "
                f"one window of {min_samples} at {SAMPLE_RATE} Hz",
                "record more",
            )

    @property
    def seconds(self):
        """Length."""
        return self.frames / self.rate

    def blocks(self, samples=int(BLOCK_SECONDS * SAMPLE_RATE)):
        """Read the file from its beginning.

        Arguments
        ---------
        samples : int
            Length of a block in the file.

        Returns
        -------
        blocks : iterator of torch.Tensor
            [samples, mics], float32, finite.
        """
        resampler = None
        if self.rate != SAMPLE_RATE:
            resampler = BlockResampler(self.rate, SAMPLE_RATE)
        position = 0
        for block in self._raw_blocks(samples):
            self._check_finite(block, position)
            position += len(block)
            block = torch.from_numpy(block[:, self._index])
            if resampler:
                block = resampler.push(block, last=position == self.frames)
            yield block

    def survey(self):
        """First pass: level and oddities of the whole file.

        Returns
        -------
        survey : Survey
        """
        mics = len(self.microphones)
        power, clipped, differs = np.zeros(mics), 0, mics == 1
        for block in self.blocks():
            signal = block.numpy()
            power += np.einsum("tm,tm->m", signal, signal, dtype=np.float64)
            clipped += np.count_nonzero(np.abs(signal) >= CLIPPED)
            differs = differs or bool((signal != signal[:, :1]).any())
        if power.any() and not differs:
            raise AudioError(
                self.name,
                f"its {mics} channels are the same: one signal, copied, has "
                "no direction",
                "use the recording of the array itself",
            )
        oddities = [
            *self._silent_channels(power),
            *self._clipping(clipped / (self.samples * mics)),
        ]
        rms = math.sqrt(power[0] / self.samples)
        return Survey(self.samples, rms, tuple(oddities))

    @contextmanager
    def _open(self):
        """The file; libsndfile's complaints name it."""
        if hasattr(self.source, "seek"):
            self.source.seek(0)
        elif not Path(self.source).is_file():
            raise FileNotFoundError(f"{self.source}: no such file")
        try:
            with soundfile.SoundFile(self.source) as file:
                yield file
        except soundfile.LibsndfileError as error:
            raise AudioError(
                self.name,
                f"cannot be read as audio ({error.error_string})",
                "convert it to WAV or FLAC",
            ) from error

    def _raw_blocks(self, samples):
        """[samples, channels] of the file as it is."""
        position = 0
        with self._open() as file:
            while position < self.frames:
                block = file.read(samples, dtype="float32", always_2d=True)
                if not len(block):
                    raise AudioError(
                        self.name,
                        f"ends after {position} of {self.frames} samples",
                        "copy it again",
                    )
                position += len(block)
                yield block

    def _check_rate(self):
        """Refuse rates that lack speech, or that no short filter converts."""
        if self.rate < SAMPLE_RATE:
            raise AudioError(
                self.name,
                f"sampled at {self.rate} Hz",
                f"the model needs {SAMPLE_RATE} Hz or more",
            )
        common = math.gcd(self.rate, SAMPLE_RATE)
        if self.rate * SAMPLE_RATE // common**2 > MAX_FILTER:
            raise AudioError(
                self.name,
                f"sampled at {self.rate} Hz, an odd rate",
                f"resample it to {SAMPLE_RATE} Hz first",
            )

    def _check_finite(self, block, position):
        """Raise AudioError at the first NaN or infinite sample."""
        finite = np.isfinite(block)
        if not finite.all():
            sample, channel = np.argwhere(~finite)[0]
            raise AudioError(
                self.name,
                f"channel {channel + 1} holds NaN or infinity at "
                f"{(position + sample) / self.rate:.3f} s",
                "repair or cut it",
            )

    def _silent_channels(self, power):
        """Warnings on microphones that hear nothing while others do."""
        if not power.any():
            yield f"{self.name} is silent: so is what is separated from it"
            return
        for number, value in zip(self.microphones, power):
            if value == 0:
                yield (
                    f"{self.name}: microphone {number} is silent: check its "
                    "cable; the separation suffers"
                )

    def _clipping(self, share):
        """Warning where many samples are at full scale."""
        if share > CLIPPED_SHARE:
            yield (
                f"{self.name}: {100 * share:.2g} % of the samples are "
                "clipped: record it at a lower level"
            )
