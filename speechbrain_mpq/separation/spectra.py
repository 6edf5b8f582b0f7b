"""What spectra tell: power, phases between channels, and directions.

Complex spectra are [batch, mics, bins, frames].
"""

import torch

EPS = 1e-8


def phasors(spectra):
    """Unit phasors y / |y|; zero where the bin is silent.

    Arguments
    ---------
    spectra : torch.Tensor
        Complex, any shape.

    Returns
    -------
    unit : torch.Tensor
        Complex, same shape, magnitude 1 (or 0).

    Example
    -------
    >>> phasors(torch.tensor([3 + 4j, 0j]))
    tensor([0.6000+0.8000j, 0.0000+0.0000j])
    """
    power = spectra.real.square() + spectra.imag.square()
    return spectra * torch.rsqrt(power.clamp_min(1e-20))


def log_power(spectrum):
    """Log-power spectrum in bels (log10), the paper's LPS.

    Arguments
    ---------
    spectrum : torch.Tensor
        Complex, any shape.

    Returns
    -------
    lps : torch.Tensor
        Same shape, log10(|y|^2 + 1e-8).

    Example
    -------
    >>> log_power(torch.tensor([10 + 0j, 0j]))
    tensor([ 2., -8.])
    """
    power = spectrum.real.square() + spectrum.imag.square()
    return torch.log10(power + EPS)


def interchannel_phase(spectra, first, second):
    """Unit phasors of y_m / y_n; their angle is the IPD of Eq. 1.

    Arguments
    ---------
    spectra : torch.Tensor
        [batch, mics, bins, frames], complex.
    first, second : torch.Tensor
        [pairs], indices of m and n among the channels.

    Returns
    -------
    ratio : torch.Tensor
        [batch, pairs, bins, frames], complex, magnitude 1 (0 when silent).

    Example
    -------
    >>> y = torch.tensor([2j, 1 + 0j]).view(1, 2, 1, 1)
    >>> ratio = interchannel_phase(y, torch.tensor([0]), torch.tensor([1]))
    >>> round(ratio.angle().item(), 4)  # +90 degrees
    1.5708
    """
    unit = phasors(spectra)
    return unit[:, first] * unit[:, second].conj()


def steer(ratio, phase):
    """Rotate the phase ratios by what the target's direction would cause.

    The cosine is that of Eq. 3 for each pair (1 where the bin comes from the
    target's direction); the sine tells on which side of the target it lies.

    Arguments
    ---------
    ratio : torch.Tensor
        [batch, pairs, bins, frames], complex, from `interchannel_phase`.
    phase : torch.Tensor
        [batch, targets, pairs, bins, frames], from `pair_phase`; or without
        frames, or with a single one, for all.

    Returns
    -------
    cosine, sine : torch.Tensor
        [batch, targets, pairs, bins, frames].

    Example
    -------
    >>> ratio = torch.tensor([1j]).view(1, 1, 1, 1)  # measured: 90 degrees
    >>> cosine, sine = steer(ratio, torch.zeros(1, 1, 1, 1))
    >>> cosine.item(), sine.item()  # expected 0: a quarter turn to one side
    (0.0, 1.0)
    """
    phase = phase[..., None] if phase.dim() == 4 else phase
    return times_conjugate(
        (ratio.real[:, None], ratio.imag[:, None]), (phase.cos(), phase.sin())
    )


def times_conjugate(one, other):
    """One complex number times another's conjugate.

    Real arithmetic is twice as fast as complex products on a CPU.

    Arguments
    ---------
    one, other : (torch.Tensor, torch.Tensor)
        Real and imaginary part, of any shape.

    Returns
    -------
    real, imaginary : torch.Tensor

    Example
    -------
    >>> i = torch.tensor(0.0), torch.tensor(1.0)
    >>> times_conjugate(i, i)
    (tensor(1.), tensor(0.))
    """
    (a, b), (c, d) = one, other
    return torch.addcmul(a * c, b, d), torch.addcmul(b * c, a, d, value=-1)
