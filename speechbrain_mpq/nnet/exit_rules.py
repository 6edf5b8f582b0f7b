"""Rules that say at which exit a frame leaves a network.

A rule is asked at each exit but the last one, with the mask that the exit
would give and the noisy spectrum, [1, bins] each, of one signal.
"""

import torch


class FixedExit:
    """Rule: stop at the same exit in every frame.

    Arguments
    ---------
    exit : int

    Example
    -------
    >>> rule = FixedExit(1)
    >>> rule(0, None, None), rule(1, None, None)
    (False, True)
    """

    def __init__(self, exit):
        self.exit = exit

    def reset(self):
        """Begin another signal."""

    def __call__(self, exit, mask, spectrum):
        """Whether to stop."""
        return exit >= self.exit


class RandomExit(FixedExit):
    """Control: leave at one exit or another by chance.

    Its quality lies on the line between two fixed exits: what a rule that
    listens has to beat.

    Arguments
    ---------
    early, late : int
        The exits.
    share : float
        Of the frames that leave early.
    seed : int

    Example
    -------
    >>> rule = RandomExit(1, 5, share=0.5)
    >>> rule(0, None, None)
    False
    """

    def __init__(self, early, late, share, seed=1234):
        super().__init__(late)
        self.early, self.share, self.seed = early, share, seed
        self.reset()

    def reset(self):
        """Begin another signal."""
        self.random = torch.Generator().manual_seed(self.seed)

    def __call__(self, exit, mask, spectrum):
        """Whether to stop."""
        if exit != self.early:
            return exit >= self.exit
        return torch.rand((), generator=self.random).item() < self.share


class _LevelWeighted:
    """What rules have that weigh a frame by its level.

    Compressed spectra are held against their running mean: what happens in a
    loud frame counts, what happens in a pause does not.
    """

    def __init__(self, threshold, first=0, memory=60, last=None):
        self.threshold, self.first, self.last = threshold, first, last
        self.memory = memory
        self.reset()

    def reset(self):
        """Begin another signal."""
        self.level, self.frame, self.masks = None, None, {}

    def __call__(self, exit, mask, spectrum):
        """Whether to stop."""
        size = spectrum.abs() ** 0.6
        if self.frame is not spectrum:  # the first exit of this frame
            self.frame, now = spectrum, size.mean()
            self.level = (
                now
                if self.level is None
                else self.level + (now - self.level) / self.memory
            )
        unrest = self.unrest(mask, self.masks.get(exit))
        self.masks[exit] = mask
        if exit < self.first:
            return False
        if self.last is not None and exit >= self.last:
            return True
        weighted = (size * unrest).mean() / (self.level + 1e-9)
        return weighted.item() < self.threshold


class MovingMask(_LevelWeighted):
    """Rule that listens: go on while the mask of what is loud moves.

    What is asked is the mean distance of an exit's mask from the one that it
    gave the last time: speech that begins or changes makes it large, steady
    noise and held sounds do not.

    Arguments
    ---------
    threshold : float
        Stop below it: 0 never stops, a large one always does.
    first : int
        First exit at which it may stop.
    memory : float
        Frames over which the level is averaged.
    last : int or None
        Exit at which it must stop; None: the network's last.

    Example
    -------
    >>> rule = MovingMask(threshold=0.2)
    >>> frames = torch.ones(3, 1, 257, dtype=torch.cfloat)
    >>> masks = [torch.full((1, 257), value) for value in (0.1, 0.5, 0.6)]
    >>> [rule(0, mask, frame) for mask, frame in zip(masks, frames)]
    [True, False, True]
    """

    def unrest(self, mask, before):
        """How far each bin has moved; nothing has in the first frame."""
        return (
            torch.zeros_like(mask) if before is None else (mask - before).abs()
        )


class UncertainMask(_LevelWeighted):
    """Rule that listens: go on while the mask of what is loud is undecided.

    A mask near 0 or 1 has decided. What is asked is the mean of 4 m (1 - m)
    over the bins.

    Arguments
    ---------
    threshold : float
        Stop below it: 0 never stops, a large one always does.
    first : int
        First exit at which it may stop.
    memory : float
        Frames over which the level is averaged.
    last : int or None
        Exit at which it must stop; None: the network's last.

    Example
    -------
    >>> rule = UncertainMask(threshold=0.5)
    >>> spectrum = torch.ones(1, 257, dtype=torch.cfloat)
    >>> rule(0, torch.full((1, 257), 0.9), spectrum)
    True
    >>> rule(0, torch.full((1, 257), 0.5), spectrum)
    False
    """

    def unrest(self, mask, before):
        """How undecided each bin is."""
        return 4 * mask * (1 - mask)
