"""Levels of a signal whose end is not known, from what has been heard."""

import math

import torch
import torch.nn.functional as F

from ..separation.features import SAMPLE_RATE

MEMORY = 10.0  # seconds after which old levels count a third
GLIDE = 160  # samples from one gain to the next


class RunningLevel:
    """RMS of a signal so far, the last seconds counting most.

    Example
    -------
    >>> level = RunningLevel()
    >>> level.update(torch.full((16000,), 0.5))
    >>> level.rms
    0.5
    """

    def __init__(self):
        self.samples = 0
        self._power = self._weight = 0.0

    def update(self, signal):
        """Take more of the signal.

        Arguments
        ---------
        signal : torch.Tensor
            [samples].
        """
        keep = _decay(len(signal))
        self.samples += len(signal)
        self._power = keep * self._power + float(signal.double().square().sum())
        self._weight = keep * self._weight + len(signal)

    @property
    def rms(self):
        """Root of the mean square; 0 where nothing has come."""
        return math.sqrt(self._power / max(self._weight, 1e-12))


class RunningGain:
    """`separator.match_level` over what has come out so far.

    Arguments
    ---------
    targets : int
    fixed : float or torch.Tensor or None
        A gain that is known, for all targets or [targets]: nothing is
        followed.

    Example
    -------
    >>> gain = RunningGain(1)
    >>> gain.apply(torch.full((1, 4), 2.0), torch.ones(4))
    tensor([[1., 1., 1., 1.]])
    >>> gain.value
    tensor([0.5000])
    """

    def __init__(self, targets, fixed=None):
        self._common = torch.zeros(targets, dtype=torch.float64)
        self._energy = torch.zeros(targets, dtype=torch.float64)
        self._fixed = fixed is not None
        self.value = None
        if self._fixed:
            gain = torch.as_tensor(fixed, dtype=torch.float32).cpu()
            self.value = gain.expand(targets)

    def apply(self, estimate, mixture):
        """Bring a block to its level.

        Arguments
        ---------
        estimate : torch.Tensor
            [targets, samples].
        mixture : torch.Tensor
            [samples], reference channel.

        Returns
        -------
        estimate : torch.Tensor
            Same shape.
        """
        samples = estimate.shape[1]
        if not samples:
            return estimate
        last = self.value
        if not self._fixed:
            self._follow(estimate, mixture)
        gain = self.value[:, None]
        last = gain if last is None else last[:, None]
        # Gliding for longer than a click lasts would let the onset of a
        # talker have the gain of the pause before it
        glide = torch.linspace(0, 1, GLIDE)[:samples]
        glide = F.pad(glide, (0, samples - len(glide)), value=1.0)
        return estimate * torch.lerp(last, gain, glide).to(estimate.device)

    def _follow(self, estimate, mixture):
        """Update the sums and the gain."""
        keep = _decay(estimate.shape[1])
        common = (estimate * mixture).sum(1).double().cpu()
        energy = estimate.square().sum(1).double().cpu()
        self._common = keep * self._common + common
        self._energy = keep * self._energy + energy
        self.value = (self._common / self._energy.clamp_min(1e-12)).float()


def _decay(samples):
    """How much of a running sum is left after some samples."""
    return math.exp(-samples / (MEMORY * SAMPLE_RATE))
