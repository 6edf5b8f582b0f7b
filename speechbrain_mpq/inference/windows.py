"""A mask network on frames that come in pieces, by windows that overlap.

The network sees a limited number of frames to either side. Where every frame
gets that many, the output is the one of the whole signal up to rounding, with
no seams to fade over.

Layout: [batch, channels, frames].
"""

import torch
import torch.nn as nn

from ..separation.tcn import reach
from .carry import CarriedNetwork, can_carry

WINDOW_CONTEXTS = 6  # new frames of a window, in multiples of its context


def context_frames(network):
    """Frames to either side that an output frame of a network depends on.

    Arguments
    ---------
    network : torch.nn.Module or callable
        A chain of convolutions, or anything with an attribute
        `context_frames`.

    Returns
    -------
    frames : int

    Example
    -------
    >>> from speechbrain_mpq.separation.tcn import mask_network
    >>> context_frames(mask_network(8, 4, 4, 4, blocks=4, layers=8))
    1020
    """
    if hasattr(network, "context_frames"):
        return network.context_frames
    modules = getattr(network, "modules", tuple)()
    if not any(isinstance(module, nn.Conv1d) for module in modules):
        raise ValueError(
            f"cannot tell how many frames {type(network).__name__} looks "
            "ahead: give it an attribute context_frames"
        )
    return reach(network)


class WindowedNetwork:
    """Any network on frames that come in pieces, by windows that overlap.

    Arguments
    ---------
    network : callable
        Maps [batch, inputs, frames] to [batch, outputs, frames]. With an
        attribute `period` windows begin at multiples of so many frames.
    history : int or None
        Frames before the new ones that a window has; None: all that matter.
    look_ahead : int or None
        Frames behind them; None: all that matter. With fewer the network
        takes the future for silence, as at the end of a signal.
    step : int or None
        New frames of a window; None: six times the context, which costs a
        third more work than one window over all.

    Example
    -------
    >>> windowed = WindowedNetwork(nn.Conv1d(1, 1, 3, padding=1), step=4)
    >>> windowed.push(torch.zeros(1, 1, 6)).shape[2]  # 4, one looks ahead
    4
    >>> windowed.push(torch.zeros(1, 1, 0), last=True).shape[2]
    2
    """

    def __init__(self, network, history=None, look_ahead=None, step=None):
        self.network = network
        context = 0
        if None in (history, look_ahead):
            context = context_frames(network)
        period = getattr(network, "period", 1)

        def whole(frames):
            """So many frames or a few more: periods."""
            return -(-frames // period) * period

        self.history = whole(context if history is None else history)
        self.look_ahead = context if look_ahead is None else look_ahead
        self.step = whole(step or max(1, WINDOW_CONTEXTS * context))
        self._pieces = []  # history, then frames that are not done
        self._frames = 0  # in them
        self._done = 0  # frames of history in them

    def push(self, inputs, last=False):
        """Take frames, give those whose window is complete.

        Arguments
        ---------
        inputs : torch.Tensor
            [batch, inputs, frames].
        last : bool
            The signal ends here.

        Returns
        -------
        outputs : torch.Tensor
            [batch, outputs, frames]; frames may be 0.
        """
        self._pieces.append(inputs)
        self._frames += inputs.shape[2]
        outputs = []
        while self._frames - self._done >= self.step + self.look_ahead:
            kept, end = self._joined(), self._done + self.step
            mask = self.network(kept[..., : end + self.look_ahead])
            outputs.append(mask[..., self._done : end])
            self._forget(kept, end)
        if last and self._frames > self._done:
            outputs.append(self.network(self._joined())[..., self._done :])
        if not outputs:
            return inputs[:, :0, :0]
        return torch.cat(outputs, dim=2)

    def _joined(self):
        """All pieces as one; only whole windows are worth the copy."""
        if len(self._pieces) > 1:
            self._pieces = [torch.cat(self._pieces, dim=2)]
        return self._pieces[0]

    def _forget(self, kept, end):
        """Drop what no later window needs."""
        self._done = min(self.history, end)
        # A copy: a view would keep the whole window in memory
        self._pieces = [kept[..., end - self._done :].clone()]
        self._frames = self._pieces[0].shape[2]


def in_pieces(network):
    """The cheapest exact way to run a network on pieces.

    Arguments
    ---------
    network : callable
        Mask network of PyTorch or of another engine.

    Returns
    -------
    network : CarriedNetwork or WindowedNetwork
    """
    if can_carry(network):
        return CarriedNetwork(network)
    return WindowedNetwork(network)
