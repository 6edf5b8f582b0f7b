"""STFT and its inverse for signals that come in pieces.

What comes out, put together, is what `SpatialFeatures.stft` and `.istft` make
of the whole signal. Layout: waveforms [batch, samples, mics], spectra
[batch, mics, bins, frames].
"""

import torch
import torch.nn.functional as F


class FrameAnalysis:
    """Spectra of a signal that comes in pieces of any length.

    Arguments
    ---------
    features : SpatialFeatures
        For its window and hop.

    Example
    -------
    >>> from speechbrain_mpq.separation.features import SpatialFeatures
    >>> analysis = FrameAnalysis(SpatialFeatures())
    >>> analysis.push(torch.zeros(1, 500, 7)).shape  # the window reaches back
    torch.Size([1, 7, 257, 1])
    >>> analysis.push(torch.zeros(1, 524, 7), last=True).shape
    torch.Size([1, 7, 257, 4])
    """

    def __init__(self, features):
        self.features = features
        self._kept = None  # samples that a later frame needs

    def push(self, waveforms, last=False):
        """Take samples, give the frames that are complete.

        Arguments
        ---------
        waveforms : torch.Tensor
            [batch, samples, mics].
        last : bool
            The signal ends here.

        Returns
        -------
        spectra : torch.Tensor
            [batch, mics, bins, frames], complex; frames may be 0.
        """
        n_fft, hop = self.features.n_fft, self.features.hop
        batch, _, mics = waveforms.shape
        margin = waveforms.new_zeros(batch, n_fft // 2, mics)
        kept = margin if self._kept is None else self._kept
        pieces = [kept, waveforms, margin] if last else [kept, waveforms]
        signal = torch.cat(pieces, dim=1)
        frames = max(0, (signal.shape[1] - n_fft) // hop + 1)
        self._kept = signal[:, frames * hop :].clone()
        if not frames:
            shape = batch, mics, self.features.bins, 0
            return waveforms.new_zeros(shape, dtype=torch.complex64)
        return self._stft(signal[:, : (frames - 1) * hop + n_fft])

    def _stft(self, signal):
        """Frames without padding at the ends."""
        batch, samples, mics = signal.shape
        spectra = torch.stft(
            signal.transpose(1, 2).reshape(batch * mics, samples),
            self.features.n_fft,
            self.features.hop,
            window=self.features.window,
            center=False,
            return_complex=True,
        )
        return spectra.view(batch, mics, *spectra.shape[1:])


class FrameSynthesis:
    """Waveform of spectra that come in pieces: overlap and add.

    Arguments
    ---------
    features : SpatialFeatures
        For its window and hop.

    Example
    -------
    >>> from speechbrain_mpq.separation.features import SpatialFeatures
    >>> features, signal = SpatialFeatures(), torch.ones(1, 1000)
    >>> spectrum = features.stft(signal[..., None])[:, 0]
    >>> synthesis = FrameSynthesis(features)
    >>> pieces = [synthesis.push(spectrum), synthesis.finish(1000)]
    >>> [len(piece[0]) for piece in pieces]
    [768, 232]
    >>> torch.allclose(torch.cat(pieces, dim=1), signal, atol=1e-6)
    True
    """

    def __init__(self, features):
        self.features = features
        self._sums = None  # signal and window energy that later frames add to
        self._given = -(features.n_fft // 2)  # samples; the STFT padded first

    def push(self, spectrum):
        """Take frames, give the samples that no later frame reaches.

        Arguments
        ---------
        spectrum : torch.Tensor
            [batch, bins, frames], complex.

        Returns
        -------
        waveform : torch.Tensor
            [batch, samples]; samples may be 0.
        """
        hop, frames = self.features.hop, spectrum.shape[2]
        if not frames:
            return spectrum.real.new_zeros(len(spectrum), 0)
        sums = self._overlap_add(spectrum)
        if self._sums is not None:
            kept = self._sums.shape[-1]
            sums[..., :kept] += self._sums
        self._sums = sums[..., frames * hop :].clone()
        return self._give(sums[..., : frames * hop])

    def finish(self, samples):
        """The rest, up to the length of the whole signal.

        Arguments
        ---------
        samples : int
            Length of the whole signal.

        Returns
        -------
        waveform : torch.Tensor
            [batch, samples].
        """
        return self._give(self._sums)[:, : samples - max(0, self._start)]

    def _overlap_add(self, spectrum):
        """[2, batch, samples]: frames times window, window squared."""
        n_fft, hop = self.features.n_fft, self.features.hop
        window, frames = self.features.window[:, None], spectrum.shape[2]
        signal = torch.fft.irfft(spectrum, n=n_fft, dim=1) * window
        energy = window.square().expand(len(signal), -1, frames)
        length = (frames - 1) * hop + n_fft
        folded = F.fold(
            torch.cat([signal, energy]),  # [2 * batch, n_fft, frames]
            output_size=(1, length),
            kernel_size=(1, n_fft),
            stride=(1, hop),
        )
        return folded.view(2, len(signal), length)

    def _give(self, sums):
        """Finished sums as samples, without those of the padding."""
        self._start = self._given
        self._given += sums.shape[-1]
        signal, energy = sums[..., max(0, -self._start) :]
        return signal / energy.clamp_min(torch.finfo(energy.dtype).tiny)
