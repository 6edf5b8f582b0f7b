"""Separation of signals that come in pieces, with bounded memory.

A recording is cut into chunks and separated as if it were not. A live signal
comes in blocks and is given back with a delay that is stated: the network is
not causal, and with all the look-ahead that it was trained with it waits for
seconds. Less look-ahead means that it takes the future for silence, which
costs separation (docs/use.md says how much).

PyTorch's audio-only networks carry their state from piece to piece; those of
other engines and those with lips run on windows that overlap.
"""

import math
from collections import deque

import torch

from ..lobes.models.lips import PERIOD, as_grey
from ..lobes.models.separator import MIN_RMS, apply_mask
from ..lobes.models.spatial_features import check_doa
from ..utils import SAMPLE_RATE
from .audio import AudioError, as_waveforms, used_channels
from .microphones import OffsetFilter
from .output import RunningGain, RunningLevel
from .streaming import (
    FrameAnalysis,
    FrameSynthesis,
    WindowedNetwork,
    context_frames,
    in_pieces,
)


class ChunkedSeparator:
    """A separator for signals that come in pieces of any length.

    Arguments
    ---------
    separator : Separator
        In eval mode.
    doa : torch.Tensor
        [batch, targets], degrees; or [batch, targets, frames] for talkers
        who move.
    lips : torch.Tensor or None
        [batch, targets, pictures, height, width] of the whole signal, for
        models with a lip stream; None: no pictures.
    network : object or None
        With a method `push`; None: `StatefulNetwork` where it can be, else
        `WindowedNetwork`.

    Example
    -------
    >>> from speechbrain_mpq import Separator, SpatialFeatures
    >>> separator = Separator(SpatialFeatures(), 4, 8, blocks=1, layers=2)
    >>> chunked = ChunkedSeparator(separator.eval(), torch.tensor([[60.0]]))
    >>> with torch.no_grad():
    ...     first = chunked.push(torch.randn(1, 4000, 7), level=1.0)
    ...     rest = chunked.push(torch.randn(1, 4000, 7), level=1.0, last=True)
    >>> first[0].shape[2] + rest[0].shape[2]
    8000
    """

    def __init__(self, separator, doa, network=None, lips=None):
        self.doa = doa
        self.features = separator.features
        self._pixels = None  # [B * K, pixels, pictures]
        if separator.lips_size is not None:
            self._pixels = _pixels(lips, doa, separator.lips_size)
        self.network = network or in_pieces(separator.mask_net)
        self._analysis = FrameAnalysis(self.features)
        self._synthesis = FrameSynthesis(self.features)
        self._spectra = _Queue()  # of the reference, until their mask comes
        self._mixture = _Queue()  # its waveform
        self._samples = 0
        self._given = 0  # samples that are separated
        self._frames = 0  # analysed

    def push(self, waveforms, level, last=False):
        """Separate a piece, as far as its context is there.

        Arguments
        ---------
        waveforms : torch.Tensor
            [batch, samples, mics].

        Returns
        -------
        estimate : torch.Tensor
            [batch, targets, samples], before `match_level`; finite.
        mixture : torch.Tensor
            [batch, samples], the reference channel at the same samples.
        """
        self._samples += waveforms.shape[1]
        # Copies: a view would keep the other channels in memory too
        self._mixture.push(waveforms[..., 0].clone())
        spectra = self._analysis.push(waveforms, last)
        self._spectra.push(spectra[:, 0].clone())
        mask = self.network.push(self._inputs(spectra, level), last)
        signal = self._synthesis.push(self._apply(mask))
        if last:
            rest = self._synthesis.finish(self._samples)
            signal = torch.cat([signal, rest], dim=1)
        signal = signal.view(*self.doa.shape[:2], -1)  # [B, K, samples]
        check_finite(signal, self._given)
        self._given += signal.shape[2]
        return signal, self._mixture.take(signal.shape[2])

    def _inputs(self, spectra, level):
        """[B * K, inputs, frames], at the level that the network expects."""
        # A complex division would change signs of zeros, and so phases by 2 pi
        parts = torch.view_as_real(spectra) / max(level, MIN_RMS)
        spectra = torch.view_as_complex(parts)
        now = torch.arange(spectra.shape[3], device=spectra.device)
        now = now + self._frames
        self._frames += len(now)
        doa = self.doa[..., now] if self.doa.dim() == 3 else self.doa
        inputs = self.features(spectra, doa).flatten(0, 1)
        if self._pixels is None:
            return inputs
        shown = now * self.features.hop // PERIOD  # pictures on view
        shown = shown.clamp_max(self._pixels.shape[2] - 1)
        pixels = as_grey(self._pixels[..., shown]).to(inputs)
        return torch.cat([inputs, pixels], dim=1)

    def _apply(self, mask):
        """Masked spectra of the reference, [B * K, bins, frames]."""
        reference = self._spectra.take(mask.shape[2])
        reference = reference.repeat_interleave(self.doa.shape[1], dim=0)
        return apply_mask(mask, reference) if mask.shape[2] else reference


def _pixels(lips, doa, size):
    """Pictures as columns [B * K, pixels, pictures]; one of zeros for None."""
    if lips is None:
        lips = doa.new_zeros(*doa.shape[:2], 1, *size)
    return lips.flatten(3).flatten(0, 1).transpose(1, 2)


def check_finite(signal, before=0):
    """Raise ValueError on separated samples that are NaN or infinite.

    Arguments
    ---------
    signal : torch.Tensor
        [..., samples].
    """
    finite = torch.isfinite(signal)
    if not finite.all():
        place = (~finite).flatten(0, -2).any(0).nonzero()[0].item() + before
        raise ValueError(
            f"the model puts out NaN or infinity at {place / SAMPLE_RATE:.3f} "
            "s: its weights are damaged or diverged; take another packed "
            "folder (`speechbrain-mpq verify` checks them)"
        )


class _Queue:
    """Tensors in, as many of their last dimension's items out as asked."""

    def __init__(self):
        self._pieces = deque()

    def push(self, piece):
        """Append."""
        self._pieces.append(piece)

    def take(self, count):
        """The first items."""
        taken, have = [], 0
        while have < count:
            taken.append(self._pieces.popleft())
            have += taken[-1].shape[-1]
        if not taken:
            return self._pieces[0][..., :0]
        whole = torch.cat(taken, dim=-1)
        if have > count:
            self._pieces.appendleft(whole[..., count:].clone())
        return whole[..., :count]


class SeparationStream:
    """Takes blocks of samples of any length, gives separated samples.

    Level: input and output levels are unknown in advance. Both follow running
    averages, so the first seconds may change in level; give `level` and
    `gain` where they are known, as from an earlier stream.

    Arguments
    ---------
    separator : Separator
        In eval mode.
    doa : float or sequence of float
        Directions of the targets in degrees.
    look_ahead : float or None
        Seconds of future that the network sees; None: all that it uses, with
        the output of the whole signal.
    history : float or None
        Seconds of past that it sees; None: all. Shorter is cheaper. Used with
        `look_ahead` only.
    step : float
        Seconds from one change of level and gain to the next and, with
        `look_ahead`, from one run of the network to the next. Shorter means
        less delay and more work, see `work`.
    level : float or None
        RMS of the reference microphone over the signal, full scale being 1.
    gain : float or torch.Tensor or None
        Factor on the output, one or [targets]; that of an earlier stream of
        the same model is within about 1 dB.
    device : str or torch.device
        Where the separator is.
    remove_offset : bool
        Follow the constant offset of every microphone and take it off: a
        high pass at 1 Hz. False: they have none.

    Example
    -------
    >>> from speechbrain_mpq import Separator, SpatialFeatures
    >>> separator = Separator(SpatialFeatures(), 4, 8, 3, 2, 7).eval()
    >>> SeparationStream(separator, 60).delay  # seconds
    4.24
    >>> stream = SeparationStream(separator, [60, 120], look_ahead=0.1)
    >>> round(stream.delay, 3)
    0.272
    >>> stream.push(torch.randn(8000, 15)).shape
    torch.Size([2, 4864])
    >>> stream.finish().shape
    torch.Size([2, 3136])
    """

    def __init__(
        self,
        separator,
        doa,
        look_ahead=None,
        history=None,
        step=0.16,
        level=None,
        gain=None,
        device="cpu",
        remove_offset=True,
    ):
        doas = torch.as_tensor(doa, dtype=torch.float32, device=device)
        self.features = separator.features
        check_doa(doas, self.features.planar)
        self.device = device
        self._frame = self.features.hop / SAMPLE_RATE  # seconds
        network = separator.mask_net
        self._context = context_frames(network)
        if look_ahead is None:
            if history is not None:
                raise ValueError(
                    "history limits what is recomputed for a short "
                    "look_ahead: give both or neither"
                )
            network = in_pieces(network)
        else:
            network = self._windows(network, look_ahead, history, step)
        self._network = network
        self._chunks = ChunkedSeparator(separator, doas.view(1, -1), network)
        self._level, self._given_level = RunningLevel(), level
        self._gain = RunningGain(doas.numel(), gain)
        hop = self.features.hop
        self._offset = OffsetFilter(hop) if remove_offset else None
        # Level and gain change where the network gives frames, not with the
        # caller's blocks: those may have any size
        follows = level is None or gain is None
        frames = self._frames(step) if follows else 1
        self._step = getattr(network, "step", max(1, frames))
        self._waiting = torch.zeros(0, len(self.features.microphones))
        self._due = None  # samples until the next change
        if follows:
            frames = self._look_ahead + self._step
            self._due = (frames - 1) * hop + self.features.n_fft // 2
        self._begun = self._finished = False

    @property
    def delay(self):
        """Seconds from a sample's coming in to its going out, at most.

        Computing time is not in it, nor what your own blocks wait for.
        """
        frames = self._look_ahead + self._step - 1
        return frames * self._frame + self.features.n_fft / SAMPLE_RATE

    @property
    def _look_ahead(self):
        """Frames that the network waits for."""
        return getattr(self._network, "look_ahead", self._context)

    @property
    def work(self):
        """How many times as much the network computes as for a whole file."""
        network = self._network
        if not isinstance(network, WindowedNetwork):
            return 1.0
        return 1 + (network.history + network.look_ahead) / network.step

    @property
    def level(self):
        """RMS of the reference microphone as it is now taken."""
        return self._given_level or self._level.rms

    @property
    def gain(self):
        """Factor on each target as it now is, [targets]; None: none yet."""
        return self._gain.value

    @torch.inference_mode()
    def push(self, block):
        """Take the next samples.

        Arguments
        ---------
        block : torch.Tensor or array
            [samples, mics], 16 kHz: all microphones of the array or just
            those that the model uses.

        Returns
        -------
        separated : torch.Tensor
            [targets, samples]: those that are ready, in order; maybe none.
        """
        return self._push(self._checked(block), last=False)

    @torch.inference_mode()
    def finish(self):
        """End the signal.

        Returns
        -------
        separated : torch.Tensor
            [targets, samples], all that had not come out.
        """
        if not self._begun:
            raise ValueError("nothing was pushed: push samples, then finish")
        mics = len(self.features.microphones)
        block = torch.zeros(0, mics, dtype=torch.float32)
        separated = self._push(block, last=True)
        self._finished = True
        return separated

    def _push(self, block, last):
        """Separate what is due, and bring it to level."""
        if self._finished:
            raise ValueError("the stream has ended: begin a new one")
        self._begun = self._begun or len(block) > 0
        if self._offset is not None:
            block = self._offset.push(block, last)
        if self._due is None:
            return self._separate(block, last)
        block = torch.cat([self._waiting.to(block), block])
        pieces = []
        while len(block) >= self._due:
            pieces.append(self._separate(block[: self._due], False))
            block = block[self._due :]
            self._due = self._step * self.features.hop
        self._waiting = block.clone()
        if last or not pieces:
            ready = block if last else block[:0]
            pieces.append(self._separate(ready, last))
        return torch.cat(pieces, dim=1)

    def _separate(self, block, last):
        """One group of samples, with one level and one gain."""
        block = block.to(self.device)
        self._level.update(block[:, 0])
        estimate, mixture = self._chunks.push(block[None], self.level, last)
        return self._gain.apply(estimate[0], mixture[0])

    def _checked(self, block):
        """The used channels of a block."""
        block = as_waveforms(block, "block")
        if block.dim() != 2:
            raise AudioError(
                "block",
                f"shape {list(block.shape)}",
                "give samples as [samples, mics]",
            )
        if not torch.isfinite(block).all():
            raise AudioError(
                "block", "holds NaN or infinity", "check the source"
            )
        features = self.features
        return block[
            :,
            used_channels(
                block.shape[1],
                features.microphones,
                features.array_size,
                "block",
            ),
        ]

    def _windows(self, network, look_ahead, history, step):
        """The network on windows of so many seconds."""
        frames = self._frames(look_ahead)
        past = self._context if history is None else self._frames(history)
        return WindowedNetwork(
            network,
            history=min(past, self._context),
            look_ahead=min(frames, self._context),
            step=max(1, self._frames(step)),
        )

    def _frames(self, seconds):
        """Whole frames in some seconds."""
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"expected seconds, 0 or more, not {seconds}")
        return int(seconds / self._frame + 1e-6)


def relative_lengths(lengths, wavs, name="wav_lens"):
    """Check how much of each waveform of a batch is no padding.

    Arguments
    ---------
    lengths : torch.Tensor, sequence or None
        [batch], parts of the longest; None: all are whole.
    wavs : torch.Tensor
        [batch, samples].
    name : str
        Of the argument, for messages.

    Returns
    -------
    torch.Tensor
        [batch], float32, on the device of the waveforms.

    Example
    -------
    >>> relative_lengths([1.0, 0.5], torch.zeros(2, 8))
    tensor([1.0000, 0.5000])
    """
    if lengths is None:
        return torch.ones(len(wavs), device=wavs.device)
    fractions = torch.as_tensor(lengths, device=wavs.device).float()
    if (
        fractions.shape != (len(wavs),)
        or not ((fractions > 0) & (fractions <= 1)).all()
    ):
        raise ValueError(
            f"{name} must be {len(wavs)} relative lengths above 0 and up to 1, "
            f"not {lengths}: divide numbers of samples by that of the longest"
        )
    return fractions
