"""Multichannel audio files in blocks: read, checked, mended, resampled.

Layout: [samples, channels]; full scale is 1. A constant offset of a
microphone carries no speech and is taken off.
"""

import logging
import math
import os
import shutil
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch

from ..utils import SAMPLE_RATE, is_device, open_input
from .audio_headers import (
    ChangedFile,
    decoder_warning,
    read_header,
    samples_warning,
)
from .microphones import (
    Copies,
    Drift,
    OffsetFilter,
    Polarity,
    channel_warnings,
)

logger = logging.getLogger(__name__)
OFFSET_STEP = 256  # samples in which an offset that moves is looked at
BLOCK_SECONDS = 3.0
FILTER_ZEROS = 6  # of the low-pass filter, to either side
ROLLOFF = 0.99  # of half the lower rate
MAX_FILTER = 2**24  # taps of a resampler: rates with no common divisor
NO_SOUND = 1e-30  # power that single precision computes nothing with
LOUDEST = 1e12  # of full scale: integers of 32 bits as floats are below
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
    """Select the channels of the microphones that a model uses."""
    if array_size is None:
        if channels < max(microphones):
            raise AudioError(
                name,
                f"{channels} channel{'s' * (channels != 1)}",
                f"there is no channel {max(microphones)}: name another",
            )
        return [number - 1 for number in microphones]
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

    Example
    -------
    >>> AudioStats(16000, 0.1).warnings
    ()
    """

    samples: int  # length at 16 kHz
    rms: float  # of the reference channel; full scale = 1
    warnings: tuple = ()  # tuple of str: what is odd but no error
    silent: bool = False  # whether no microphone hears anything


class AudioFile:
    """The channels of a file that a separator uses, at 16 kHz.

    Lengths that the header has wrong are mended. `scan` finds the constant
    offset of every microphone, and whether it moves; from then on `blocks`
    are without it.

    Arguments
    ---------
    source : str, Path or binary file
        Anything that libsndfile reads, pipes too; a binary file must be
        seekable.
    microphones : sequence of int or None
        Numbers of the microphones that are used, from 1, reference first.
        None: all channels.
    array_size : int or None
        Microphones of the whole array. The file has these, in order, or
        just those that are used. None: it is no array's, and may have any
        channels.
    name : str or None
        For messages; None: the source.
    min_samples : int
        Shortest signal, at 16 kHz.
    min_rate : int
        Lowest sampling rate in Hz.

    Example
    -------
    >>> path = getfixture("tmpdir") / "mix.wav"
    >>> soundfile.write(path, np.full((16000, 15), 0.25), 16000)
    >>> file = AudioFile(path, microphones=[1, 4, 15], array_size=15)
    >>> [tuple(block.shape) for block in file.blocks(9000)]
    [(9000, 3), (7000, 3)]
    """

    def __init__(
        self,
        source,
        microphones=None,
        array_size=None,
        name=None,
        min_samples=512,
        min_rate=SAMPLE_RATE,
    ):
        no_name = hasattr(source, "seek")
        self.name = name or ("the recording" if no_name else source)
        self.source = _twice_readable(source)
        with self._opened() as file:
            self._header = read_header(file)
        with self._decoded() as file:
            self.rate, self.frames = file.samplerate, file.frames
            self.channels = file.channels
            self._warning = self._header.warning or decoder_warning(file)
        self._array = array_size is not None
        if microphones is None:
            microphones = range(1, self.channels + 1)
        self.microphones = list(microphones)
        self._index = used_channels(
            self.channels, self.microphones, array_size, self.name
        )
        self._check_rate(min_rate)
        self._stats, self._told, self._min_samples = None, False, min_samples
        self._offset, self._moving = np.zeros(len(self._index)), False
        if self._header.open_end:
            self._count_open_end(min_samples)
        self._check_length()

    @property
    def samples(self):
        """Length at 16 kHz."""
        return math.ceil(self.frames * SAMPLE_RATE / self.rate)

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
        follower = OffsetFilter(OFFSET_STEP) if self._moving else None
        for block, last in self._raw_blocks(max(1, samples)):
            block = block[:, self._index]
            if self._offset.any():
                block = (block - self._offset).astype(np.float32)
            block = torch.from_numpy(block)  # [samples, mics]
            if resampler:
                block = resampler.push(block, last)
            if follower:
                block = follower.push(block, last)
            yield block

    def scan(self):
        """Scan the whole file, once: level, offsets and warnings."""
        if self._stats is None:
            self._stats = self._scan()
        return self._stats

    def log_warnings(self):
        """Log what `scan` finds odd, once."""
        if not self._told:
            for warning in self.scan().warnings:
                logger.warning(warning)
        self._told = True

    def _scan(self):
        """As `scan`."""
        mics, declared = len(self.microphones), self.frames
        moments = np.zeros((2, mics))  # sums of the signal and its square
        clipped, copies, count = 0, Copies(), 0
        drift, polarity = Drift(self.rate), Polarity(self.rate)
        resampler = None
        if self.rate != SAMPLE_RATE:
            resampler = BlockResampler(self.rate, SAMPLE_RATE)
        total = np.zeros(mics)  # at the rate of the file
        raw = int(BLOCK_SECONDS * SAMPLE_RATE)
        for block, last in self._raw_blocks(raw, is_counted=False):
            block = block[:, self._index]
            clipped += np.count_nonzero(np.abs(block) >= CLIPPED)
            for watched in (copies, drift, polarity):
                watched.update(block)
            total += block.sum(0, dtype=np.float64)
            count += len(block)
            if resampler:
                block = resampler.push(torch.from_numpy(block), last).numpy()
            moments[0] += block.sum(0, dtype=np.float64)
            moments[1] += np.einsum("tm,tm->m", block, block, dtype=np.float64)
        self.frames = count
        self._check_length()
        self._offset = total / count
        mean, square = moments / self.samples
        # What is left of a constant is rounding, not sound
        power = square - mean**2
        power = np.where(power > 1e-12 * mean**2 + NO_SOUND, power, 0.0)
        alike = mics > 1 and not copies.differ
        if self._array and power.any() and alike:
            raise AudioError(
                self.name,
                f"its {mics} channels are the same: one signal, copied, has "
                "no direction",
                "use the recording of the array itself",
            )
        self._moving = drift.is_heard()
        if self._moving:
            power = np.maximum(power - drift.power(), 0)
        strange = channel_warnings(
            self.microphones, power, copies, polarity, self._array, self._moving
        )
        warnings = [
            *self._wrong_length(declared),
            *(f"{self.name}{text}" for text in strange),
            *self._clipping(clipped / (self.frames * mics)),
        ]
        rms, silent = math.sqrt(power[0]), not power.any()
        return AudioStats(self.samples, rms, tuple(warnings), silent)

    @contextmanager
    def _opened(self):
        """The file's bytes, from the first one."""
        if hasattr(self.source, "seek"):
            self.source.seek(0)
            yield self.source
        else:
            with open(self.source, "rb") as file:
                yield file

    @contextmanager
    def _decoded(self):
        """The file's sound, from the first sample."""
        with ExitStack() as stack:
            opened = stack.enter_context(self._opened())
            plain = opened if hasattr(self.source, "seek") else self.source
            yield stack.enter_context(
                _decoder(opened, plain, self._header, self.name)
            )

    def _raw_blocks(self, samples, is_counted=True):
        """[samples, channels] of the file as it is, and which is the last."""
        position, block = 0, None
        with self._decoded() as file:
            while True:
                following = file.read(samples, dtype="float32", always_2d=True)
                if not len(following):
                    break
                self._check_finite(following, position)
                if block is not None:
                    yield block, False
                position, block = position + len(following), following
        if is_counted and position < self.frames:
            raise AudioError(
                self.name,
                f"ends after {position} of {self.frames} samples",
                "copy it again",
            )
        if block is not None:
            yield block, True

    def _count_open_end(self, min_samples):
        """Count the samples of a file whose header does not say how many."""
        self.frames = self._header.frames
        if self.frames == 0 or self.samples < min_samples:
            blocks = self._raw_blocks(2**18)
            self.frames = sum(len(block) for block, _ in blocks)

    def _check_length(self):
        """Refuse what is shorter than a window."""
        if not self.frames:
            raise AudioError(
                self.name,
                "it is empty or was cut off, 0 samples",
                "copy it again, or record more",
            )
        if self.samples < self._min_samples:
            raise AudioError(
                self.name,
                f"{self.frames} samples at {self.rate} Hz are shorter than "
                f"one window of {self._min_samples} at {SAMPLE_RATE} Hz",
                "record more",
            )

    def _check_rate(self, lowest):
        """Refuse rates that lack speech, or that no short filter converts."""
        if self.rate < lowest:
            needs = f"the model needs {lowest} Hz or more"
            raise AudioError(self.name, f"sampled at {self.rate} Hz", needs)
        check_rates(self.rate, SAMPLE_RATE, self.name)

    def _check_finite(self, block, position):
        """Raise AudioError at the first NaN or infinite sample."""
        finite = np.abs(block) < LOUDEST  # NaN is not
        if not finite.all():
            sample, channel = np.argwhere(~finite)[0]
            value = block[sample, channel]
            what = f"{value:.0e}" if np.isfinite(value) else "NaN or infinity"
            raise AudioError(
                self.name,
                f"channel {channel + 1} holds {what} at "
                f"{(position + sample) / self.rate:.3f} s",
                "repair or cut it",
            )

    def _wrong_length(self, declared):
        """Warnings on a wrong length in the header."""
        if self._warning:
            yield f"{self.name}: {self._warning}"
        elif self.frames != declared:
            yield f"{self.name}: {samples_warning(declared, self.frames)}"

    def _clipping(self, share):
        """Warning where many samples are at full scale."""
        if share > CLIPPED_SHARE:
            yield (
                f"{self.name}: {100 * share:.2g} % of the samples are "
                "clipped: record it at a lower level"
            )


@contextmanager
def _decoder(opened, plain, header, name):
    """Decode an opened file, by its name where nothing is mended in it."""
    source = plain if hasattr(plain, "seek") else system_path(plain)
    if header.changes or header.start:
        source = ChangedFile(opened, header.changes, header.start)
    kind = _OpenEnd if header.open_end else soundfile.SoundFile
    try:
        file = kind(source)
    except soundfile.LibsndfileError as error:
        raise AudioError(
            name,
            f"cannot be read as audio ({error.error_string})",
            "convert it to WAV or FLAC",
        ) from error
    except TypeError as error:  # nothing tells the rate of .raw
        what = "a file with this ending has no header"
        raise AudioError(name, what, "convert it to WAV or FLAC") from error
    with file:
        try:
            yield file
        except soundfile.LibsndfileError as error:
            what = f"it is damaged ({error.error_string})"
            raise AudioError(name, what, "copy it again") from error


def check_rates(rate, new_rate, name):
    """Refuse a sampling rate that no short filter converts to another.

    Example
    -------
    >>> check_rates(44100, 16000, "a.wav")
    >>> check_rates(16001, 16000, "a.wav")
    Traceback (most recent call last):
    ...
    speechbrain_mpq.inference.audio.AudioError: a.wav: sampled at 16001 Hz, ...
    """
    common = math.gcd(rate, new_rate)
    if rate * new_rate // common**2 > MAX_FILTER:
        raise AudioError(
            name,
            f"sampled at {rate} Hz, an odd rate",
            f"resample it to {new_rate} Hz first",
        )


def read_segment(source, start=0, stop=None, name=None):
    """Read a part of a file, whatever its header says of its length.

    Arguments
    ---------
    source : str, Path or file (a pipe, too)
    start, stop : int
        Its first sample and the one behind the last; None: the file's end.
    name : str or None
        What messages call it; None: its path.

    Returns
    -------
    samples : np.ndarray
        [samples, channels], float32; fewer than asked for where it ends.
    rate : int
        Hz.

    Example
    -------
    >>> path = getfixture("tmpdir") / "a.wav"
    >>> soundfile.write(path, np.zeros(100), 8000)
    >>> samples, rate = read_segment(path, 90)
    >>> samples.shape, rate
    ((10, 1), 8000)
    """
    name, blocks = name or source, []
    source = _twice_readable(source)
    with ExitStack() as stack:
        opened = source
        if not hasattr(source, "seek"):
            opened = stack.enter_context(open(source, "rb"))
        opened.seek(0)
        header = read_header(opened)
        opened.seek(0)
        with _decoder(opened, source, header, name) as file:
            channels, position = file.channels, 0
            if warning := header.warning or decoder_warning(file):
                logger.warning(f"{name}: {warning}")
            while stop is None or position < stop:
                size = 2**18 if stop is None else min(2**18, stop - position)
                block = file.read(size, dtype="float32", always_2d=True)
                if not len(block):
                    break
                position += len(block)
                blocks.append(block[max(0, start - position + len(block)) :])
            rate, declared = file.samplerate, header.frames or file.frames
    # What is decoded piece by piece ends where it was cut off
    if stop is None and not warning and position < declared < 2**48:
        logger.warning(f"{name}: {samples_warning(declared, position)}")
    return np.concatenate([np.zeros((0, channels), np.float32), *blocks]), rate


class _OpenEnd(soundfile.SoundFile):
    """A file that is read to its end, wherever that is."""

    def seekable(self):
        """Not asked for: behind the end, seeking fails."""
        return False


def as_waveforms(signal, name="waveforms"):
    """Convert samples to float32; integers become parts of full scale.

    Example
    -------
    >>> as_waveforms(np.array([[-16384, 0]], dtype=np.int16))
    tensor([[-0.5000,  0.0000]])
    """
    try:
        if not isinstance(signal, torch.Tensor):
            # A copy: other strides and read-only arrays are no matter then
            signal = torch.as_tensor(np.array(signal))
    except (TypeError, ValueError) as error:
        raise AudioError(name, f"no samples ({error})", "give numbers") from (
            error
        )
    if signal.is_floating_point():
        return signal.float()
    if signal.dtype in (torch.int16, torch.int32):
        return signal.float() / -float(torch.iinfo(signal.dtype).min)
    raise AudioError(
        name,
        f"samples of type {signal.dtype}",
        "give floats, full scale being 1, or 16- or 32-bit integers",
    )


def _twice_readable(source):
    """A source as it is, or what comes out of a pipe, in a file."""
    if hasattr(source, "seek"):
        return source
    if Path(source).is_file():
        return source
    file = tempfile.TemporaryFile()  # without a name: it ends with us
    with open_input(source) as pipe:
        shutil.copyfileobj(pipe, file)
    return file


@contextmanager
def seekable(stream):
    """Spool a stream into a temporary file, to be read more than once."""
    with tempfile.TemporaryFile() as file:
        while piece := stream.read(2**20):
            file.write(piece)
        file.seek(0)
        yield file


def system_path(path):
    """Encode a path as libsndfile takes it, whatever its letters."""
    return str(path) if os.name == "nt" else os.fsencode(path)


def audio_format(path):
    """Determine the audio format that a file's ending asks for.

    Devices and pipes, as /dev/null and `>(...)`, get WAV.
    """
    if is_device(path):
        return "WAV"
    ending = Path(path).suffix
    name = ending[1:].upper()
    if name not in soundfile.available_formats() or name == "RAW":
        raise ValueError(
            f"{path}: cannot write {ending or 'nameless'} files: name a .wav "
            "or .flac file"
        )
    return name


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
        """Resample a piece, as far as the filter's context is there.

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
        complete = len(signal) - self.context
        end = len(signal) if last else complete // self.down * self.down
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
