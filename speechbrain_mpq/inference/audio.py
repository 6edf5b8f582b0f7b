"""Formats of audio files, and streams that can be read twice.

Sampling-rate conversion of signals that come in pieces.

Multichannel audio files in blocks: read, checked, written whole.

Layout: [samples, channels]; full scale is 1.
"""

import logging
import math
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch

from ..utils import SAMPLE_RATE


def audio_format(path):
    """Name of the audio format that a file's ending asks for."""
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
    """A stream's content in a temporary file, to be read more than once."""
    with tempfile.TemporaryFile() as file:
        while piece := stream.read(2**20):
            file.write(piece)
        file.seek(0)
        yield file


FILTER_ZEROS = 6  # of the low-pass filter, to either side
ROLLOFF = 0.99  # of half the lower rate


class BlockResampler:
    """`torchaudio.functional.resample` on pieces, without seams.

    Arguments
    ---------
    rate : int
        Of the input in Hz.
    new_rate : int
        Of the output in Hz.

    Example
    -------
    >>> resampler = BlockResampler(48000, 16000)
    >>> first = resampler.push(torch.ones(4800, 2))
    >>> rest = resampler.push(torch.ones(4800, 2), last=True)
    >>> len(first) + len(rest)
    3200
    """

    def __init__(self, rate, new_rate):
        common = math.gcd(rate, new_rate)
        self.up, self.down = new_rate // common, rate // common
        cutoff = min(self.up, self.down) * ROLLOFF
        width = math.ceil(FILTER_ZEROS * self.down / cutoff) + 1  # samples
        # Whole periods, so that every piece meets the same filter phases
        self.context = self.down * math.ceil(width / self.down)
        self._kept = None
        self._done = 0  # samples of `_kept` whose output has been given

    def push(self, signal, last=False):
        """Take samples, give those whose surroundings are known.

        Arguments
        ---------
        signal : torch.Tensor
            [samples, channels].

        Returns
        -------
        resampled : torch.Tensor
            [samples, channels].
        """
        if self._kept is not None:
            signal = torch.cat([self._kept, signal])
        known = len(signal) - self.context
        end = len(signal) if last else known // self.down * self.down
        if end <= self._done:
            self._kept = signal
            return signal[:0]
        resampled = self._resample(signal)
        begin, stop = self._output(self._done), self._output(end)
        start = max(0, end - self.context)
        self._kept, self._done = signal[start:].clone(), end - start
        return resampled[begin:stop]

    def _output(self, samples):
        """Output samples of so many input samples."""
        return -(-samples * self.up // self.down)

    def _resample(self, signal):
        """A whole signal, [samples, channels]."""
        from torchaudio.functional import resample

        channels = resample(
            signal.T,
            self.down,
            self.up,
            lowpass_filter_width=FILTER_ZEROS,
            rolloff=ROLLOFF,
        )
        return channels.T.contiguous()


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
    """Which channels of a recording are the microphones that are used."""
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
class AudioStats:
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
    >>> AudioStats(16000, 0.1).warnings
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

    def scan(self):
        """First pass: level and oddities of the whole file."""
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
        warnings = [
            *self._silent_channels(power),
            *self._clipping(clipped / (self.samples * mics)),
        ]
        rms = math.sqrt(power[0] / self.samples)
        return AudioStats(self.samples, rms, tuple(warnings))

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
