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
    >>> compressed_loss(target, target).tolist()
    [0.0, 0.0]
    >>> bool((compressed_loss(-target, target) > 0.1).all())
    True
    """
    level = _level(target)
    level = torch.where(level > 0, level, _level(estimate.detach()))
    level = level.clamp(min=1e-8)
    wanted, wanted_size = _compress(target / level, compression)
    found, found_size = _compress(estimate / level, compression)
    difference = wanted - found
    with_phase = difference.real.square() + difference.imag.square()
    without = (wanted_size - found_size).square()
    return (alpha * with_phase + (1 - alpha) * without).mean((1, 2))


def _level(spectrum):
    """RMS of a spectrum, [B, 1, 1]."""
    power = spectrum.real.square() + spectrum.imag.square()
    return power.mean((1, 2), keepdim=True).sqrt()


def _compress(spectrum, compression):
    """Spectrum with compressed magnitudes, and these alone."""
    power = spectrum.real.square() + spectrum.imag.square()
    # the root has no gradient at zero: 60 dB below the level is near enough
    size = (power + 1e-6).sqrt()
    compressed = size**compression
    return spectrum / size * compressed, compressed
