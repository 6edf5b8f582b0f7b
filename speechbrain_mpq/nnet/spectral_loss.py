"""Loss between compressed spectra, with and without their phases.

Reference: Braun and Tashev, "Data augmentation and loss normalization for
deep noise suppression", 2020, https://arxiv.org/abs/2008.06412
"""

import torch


def compressed_loss(estimate, target, alpha=0.3, compression=0.3):
    """Distance of compressed spectra, partly with their phases.

    alpha | |S|^c e^(j arg S) - |E|^c e^(j arg E) |^2
    + (1 - alpha) (|S|^c - |E|^c)^2, of spectra at the target's level 1.

    Arguments
    ---------
    estimate, target : torch.Tensor
        Complex [B, frames, bins].
    alpha : float
        Share of the term with phases.
    compression : float
        c.

    Returns
    -------
    torch.Tensor
        [B], the mean over frames and bins. A silent target has no level: the
        estimate's own takes its place.

    Example
    -------
    >>> target = torch.randn(2, 5, 257, dtype=torch.cfloat)
    >>> bool((compressed_loss(target, target).abs() < 1e-5).all())
    True
    >>> bool((compressed_loss(-target, target) > 0.1).all())
    True
    """
    target, estimate = torch.view_as_real(target), torch.view_as_real(estimate)
    wanted, found = target.square().sum(-1), estimate.square().sum(-1)
    level = _mean(wanted)
    # a silent target has no level: then it is the estimate's
    level = torch.where(level > 0, level, _mean(found.detach()))
    level = level.clamp(min=1e-16)
    wanted, found = wanted / level, found / level
    common = (target * estimate).sum(-1) / level
    # Real numbers only, |a - b|^2 = |a|^2 + |b|^2 - 2 Re(a b*): the complex
    # products take twice as long
    wanted_size, wanted_gain = _compress(wanted, compression)
    found_size, found_gain = _compress(found, compression)
    with_phase = (
        wanted * wanted_gain.square()
        + found * found_gain.square()
        - 2 * common * wanted_gain * found_gain
    )
    without = (wanted_size - found_size).square()
    return (alpha * with_phase + (1 - alpha) * without).mean((1, 2))


def _mean(power):
    """Mean of a spectrum's power, [B, 1, 1]."""
    return power.mean((1, 2), keepdim=True)


def _compress(power, compression):
    """Compressed magnitudes, and what a spectrum is multiplied by for them."""
    # no gradient at zero: 60 dB below the level is near enough
    exponent = 0.5 * (power + 1e-6).log()
    return (
        (compression * exponent).exp(),
        ((compression - 1) * exponent).exp(),
    )
