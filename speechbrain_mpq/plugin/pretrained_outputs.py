"""What pretrained interfaces put out, and how two outputs are compared.

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


class CTCOutputs(DistributionComparison):
    """Log-probabilities of an EncoderASR, for every frame."""

    def outputs(self, wavs, lengths, indices):
        """See ``Comparison``."""
        return self.interface.encode_batch(wavs, lengths)


class AttentionOutputs(DistributionComparison):
    """Log-probabilities of an attention decoder, for every token.

    The decoder is led along what the full-precision model has recognized.
    """

    def __init__(self, interface, items):
        super().__init__(interface, items)
        if not hasattr(self.decoder, "forward_step"):
            raise ValueError(
                f"the decoder is a {type(self.decoder).__name__}, which gives "
                "no distribution to compare: only SpeechBrain's S2S searchers "
                "are served"
            )
        self.tokens = []
        for item in items:
            wavs, lengths = batch_of([item.audio])
            _, tokens = interface.transcribe_batch(wavs, lengths)
            self.tokens.append([int(token) for token in tokens[0]])

    @property
    def decoder(self):
        """The searcher of the interface."""
        return self.interface.mods["decoder"]

    def outputs(self, wavs, lengths, indices):
        """See ``Comparison``."""
        encoded = self.layers(wavs, lengths, indices)
        frames = lengths.to(encoded.device) * encoded.shape[1]
        frames = frames.round().int()
        tokens = [
            torch.tensor([self.decoder.bos_index, *self.tokens[i]])
            for i in indices
        ]
        tokens = torch.nn.utils.rnn.pad_sequence(
            tokens, True, self.decoder.eos_index
        ).to(encoded.device)
        memory = self.decoder.reset_mem(len(indices), encoded.device)
        steps = []
        for column in tokens.unbind(1):
            step, memory, _ = self.decoder.forward_step(
                column, memory, encoded, frames
            )
            steps.append(step)
        return torch.stack(steps, 1)

    def layers(self, wavs, lengths, indices):
        """The encoder; the decoder's layers are used once for each token."""
        return self.interface.encode_batch(wavs, lengths)

    def valid(self, items, frames):
        """Tokens with the one that ends them; see ``Comparison``."""
        counts = torch.tensor([len(t) + 1 for t in self.tokens[items]])
        return torch.arange(frames) < counts[:, None]


class ClassOutputs(DistributionComparison):
    """Log-posteriors of a classifier, one distribution for each item."""

    def outputs(self, wavs, lengths, indices):
        """See ``Comparison``."""
        logits = self.interface.classify_batch(wavs, lengths)[0]
        return logits.reshape(len(logits), -1, logits.shape[-1])

    def valid(self, items, frames):
        """See ``Comparison``."""
        return torch.ones(len(self.audio[items]), frames, dtype=torch.bool)


class WaveformOutputs(Comparison):
    """Estimated waveforms of a separator or an enhancer."""

    def outputs(self, wavs, lengths, indices):
        """See ``Comparison``."""
        if hasattr(self.interface, "separate_batch"):
            return self.interface.separate_batch(wavs)
        return self.interface.enhance_batch(wavs)[..., None]


class EncoderOutputs(Comparison):
    """Embeddings or encoder states, whatever the encoder puts out."""

    def outputs(self, wavs, lengths, indices):
        """See ``Comparison``."""
        encoded = self.interface.encode_batch(wavs, lengths)
        if not isinstance(encoded, torch.Tensor) or encoded.dim() != 3:
            raise ValueError(
                f"{type(self.interface).__name__}.encode_batch must return "
                "one tensor [batch, frames, values] to be compared"
            )
        return encoded


class InterfaceOutputs(torch.nn.ModuleDict):
    """The modules of an interface as a network: item numbers in, outputs out.

    Parameters have the names that they have in the interface's ``mods``.

    Arguments
    ---------
    comparison : Comparison
        Says what is put out.
    each_layer_once : bool
        Run ``Comparison.layers`` instead of ``Comparison.outputs``.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> encoder = torch.nn.Linear(1, 2)
    >>> interface = SimpleNamespace(
    ...     mods={"encoder": encoder},
    ...     encode_batch=lambda wavs, lengths: encoder(wavs[..., None]),
    ... )
    >>> items = [SimpleNamespace(audio=torch.ones(n)) for n in (4, 6)]
    >>> network = InterfaceOutputs(CTCOutputs(interface, items))
    >>> network(torch.tensor([1, 0])).shape, list(network.state_dict())
    (torch.Size([2, 6, 2]), ['encoder.weight', 'encoder.bias'])
    """

    def __init__(self, comparison, each_layer_once=False):
        mods = comparison.interface.mods
        super().__init__({n: m for n, m in mods.items() if m is not None})
        self._comparison = comparison
        self._each_layer_once = each_layer_once

    def forward(self, indices):
        """Outputs for the items of these numbers.

        Arguments
        ---------
        indices : torch.Tensor
            [items], whole numbers.

        Returns
        -------
        torch.Tensor
            [items, frames, values].
        """
        compared = self._comparison
        run = compared.layers if self._each_layer_once else compared.outputs
        return run(*compared.batch(indices))
