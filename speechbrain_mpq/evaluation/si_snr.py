"""Compute the scale-invariant signal-to-noise ratio, a measure and a loss.

Tensor layout: waveforms are [..., time].
"""

import torch


def si_snr(estimate, target, zero_mean=True, eps=1e-8):
    """Compute the scale-invariant signal-to-noise ratio in dB.

    The estimate is split into its projection on the target and the rest, and
    their energies are compared. The negative of the mean is a training loss.

    A silent target has no projection: the result is then finite, very low and
    falls with the energy of the estimate (0 dB for a silent estimate), so that
    it neither breaks a batch nor looks like a good score.

    Arguments
    ---------
    estimate : torch.Tensor
        Estimated waveforms [..., time].
    target : torch.Tensor
        Target waveforms of the same shape.
    zero_mean : bool
        Take the mean over time away from both first.
    eps : float
        Energy added to both sides of the ratio, and to the target's.

    Returns
    -------
    torch.Tensor
        dB, one value for every waveform [...].

    Example
    -------
    >>> target = torch.tensor([1.0, -1.0, 1.0, -1.0])
    >>> noise = torch.tensor([1.0, 1.0, -1.0, -1.0])
    >>> round(si_snr(5 * target + 0.5 * noise, target).item(), 2)
    20.0
    >>> round(si_snr(target, torch.zeros(4)).item(), 1)  # silent target
    -86.0
    """
    if estimate.shape != target.shape:
        raise ValueError(
            f"estimate {tuple(estimate.shape)} and target "
            f"{tuple(target.shape)} differ in shape: cut both to one length"
        )
    if estimate.shape[-1] == 0:
        raise ValueError("SI-SNR of waveforms without a sample is undefined")
    if zero_mean:
        estimate = estimate - estimate.mean(-1, keepdim=True)
        target = target - target.mean(-1, keepdim=True)
    scale = (estimate * target).sum(-1, keepdim=True) / (
        target.square().sum(-1, keepdim=True) + eps
    )
    projection = scale * target
    signal = projection.square().sum(-1)
    noise = (estimate - projection).square().sum(-1)
    return 10 * torch.log10((signal + eps) / (noise + eps))
