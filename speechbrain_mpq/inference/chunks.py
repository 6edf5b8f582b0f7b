"""Separation of signals that come in pieces, with bounded memory.

PyTorch's audio-only networks carry their state from piece to piece (`carry`);
those of other engines and those with lips run on windows that overlap
(`windows`).
"""

from collections import deque

import torch

from ..separation.lip_input import as_grey
from ..separation.lips import PERIOD
from ..separation.separator import MIN_RMS, apply_mask
from .frames import FrameAnalysis, FrameSynthesis
from .windows import in_pieces


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
        self._frames = 0  # analysed

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
        signal = signal.view(*self.doa.shape[:2], -1)  # [B, K, samples]
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
