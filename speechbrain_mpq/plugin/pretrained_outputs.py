"""What pretrained interfaces put out, class by class.

Layout: outputs [items, frames, values].
"""

import torch

from .pretrained_comparison import Comparison, DistributionComparison
from .pretrained_data import batch_of


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
