"""What a loaded separator offers: batches, files of any length, streams."""

import logging
import math
from contextlib import ExitStack
from numbers import Integral

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from ..lobes.models.lips import check_grey, fit_pictures, frame_of_pictures
from ..lobes.models.separator import MIN_RMS, Separator
from ..lobes.models.spatial_features import check_doa
from ..quantization.packing import MODEL_FILE
from ..utils import SAMPLE_RATE
from .audio import AudioError, AudioFile, as_waveforms, used_channels
from .chunks import ChunkedSeparator, SeparationStream, check_finite
from .engines.engine import load_network
from .folder import fetch_folder
from .loading import load
from .localization import Localizer
from .output import TargetOutput, output_paths
from .streaming import context_frames

logger = logging.getLogger(__name__)
CHUNK_SECONDS = 2.0  # longer ones leave the processor's caches
LOCATE_SECONDS = 10.0  # that are looked at together
MAX_THREADS = 1024


def doa_from_face(x, width):
    """Compute a talker's direction from where a camera sees the face.

    The camera stands above the array's centre and sees half a turn, as the
    paper has it: its left edge is 0 degrees.

    Arguments
    ---------
    x : float
        Horizontal position of the face in pixels.
    width : float
        Of the picture in pixels.

    Returns
    -------
    doa : float
        Degrees from the array's axis, 0 to 180.

    Example
    -------
    >>> doa_from_face(320, width=640)
    90.0
    """
    if not (width > 0 and 0 <= x <= width):
        raise ValueError(
            f"a face at {x} is not in a picture {width} pixels wide: x must "
            "lie in 0 to width"
        )
    return x / width * 180


class SeparationInterface:
    """Mix-in for a class with `separator` (in eval mode) and `device`.

    Example
    -------
    >>> from speechbrain_mpq import Separator, SpatialFeatures
    >>> class Loaded(SeparationInterface):
    ...     device = "cpu"
    ...     separator = Separator(SpatialFeatures(), 4, 8, 3, 1, 2).eval()
    >>> loaded = Loaded()
    >>> loaded.separate_batch(torch.randn(1, 8000, 15), [60.0]).shape
    torch.Size([1, 1, 8000])
    >>> loaded.microphones
    [1, 4, 6, 8, 10, 12, 15]
    """

    sample_rate = SAMPLE_RATE

    @property
    def microphones(self):
        """Numbers of the microphones that the model uses."""
        return self.separator.features.microphones

    @torch.inference_mode()
    def separate_batch(self, waveforms, doa, lips=None):
        """Separate talkers of mixtures of one length.

        The constant offset of every microphone is taken off first.

        Arguments
        ---------
        waveforms : torch.Tensor or array
            [batch, samples, mics], 16 kHz: all microphones of the array or
            just those that the model uses.
        doa : torch.Tensor or sequence of float
            [batch], [batch, targets] or, for talkers who move, [batch,
            targets, frames], degrees from the array's axis.
        lips : torch.Tensor, array or None
            [batch, pictures, height, width], or with targets behind batch,
            for models with a lip stream.

        Returns
        -------
        estimates : torch.Tensor
            [batch, targets, samples], each at its level in the mixture.
        """
        doa = torch.as_tensor(doa, dtype=torch.float32, device=self.device)
        if doa.dim() == 1:
            doa = doa[:, None]  # [batch, targets]
        if lips is not None:
            lips = torch.as_tensor(lips).to(self.device)
            lips = lips[:, None] if lips.dim() == 4 else lips
        waveforms = as_waveforms(waveforms)
        if waveforms.dim() == 3:
            used = torch.as_tensor(self._used(waveforms.shape[-1]))
            # A microphone lies in one piece, which all that follows is
            # faster with.
            rows = waveforms.transpose(1, 2).index_select(
                1, used.to(waveforms.device)
            )  # [batch, mics, samples]
            mean = rows.mean(2, keepdim=True, dtype=torch.float64)
            waveforms = (rows - mean.float()).transpose(1, 2)
        estimates = self.separator(waveforms.to(self.device), doa, lips)
        check_finite(estimates)
        return estimates

    @torch.inference_mode()
    def separate_file(
        self,
        path,
        doa,
        out=None,
        level="mixture",
        subtype=None,
        progress=False,
        chunk_seconds=CHUNK_SECONDS,
        lips=None,
    ):
        """Separate talkers of a recording of any length.

        The file is read in chunks, so that memory does not grow with it,
        and the output is that of the whole file up to rounding. Files above
        16 kHz are resampled; the output has 16 kHz. Silence stays silence.

        Arguments
        ---------
        doa : float, sequence of float, or array
            Direction of each target, degrees from the array's axis; [targets,
            frames] for talkers who move, see `vision.direction.frame_doas`.
        level : str or float
            "mixture": as loud as the talker is in the recording; a number:
            RMS in dB of full scale. One gain holds for the whole file.
        chunk_seconds : float
            Length of what is read at a time.
        lips : array or None
            [pictures, height, width] or [targets, pictures, height, width],
            25 a second, for models with a lip stream (see
            `vision.video.mouth_pictures`); all of them stay in memory. None:
            it goes by sound alone.

        Returns
        -------
        separated : list of Path, or torch.Tensor
            The files; without `out` the waveforms, [samples], or [targets,
            samples] for several directions.
        """
        if not (math.isfinite(chunk_seconds) and chunk_seconds > 0):
            raise ValueError(
                f"chunk_seconds must be above 0, not {chunk_seconds!r}"
            )
        directions = _as_directions(doa, self.separator.features.planar)
        single = directions.dim() == 0
        directions = directions.view(-1) if single else directions
        audio = path if isinstance(path, AudioFile) else self.open_audio(path)
        hop = self.separator.features.hop
        scan = audio.scan()
        _check_moving(directions, scan.samples // hop + 1)
        paths = output_paths(out, _median_doas(directions), audio.source)
        audio.log_warnings()
        with ExitStack() as stack:
            outputs = [
                stack.enter_context(TargetOutput(name, level, subtype))
                for name in paths
            ]
            pieces = self._pieces(
                audio, directions, lips, chunk_seconds, progress
            )
            for estimate, mixture in pieces:
                for output, target in zip(outputs, estimate):
                    output.push(target, mixture)
            results = [output.finish() for output in outputs]
        if out is not None:
            return results
        return results[0] if single else torch.stack(results)

    @torch.inference_mode()
    def locate_file(self, path, count=None, seconds=None):
        """Find where talkers are in a recording of any length.

        Arguments
        ---------
        seconds : float or None
            Listen to about so much of a longer recording, evenly spread.
        """
        localizer = Localizer(self.separator.features.positions)
        audio = path if isinstance(path, AudioFile) else self.open_audio(path)
        scan = audio.scan()
        if scan.silent:
            raise AudioError(
                audio.name, "it is silent: nobody talks there", "record sound"
            )
        audio.log_warnings()
        every = 1 if seconds is None else math.ceil(audio.seconds / seconds)
        blocks = audio.blocks(round(LOCATE_SECONDS * audio.rate))
        some = (block for i, block in enumerate(blocks) if i % every == 0)
        return localizer.locate_blocks(some, scan.samples // every, count)

    def stream(self, doa, **options):
        """Separate a live signal.

        Arguments
        ---------
        doa : float or sequence of float
            Directions of the targets in degrees.
        """
        self._no_lips()
        return SeparationStream(
            self.separator, doa, device=self.device, **options
        )

    def open_audio(self, path, name=None):
        """Open a recording, checked against what the model needs."""
        features = self.separator.features
        return AudioFile(
            path,
            features.microphones,
            features.array_size,
            name,
            features.n_fft,
        )

    def _pieces(self, audio, directions, lips, chunk_seconds, progress):
        """Estimate [targets, samples] and mixture [samples], in order."""
        scan = audio.scan()
        rms = max(scan.rms, MIN_RMS)
        frames = scan.samples // self.separator.features.hop + 1
        lips = self._pictures(lips, directions, frames)
        chunks = ChunkedSeparator(
            self.separator, directions.to(self.device)[None], lips=lips
        )
        samples = max(1, round(chunk_seconds * audio.rate))
        left = scan.samples
        with tqdm(
            total=round(audio.seconds), unit="s", disable=not progress
        ) as bar:
            for block in audio.blocks(samples):
                left -= len(block)
                block = block.to(self.device)[None] / rms
                estimate, mixture = chunks.push(block, 1.0, left == 0)
                yield estimate[0].cpu(), rms * mixture[0].cpu()
                bar.n = round((scan.samples - left) / SAMPLE_RATE)
                bar.refresh()

    def _used(self, channels):
        """Indices of the model's microphones among so many channels."""
        features = self.separator.features
        return used_channels(
            channels, features.microphones, features.array_size, "waveforms"
        )

    def _pictures(self, lips, directions, frames):
        """[1, targets, pictures, height, width] for a file, or None."""
        separator, hop = self.separator, self.separator.features.hop
        if lips is None:
            if separator.lips_size is not None:
                logger.warning("no lips given: this model goes by sound alone")
            return None
        lips = torch.as_tensor(lips)
        lips = lips[None] if lips.dim() == 3 else lips
        separator.check_lips(lips[None], directions[None])
        check_grey(lips)
        needed = len(frame_of_pictures(frames, hop))
        return fit_pictures(lips, needed)[None].to(self.device)

    def _no_lips(self):
        """Streams carry sound only."""
        if self.separator.lips_size is not None:
            raise ValueError(
                "this model looks at lips, which a stream of sound lacks: "
                "use separate_file(path, doa, lips=lips)"
            )


class LightSeparator(SeparationInterface):
    """A packed separator that is run and nothing else.

    Arguments
    ---------
    source : str or Path
        Packed folder, or "user/name" on the hub.
    engine : str
        "torch", "openvino" or "onnx": what runs the network.
    threads : int
        Threads of the engine.
    device : str
        Of PyTorch; other engines run on the CPU.

    Example
    -------
    >>> from speechbrain_mpq.inference.folder import repack
    >>> folder = repack("pretrained/separator_mini", getfixture("tmpdir"))
    >>> LightSeparator(folder).microphones
    [1, 4, 6, 8, 10, 12, 15]
    """

    def __init__(self, source, engine="torch", threads=1, device="cpu"):
        folder = fetch_folder(source)
        self.device = device
        self.model_file = folder / MODEL_FILE
        separator = load_for_engine(folder, engine, threads, device)
        self.separator = separator.to(device)


def load_for_engine(folder, engine="torch", threads=1, device="cpu"):
    """Load a packed separator, its network in an engine."""
    if engine != "torch" and torch.device(device).type != "cpu":
        raise ValueError(
            f'the engine "{engine}" runs on the CPU: leave device out, '
            'or choose engine="torch"'
        )
    whole = isinstance(threads, Integral) and not isinstance(threads, bool)
    if not whole or not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"threads must be 1 to {MAX_THREADS}, not {threads!r}")
    separator = load(folder)
    if not isinstance(separator, Separator):
        raise ValueError(
            f"{folder} holds a {type(separator).__name__}, no separator: use "
            "speechbrain_mpq.inference.loading.load"
        )
    if engine != "torch":
        # Here, as Numba takes 0.2 s and 56 MiB that PyTorch has no use for
        from .engines.fused_features import fused

        separator.features = fused(separator.features)
        network = load_network(folder, engine, threads, separator)
        context = context_frames(separator.mask_net)
        separator.mask_net = EngineNetwork(network, context)
    return separator


class EngineNetwork(nn.Module):
    """A mask network that is run by an engine.

    Arguments
    ---------
    network : callable
        From `engines.load_network`.
    context_frames : int
        Frames to either side that an output frame depends on.
    """

    def __init__(self, network, context_frames):
        super().__init__()
        self.network = network
        self.context_frames = context_frames

    def forward(self, inputs):
        """Map [batch, inputs, frames] to [batch, 2 * bins, frames]."""
        return self.network(inputs)


def _as_directions(doa, planar):
    """Directions as a tensor, refused where they cannot be some."""
    try:
        if isinstance(doa, torch.Tensor):
            directions = doa.float()
        elif isinstance(doa, list | tuple):
            doa = [torch.as_tensor(one, dtype=torch.float32) for one in doa]
            directions = torch.stack(doa)
        else:
            # A copy: other strides and read-only arrays are no matter then
            directions = torch.as_tensor(np.array(doa, dtype=np.float32))
        if directions.dim() > 2 or not directions.numel():
            raise ValueError(f"got {list(directions.shape)}")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            "doa must be degrees: a number, a sequence of one for each target, "
            f"or [targets, frames] for targets that move ({error})"
        ) from error
    check_doa(directions, planar)
    return directions


def _check_moving(directions, frames):
    """Raise ValueError unless talkers who move have one DOA a frame."""
    count = directions.shape[-1]
    if directions.dim() == 2 and count != frames:
        raise ValueError(
            f"a recording of {frames} frames needs as many directions for "
            f"each target who moves, got {count}: see "
            "vision.direction.frame_doas"
        )
    if directions.dim() == 1 and count == frames:
        raise ValueError(
            f"{frames} directions for a recording of {frames} frames are "
            f"taken for so many targets: give [1, {frames}] for one who moves"
        )


def _median_doas(directions):
    """One direction for each target, to name it by."""
    if directions.dim() == 1:
        return directions.tolist()
    return [round(d, 1) for d in directions.median(1).values.tolist()]
