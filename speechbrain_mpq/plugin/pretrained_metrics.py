"""How good a pretrained interface is, in the measure that suits its class."""

from dataclasses import dataclass, field

import torch
from speechbrain.nnet.losses import get_si_snr_with_pitwrapper
from speechbrain.utils.edit_distance import accumulatable_wer_stats
from tqdm import tqdm

from .pretrained_data import batch_of, read_audio


@dataclass
class Quality:
    """One number for an interface on some items.

    Arguments
    ---------
    name : str
        Of the measure, with its unit.
    value : float
        Its value.
    count : int
        Items.
    pairs : dict
        Item -> (reference, answer) where these are text.
    """

    name: str
    value: float
    count: int
    pairs: dict = field(default_factory=dict)


class Measure:
    """A measure that needs something from the manifest beside the audio.

    Arguments
    ---------
    reference : str or None
        Key of the manifest that holds it; None: the usual one.
    """

    name = ""
    usual = ""

    def __init__(self, reference=None):
        self.reference = reference or self.usual

    def keys(self, items):
        """Keys that an item needs.

        Arguments
        ---------
        items : list of Item
            To be measured.
        """
        return [self.reference]

    def __call__(self, interface, items, progress=True):
        """Measure an interface, one item at a time.

        Arguments
        ---------
        interface : speechbrain.inference.interfaces.Pretrained
            Any that the measure suits.
        items : list of Item
            With the keys that ``keys`` names.
        progress : bool
            Shows a progress bar.

        Returns
        -------
        Quality
        """
        answers = []
        with torch.no_grad():
            for item in tqdm(items, "measuring", disable=not progress):
                wavs, lengths = batch_of([item.audio])
                answers.append(self.answer(interface, item, wavs, lengths))
        return self.summary(items, answers)

    def answer(self, interface, item, wavs, lengths):
        """What the interface says of one item.

        Arguments
        ---------
        interface : speechbrain.inference.interfaces.Pretrained
            Any that the measure suits.
        item : Item
            The item.
        wavs, lengths : torch.Tensor
            Its audio as a batch of one.
        """
        raise NotImplementedError("a subclass asks the interface")

    def summary(self, items, answers):
        """The quality that the answers amount to.

        Arguments
        ---------
        items : list of Item
            What was asked.
        answers : list
            One for each.
        """
        raise NotImplementedError("a subclass sums its answers up")

    def _pairs(self, items, answers):
        """Item -> (reference, answer)."""
        return {
            item.key: (str(item.entry[self.reference]), answer)
            for item, answer in zip(items, answers, strict=True)
        }


class WordErrorRate(Measure):
    """Word errors of a recognizer.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> items = [SimpleNamespace(key="a", entry={"words": "place it here"})]
    >>> round(WordErrorRate().summary(items, ["place here"]).value, 1)
    33.3
    """

    name = "WER, %"
    usual = "words"

    def answer(self, interface, item, wavs, lengths):
        """The words; see ``Measure``."""
        return interface.transcribe_batch(wavs, lengths)[0][0]

    def summary(self, items, answers):
        """Errors in all words; see ``Measure``."""
        pairs = self._pairs(items, answers)
        stats = accumulatable_wer_stats(
            [said.split() for said, _ in pairs.values()],
            [heard.split() for _, heard in pairs.values()],
        )
        return Quality(self.name, float(stats["WER"]), len(items), pairs)


class ErrorRate(Measure):
    """Wrong labels of a classifier.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> items = [SimpleNamespace(key=k, entry={"label": k}) for k in "abcd"]
    >>> quality = ErrorRate().summary(items, ["a", "b", "c", "c"])
    >>> quality.value, quality.pairs["d"]
    (25.0, ('d', 'c'))
    """

    name = "error rate, %"
    usual = "label"

    def answer(self, interface, item, wavs, lengths):
        """The label; see ``Measure``."""
        return str(interface.classify_batch(wavs, lengths)[3][0])

    def summary(self, items, answers):
        """Share of wrong labels; see ``Measure``."""
        pairs = self._pairs(items, answers)
        wrong = sum(label != answer for label, answer in pairs.values())
        value = 100 * wrong / len(pairs)
        return Quality(self.name, value, len(items), pairs)


class SourceSISNR(Measure):
    """SI-SNR of estimated sources, in the best order of the estimates.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> item = SimpleNamespace(entry={"s1_wav": "a.flac", "s2_wav": "b.flac"})
    >>> SourceSISNR().keys([item]), SourceSISNR("clean_wav").keys([item])
    (['s1_wav', 's2_wav'], ['clean_wav'])
    """

    name = "SI-SNR, dB"
    usual = "s1_wav"

    def keys(self, items):
        """s1_wav, s2_wav, ...: as many as there are; see ``Measure``."""
        if self.reference != self.usual:
            return [self.reference]
        numbered = [f"s{i}_wav" for i in range(1, 10)]
        found = [key for key in numbered if key in items[0].entry]
        return found or [self.usual]

    def answer(self, interface, item, wavs, lengths):
        """SI-SNR of one item; see ``Measure``."""
        separates = hasattr(interface, "separate_batch")
        run = interface.separate_batch if separates else interface.enhance_batch
        estimate = run(wavs).cpu()
        estimate = estimate if estimate.dim() == 3 else estimate[..., None]
        targets = [
            read_audio(item.key, item.entry, key, item.normalize)
            for key in self.keys([item])
        ]
        length = min(estimate.shape[1], *map(len, targets))
        target = torch.stack([t[:length] for t in targets], -1)[None]
        if target.shape[-1] != estimate.shape[-1]:
            raise ValueError(
                f"manifest entry {item.key!r} has {target.shape[-1]} sources, "
                f"the interface puts out {estimate.shape[-1]}"
            )
        loss = get_si_snr_with_pitwrapper(target, estimate[:, :length])
        return -loss.item()

    def summary(self, items, answers):
        """Mean over the items; see ``Measure``."""
        return Quality(self.name, sum(answers) / len(answers), len(items))
