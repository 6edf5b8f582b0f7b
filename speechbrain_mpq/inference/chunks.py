"""Separation of signals that come in pieces, with bounded memory.

The network sees a limited number of frames to either side. Where every frame
gets that many, the output is the one of the whole signal up to rounding, with
no seams to fade over. PyTorch networks carry their state from piece to piece
(`carry`); networks of other engines run on windows that overlap.
"""

from collections import deque

import torch
import torch.nn as nn

from ..separation.separator import MIN_RMS, apply_mask
from .carry import CarriedNetwork, can_carry
from .frames import FrameAnalysis, FrameSynthesis

WINDOW_CONTEXTS = 6  # new frames of a window, in multiples of its context


def context_frames(network):
    """Frames to either side that an output frame of a network depends on.

    Arguments
    ---------
    network : torch.nn.Module or callable
        A chain of convolutions, or anything with an attribute
        `context_frames`.

    Returns
    -------
    frames : int

    Example
    -------
    >>> from speechbrain_mpq.separation.tcn import mask_network
    >>> context_frames(mask_network(8, 4, 4, 4, blocks=4, layers=8))
    1020
    """
    if hasattr(network, "context_frames"):
        return network.context_frames
    convolutions = [
        module
        for module in getattr(network, "modules", tuple)()
        if isinstance(module, nn.Conv1d)
    ]
    if not convolutions:
        raise ValueError(
            f"cannot tell how many frames {type(network).__name__} looks "
            "ahead: give it an attribute context_frames"
        )
    return sum(
        c.dilation[0] * (c.kernel_size[0] - 1) // 2 for c in convolutions
    )


class WindowedNetwork:
    """Any network on frames that come in pieces, by windows that overlap.

    Arguments
    ---------
    network : callable
        Maps [batch, inputs, frames] to [batch, outputs, frames].
    history : int or None
        Frames before the new ones that a window has; None: all that matter.
    look_ahead : int or None
        Frames behind them; None: all that matter. With fewer the network
        takes the future for silence, as at the end of a signal.
    step : int or None
        New frames of a window; None: six times the context, which costs a
        third more work than one window over all.

    Example
    -------
    >>> windowed = WindowedNetwork(nn.Conv1d(1, 1, 3, padding=1), step=4)
    >>> windowed.push(torch.zeros(1, 1, 6)).shape[2]  # 4, one looks ahead
    4
    >>> windowed.push(torch.zeros(1, 1, 0), last=True).shape[2]
    2
    """

    def __init__(self, network, history=None, look_ahead=None, step=None):
        self.network = network
        context = 0
        if None in (history, look_ahead):
            context = context_frames(network)
        self.history = context if history is None else history
        self.look_ahead = context if look_ahead is None else look_ahead
        self.step = step or max(1, WINDOW_CONTEXTS * context)
        self._pieces = []  # history, then frames that are not done
        self._frames = 0  # in them
        self._done = 0  # frames of history in them

    def push(self, inputs, last=False):
        """Take frames, give those whose window is complete.

        Arguments
        ---------
        inputs : torch.Tensor
            [batch, inputs, frames].
        last : bool
            The signal ends here.

        Returns
        -------
        outputs : torch.Tensor
            [batch, outputs, frames]; frames may be 0.
        """
        self._pieces.append(inputs)
        self._frames += inputs.shape[2]
        outputs = []
        while self._frames - self._done >= self.step + self.look_ahead:
            kept, end = self._joined(), self._done + self.step
            mask = self.network(kept[..., : end + self.look_ahead])
            outputs.append(mask[..., self._done : end])
            self._forget(kept, end)
        if last and self._frames > self._done:
            outputs.append(self.network(self._joined())[..., self._done :])
        if not outputs:
            return inputs[:, :0, :0]
        return torch.cat(outputs, dim=2)

    def _joined(self):
        """All pieces as one; only whole windows are worth the copy."""
        if len(self._pieces) > 1:
            self._pieces = [torch.cat(self._pieces, dim=2)]
        return self._pieces[0]

    def _forget(self, kept, end):
        """Drop what no later window needs."""
        self._done = min(self.history, end)
        # A copy: a view would keep the whole window in memory
        self._pieces = [kept[..., end - self._done :].clone()]
        self._frames = self._pieces[0].shape[2]


class ChunkedSeparator:
    """A separator for signals that come in pieces of any length.

    Arguments
    ---------
    separator : Separator
        In eval mode.
    doa : torch.Tensor
        [batch, targets], degrees.
    network : object or None
        With a method `push`; None: `CarriedNetwork` where it can be, else
        `WindowedNetwork`.

    Example
    -------
    >>> from speechbrain_mpq.separation.features import SpatialFeatures
    >>> from speechbrain_mpq.separation.separator import Separator
    >>> separator = Separator(SpatialFeatures(), 4, 8, blocks=1, layers=2)
    >>> chunked = ChunkedSeparator(separator.eval(), torch.tensor([[60.0]]))
    >>> with torch.no_grad():
    ...     first = chunked.push(torch.randn(1, 4000, 7), level=1.0)
    ...     rest = chunked.push(torch.randn(1, 4000, 7), level=1.0, last=True)
    >>> first[0].shape[2] + rest[0].shape[2]
    8000
    """

    def __init__(self, separator, doa, network=None):
        self.doa = doa
        self.features = separator.features
        self.network = network or in_pieces(separator.mask_net)
        self._analysis = FrameAnalysis(self.features)
        self._synthesis = FrameSynthesis(self.features)
        self._spectra = _Queue()  # of the reference, until their mask comes
        self._mixture = _Queue()  # its waveform
        self._samples = 0

    def push(self, waveforms, level, last=False):
        """Take samples, give those that are separated.

        Arguments
        ---------
        waveforms : torch.Tensor
            [batch, samples, mics].
        level : float
            RMS of the reference channel over the signal.
        last : bool
            The signal ends here.

        Returns
        -------
        estimate : torch.Tensor
            [batch, targets, samples], before `match_level`.
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
        signal = signal.view(*self.doa.shape, -1)  # [B, K, samples]
        return signal, self._mixture.take(signal.shape[2])

    def _inputs(self, spectra, level):
        """[B * K, inputs, frames], at the level that the network expects."""
        # A complex division would change signs of zeros, and so phases by 2 pi
        parts = torch.view_as_real(spectra) / max(level, MIN_RMS)
        spectra = torch.view_as_complex(parts)
        return self.features(spectra, self.doa).flatten(0, 1)

    def _apply(self, mask):
        """Masked spectra of the reference, [B * K, bins, frames]."""
        reference = self._spectra.take(mask.shape[2])
        reference = reference.repeat_interleave(self.doa.shape[1], dim=0)
        return apply_mask(mask, reference) if mask.shape[2] else reference


def in_pieces(network):
    """The cheapest exact way to run a network on pieces.

    Arguments
    ---------
    network : callable
        Mask network of PyTorch or of another engine.

    Returns
    -------
    network : CarriedNetwork or WindowedNetwork
    """
    if can_carry(network):
        return CarriedNetwork(network)
    return WindowedNetwork(network)


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
