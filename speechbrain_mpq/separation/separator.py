"""The multichannel separator: waveforms and a direction in, one talker out."""

import torch
import torch.nn as nn

from .tcn import mask_network

MIN_RMS = 1e-6  # full scale = 1; below this the reference channel is silent


class Separator(nn.Module):
    """Complex-mask separator of Fig. 2: features, TCN, mask, inverse STFT.

    Arguments
    ---------
    features : SpatialFeatures
        Front end; it knows the array.
    channels, hidden, kernel_size, blocks, layers : int
        Size of the TCN, see `tcn.mask_network`.
    scale_inputs : bool
        Begin with a factor for each input: the form that
        `equalization.equalize_inputs_` gives it.

    Example
    -------
    >>> from speechbrain_mpq.separation.features import SpatialFeatures
    >>> separator = Separator(SpatialFeatures(), channels=16, hidden=32)
    >>> mixture = torch.randn(2, 16000, 7)
    >>> separator(mixture, torch.tensor([30.0, 120.0])).shape
    torch.Size([2, 16000])
    """

    def __init__(
        self,
        features,
        channels=256,
        hidden=512,
        kernel_size=3,
        blocks=4,
        layers=8,
        scale_inputs=False,
    ):
        super().__init__()
        self.features = features
        self.mask_net = mask_network(
            features.inputs,
            2 * features.bins,
            channels,
            hidden,
            kernel_size,
            blocks,
            layers,
            scale_inputs,
        )

    def forward(self, waveforms, doa):
        """Separate the talkers at `doa`.

        Arguments
        ---------
        waveforms : torch.Tensor
            [batch, samples, mics], 16 kHz; the channels are
            `features.microphones`, reference first.
        doa : torch.Tensor
            [batch] or [batch, targets], degrees from the array's axis.

        Returns
        -------
        estimate : torch.Tensor
            [batch, samples] or [batch, targets, samples], at the level that
            the talker has in the reference channel.
        """
        inputs, reference = self.analyse(waveforms, doa)
        mask = self.mask_net(inputs)  # [B * K, 2 * bins, frames]
        estimate = apply_mask(mask, reference)  # [B * K, bins, frames]
        samples = waveforms.shape[1]
        signal = self.features.istft(estimate, samples)
        signal = signal.view(len(doa), -1, samples)  # [B, K, samples]
        signal = match_level(signal, waveforms[:, None, :, 0])
        return signal.view(*doa.shape, samples)

    def analyse(self, waveforms, doa):
        """Everything in front of the mask network.

        Arguments
        ---------
        waveforms : torch.Tensor
            [batch, samples, mics].
        doa : torch.Tensor
            [batch] or [batch, targets], degrees.

        Returns
        -------
        inputs : torch.Tensor
            [batch * targets, inputs, frames].
        reference : torch.Tensor
            [batch * targets, bins, frames], complex spectrum of the reference
            channel at unit RMS.
        """
        self._check(waveforms, doa)
        doa = doa.view(len(doa), -1)  # [B, K]
        level = waveforms[..., 0].square().mean(1, keepdim=True).sqrt()
        level = level.clamp_min(MIN_RMS)  # [B, 1]
        spectra = self.features.stft(waveforms / level[..., None])
        inputs = self.features(spectra, doa).flatten(0, 1)
        targets = doa.shape[1]
        return inputs, spectra[:, 0].repeat_interleave(targets, dim=0)

    def _check(self, waveforms, doa):
        """Raise ValueError on input that would give a wrong answer."""
        microphones = self.features.microphones
        if waveforms.dim() != 3 or waveforms.shape[2] != len(microphones):
            raise ValueError(
                f"expected waveforms [batch, samples, {len(microphones)}] of "
                f"microphones {microphones}, got {list(waveforms.shape)}"
            )
        if doa.dim() not in (1, 2) or len(doa) != len(waveforms):
            raise ValueError(
                f"expected DOAs [{len(waveforms)}] or [{len(waveforms)}, "
                f"targets], got shape {list(doa.shape)}"
            )
        if waveforms.shape[1] < self.features.n_fft:
            raise ValueError(
                f"{waveforms.shape[1]} samples are shorter than one window of "
                f"{self.features.n_fft}"
            )
        if not torch.isfinite(waveforms).all():
            raise ValueError("waveforms hold NaN or infinite samples")


def apply_mask(mask, reference):
    """Eq. 4: the complex mask times the reference channel.

    Arguments
    ---------
    mask : torch.Tensor
        [batch, 2 * bins, frames], real parts then imaginary parts.
    reference : torch.Tensor
        [batch, bins, frames], complex.

    Returns
    -------
    estimate : torch.Tensor
        [batch, bins, frames], complex.

    Example
    -------
    >>> mask = torch.tensor([0.0, 1.0]).view(1, 2, 1)  # m = 0 + 1j
    >>> apply_mask(mask, torch.tensor([2.0 + 0j]).view(1, 1, 1)).item()
    2j
    """
    real, imag = mask.chunk(2, dim=1)
    return torch.complex(real.float(), imag.float()) * reference


def match_level(estimate, mixture):
    """Give an estimate the level that it has in the mixture.

    SI-SNR leaves the level of the output open. As talkers are uncorrelated,
    the scale that explains most of the mixture is the talker's own.

    Arguments
    ---------
    estimate : torch.Tensor
        [..., samples], of any level.
    mixture : torch.Tensor
        [..., samples], reference channel.

    Returns
    -------
    estimate : torch.Tensor
        Same shape; silence stays silence.

    Example
    -------
    >>> talker, other = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 5.0]])
    >>> match_level(100 * talker, talker + other)
    tensor([1., 1., 0.])
    """
    common = (estimate * mixture).sum(-1, keepdim=True)
    energy = estimate.square().sum(-1, keepdim=True)
    return estimate * (common / energy.clamp_min(1e-12))
