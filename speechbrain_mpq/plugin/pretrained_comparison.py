"""How the outputs of two pretrained interfaces are compared.

Recognizers and classifiers are compared by the KL divergence of the
distributions that they put out (Eq. 8 for a softmax instead of a mask),
separators, enhancers and encoders by the energy of the error.

Layout: outputs [items, frames, values].
"""

import copy

import torch

from ..allocation.kl import categorical_kl
from .pretrained_data import batch_of


def frame_divergence(p_logits, q_logits):
    """Divergence of the categorical distributions that logits stand for.

    Log-probabilities are logits, too.

    Arguments
    ---------
    p_logits, q_logits : torch.Tensor
        Full-precision and quantized outputs, [..., values].

    Returns
    -------
    torch.Tensor
        [...], float64, in nats. Never negative.

    Example
    -------
    >>> p, q = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).log().unbind()
    >>> frame_divergence(q, p)
    tensor(0.6931, dtype=torch.float64)
    """
    p, q = (x.double().log_softmax(-1) for x in (p_logits, q_logits))
    return categorical_kl(p, q).sum(-1).clamp_(min=0)


class Comparison:
    """Outputs of an interface for calibration items, and their error.

    Subclasses say what is put out and whether that is a distribution.

    Arguments
    ---------
    interface : speechbrain.inference.interfaces.Pretrained
        In full precision when the comparison is made.
    items : list of Item
        Calibration data.
    """

    unit = "relative energy of the output's error"
    method = "relative_output_error"

    def __init__(self, interface, items):
        self.interface = interface
        self.audio = [item.audio for item in items]

    def __len__(self):
        return len(self.audio)

    def outputs(self, wavs, lengths, indices):
        """Outputs of the interface, [items, frames, values].

        Arguments
        ---------
        wavs, lengths : torch.Tensor
            [items, time] and [items].
        indices : list of int
            Which of the calibration items these are.
        """
        raise NotImplementedError("a subclass says what is put out")

    def of(self, interface):
        """The same comparison's outputs for another interface.

        Arguments
        ---------
        interface : speechbrain.inference.interfaces.Pretrained
            Of the same class, for example quantized.
        """
        other = copy.copy(self)
        other.interface = interface
        return other

    def layers(self, wavs, lengths, indices):
        """A pass that uses as many layers as possible, but each only once."""
        return self.outputs(wavs, lengths, indices)

    def batch(self, indices):
        """Arguments of ``outputs`` for some items.

        Arguments
        ---------
        indices : torch.Tensor
            [items], whole numbers.
        """
        indices = indices.tolist()
        return *batch_of([self.audio[i] for i in indices]), indices

    def valid(self, items, frames):
        """Which frames are no padding.

        Arguments
        ---------
        items : slice
            Of the calibration items.
        frames : int
            Frames of the longest of them.

        Returns
        -------
        torch.Tensor
            bool [items, frames].
        """
        _, lengths = batch_of(self.audio[items])
        last = (lengths * frames).ceil().clamp(min=1)
        return torch.arange(frames) < last[:, None]

    def error(self, reference, output, items):
        """Summed error of an output, float64.

        Arguments
        ---------
        reference, output : torch.Tensor
            [items, frames, values], in full precision and quantized.
        items : slice
            Which of the calibration items these are.
        """
        squares = (output.double() - reference.double()).square().sum(-1)
        return (squares * self._mask(reference, items)).sum()

    def scale(self, reference, items):
        """What the summed error is divided by, summed as well.

        Arguments
        ---------
        reference : torch.Tensor
            [items, frames, values].
        items : slice
            Which of the calibration items these are.
        """
        return self.error(torch.zeros_like(reference), reference, items)

    def _mask(self, reference, items):
        """``valid`` on the outputs' device."""
        return self.valid(items, reference.shape[1]).to(reference.device)


class DistributionComparison(Comparison):
    """Outputs that are the logits of categorical distributions."""

    unit = "KL divergence of the output, nats"
    method = "categorical_kl"

    def error(self, reference, output, items):
        """Summed divergence; see ``Comparison``."""
        divergence = frame_divergence(reference, output)
        return (divergence * self._mask(reference, items)).sum()

    def scale(self, reference, items):
        """Number of frames; see ``Comparison``."""
        return self._mask(reference, items).sum()
