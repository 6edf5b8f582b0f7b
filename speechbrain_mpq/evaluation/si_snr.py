"""Scale-invariant signal-to-noise ratio, as a measure and as a loss.

Tensor layout: waveforms are [..., time].
"""

import torch


def si_snr(estimate, target, zero_mean=True, eps=1e-8):
    """Scale-invariant signal-to-noise ratio in dB.

    The estimate is split into its projection on the target and the rest, and
    their energies are compared. The negative of the mean is a training loss.

    A silent target has no projection: the result is then finite, very low and
    falls with the energy of the estimate (0 dB for a silent estimate), so that
    it neither breaks a batch nor looks like a good score.

    Arguments
    ---------
    estimate : torch.Tensor
        Estimated waveforms [..., time].

    Returns
    -------
    torch.Tensor
        dB, one value for every waveform [...].
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
