"""How good pretrained interfaces are, and how their outputs are compared.

The outputs of two recognizers or classifiers are compared by the KL divergence
of the distributions that they put out (Eq. 8 for a softmax instead of a mask),
those of separators, enhancers and encoders by the energy of the error.

Layout: outputs [items, frames, values].
"""

import copy
import time
from dataclasses import dataclass, field

import torch
from speechbrain.nnet.losses import get_si_snr_with_pitwrapper
from speechbrain.utils.edit_distance import accumulatable_wer_stats
from tqdm import tqdm

from ..allocation.output_scores import categorical_kl
from ..utils import duration
from .calibration_data import batch_of, read_audio

LENGTH_ERROR = 0.05  # by which a source may be longer than its mixture


@dataclass
class Quality:
    """One number for an interface on some items."""

    name: str  # of the measure, with its unit
    value: float  # its value
    count: int  # items
    # item -> (reference, answer) where these are text
    pairs: dict = field(default_factory=dict)
    skipped: int = 0  # items without a reference

    @property
    def unmet(self):
        """A reference and its answer, where none has a word of its answer."""
        for truth, answer in self.pairs.values():
            if {*truth.split()} & {*answer.split()}:
                return None
        return next((p for p in self.pairs.values() if p[0].split()), None)


class Metric:
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
        """Keys that an item needs."""
        return [self.reference]

    def check(self, items):
        """Refuse references that say nothing, before any work."""
        if not self.measured(items):
            raise ValueError(
                f"no entry of the manifest has a reference under "
                f"{self.reference!r}: leave it out, or name another key"
            )

    def check_audio(self, items):
        """Refuse references that are audio, and of no use, before any work."""

    def measured(self, items):
        """Those items that have a reference."""
        return [
            item
            for item in items
            if all(item.entry[key] is not None for key in self.keys([item]))
        ]

    def cost(self, interface, items):
        """What measuring before and after will take, from one item of it."""
        items = self.measured(items)
        item, started = items[len(items) // 2], time.perf_counter()
        with torch.no_grad():
            self.predict(interface, item, *batch_of([item.audio]))
        seconds = 2 * len(items) * (time.perf_counter() - started)
        return (
            f"{len(items)} items are measured before and after, "
            f"{duration(seconds)} (--test-items takes fewer)"
        )

    def __call__(self, interface, items, progress=True):
        """Measure an interface, one item at a time."""
        answers, count = [], len(items)
        items = self.measured(items)
        with torch.no_grad():
            for item in tqdm(items, "measuring", disable=not progress):
                wavs, lengths = batch_of([item.audio])
                answers.append(self.predict(interface, item, wavs, lengths))
        quality = self.aggregate(items, answers)
        quality.skipped = count - len(items)
        return quality

    def predict(self, interface, item, wavs, lengths):
        """What the interface says of one item."""
        raise NotImplementedError("a subclass asks the interface")

    def aggregate(self, items, answers):
        """The quality that the answers amount to."""
        raise NotImplementedError("a subclass sums its answers up")

    def _pairs(self, items, answers):
        """Item -> (reference, answer), of those with a reference."""
        return {
            item.key: (self.text(item), predict)
            for item, predict in zip(items, answers, strict=True)
            if item in self.measured([item])
        }

    def text(self, item):
        """The reference of an item as text."""
        truth = item.entry[self.reference]
        if isinstance(truth, list) and all(isinstance(w, str) for w in truth):
            return " ".join(truth)
        if isinstance(truth, str) or type(truth) is int:
            return str(truth)
        raise ValueError(
            f"manifest entry {item.key!r}: {self.reference!r} is {truth!r}, "
            "which is no text"
        )


class WordErrorRate(Metric):
    """Word errors of a recognizer.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> items = [SimpleNamespace(key="a", entry={"words": "place it here"})]
    >>> round(WordErrorRate().aggregate(items, ["place here"]).value, 1)
    33.3
    """

    name = "WER, %"
    usual = "words"

    def check(self, items):
        """There must be words; see ``Metric``."""
        super().check(items)
        _check_words(map(self.text, self.measured(items)), self.reference)

    def predict(self, interface, item, wavs, lengths):
        """The words; see ``Metric``."""
        words = interface.transcribe_batch(wavs, lengths)[0][0]
        return words if isinstance(words, str) else " ".join(words)

    def aggregate(self, items, answers):
        """Errors in all words; see ``Metric``."""
        pairs = self._pairs(items, answers)
        _check_words((truth for truth, _ in pairs.values()), self.reference)
        stats = accumulatable_wer_stats(
            [truth.split() for truth, _ in pairs.values()],
            [hypothesis.split() for _, hypothesis in pairs.values()],
        )
        return Quality(self.name, float(stats["WER"]), len(pairs), pairs)


def _check_words(references, key):
    """Refuse references without any word."""
    if not any(text.split() for text in references):
        raise ValueError(
            f"no reference under {key!r} has a word, so that there are no "
            "words to be wrong: name another key"
        )


class ErrorRate(Metric):
    """Wrong labels of a classifier.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> items = [SimpleNamespace(key=k, entry={"label": k}) for k in "abcd"]
    >>> quality = ErrorRate().aggregate(items, ["a", "b", "c", "c"])
    >>> quality.value, quality.pairs["d"]
    (25.0, ('d', 'c'))
    """

    name = "error rate, %"
    usual = "label"

    def check(self, items):
        """Labels must be text; see ``Metric``."""
        super().check(items)
        for item in self.measured(items):
            self.text(item)

    def measured(self, items):
        """Items with a label, which is not empty; see ``Metric``."""
        items = super().measured(items)  # a CSV has no other way to lack one
        return [item for item in items if item.entry[self.reference] != ""]

    def predict(self, interface, item, wavs, lengths):
        """The label; see ``Metric``."""
        return str(interface.classify_batch(wavs, lengths)[3][0])

    def aggregate(self, items, answers):
        """Share of wrong labels; see ``Metric``."""
        pairs = self._pairs(items, answers)
        wrong = sum(label != predict for label, predict in pairs.values())
        value = 100 * wrong / len(pairs)
        return Quality(self.name, value, len(pairs), pairs)


class SourceSISNR(Metric):
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
        """s1_wav, s2_wav, ...: as many as there are; see ``Metric``."""
        if self.reference != self.usual:
            return [self.reference]
        numbered = [f"s{i}_wav" for i in range(1, 10)]
        present = [key for key in numbered if key in items[0].entry]
        return present or [self.usual]

    def check_audio(self, items):
        """Sources have sound, as long as their mixture; see ``Metric``."""
        for item in self.measured(items):
            for key, source in zip(self.keys([item]), self._sources(item)):
                where = f"manifest entry {item.key!r}: {key!r}"
                if not source.any():
                    raise ValueError(
                        f"{where} is silent, and has no SI-SNR: leave it out"
                    )
                length = len(item.audio)
                if abs(len(source) - length) > LENGTH_ERROR * length:
                    raise ValueError(
                        f"{where} has {len(source)} samples, its mixture "
                        f"{length}: it is of another recording, or cut off"
                    )

    def _sources(self, item):
        """Audio of an item's references."""
        return [
            read_audio(item.key, item.entry, key, item.normalize)
            for key in self.keys([item])
        ]

    def predict(self, interface, item, wavs, lengths):
        """SI-SNR of one item; see ``Metric``."""
        estimate = waveforms(interface, wavs, lengths).cpu()
        targets = self._sources(item)
        length = min(estimate.shape[1], *map(len, targets))
        target = torch.stack([t[:length] for t in targets], -1)[None]
        if target.shape[-1] != estimate.shape[-1]:
            raise ValueError(
                f"manifest entry {item.key!r} has {target.shape[-1]} sources, "
                f"the interface puts out {estimate.shape[-1]}"
            )
        loss = get_si_snr_with_pitwrapper(target, estimate[:, :length])
        return -loss.item()

    def aggregate(self, items, answers):
        """Mean over the items; see ``Metric``."""
        return Quality(self.name, sum(answers) / len(answers), len(items))


def waveforms(interface, wavs, lengths):
    """Estimated waveforms of a separator or an enhancer.

    Arguments
    ---------
    interface : speechbrain.inference.interfaces.Pretrained
    wavs, lengths : torch.Tensor
        [items, time] and [items].

    Returns
    -------
    torch.Tensor
        [items, time, sources].
    """
    if hasattr(interface, "separate_batch"):
        return interface.separate_batch(wavs)
    return interface.enhance_batch(wavs, lengths)[..., None]


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
    reads = "audio"  # what is taken from the manifest: "audio" or "text"

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
        """
        raise NotImplementedError("a subclass says what is put out")

    def of(self, interface):
        """The same comparison's outputs for another interface."""
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
        chosen = [self.audio[i] for i in indices]
        if self.reads == "text":
            return chosen, None, indices
        return *batch_of(chosen), indices

    def valid(self, items, frames):
        """Which frames are no padding.

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
        """
        squares = (output.double() - reference.double()).square().sum(-1)
        return (squares * self._mask(reference, items)).sum()

    def scale(self, reference, items):
        """What the summed error is divided by, summed as well.

        Arguments
        ---------
        reference : torch.Tensor
            [items, frames, values].
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


def divergence(comparison, interface, chunk=8):
    """How far another interface's outputs are from the compared one's.

    Arguments
    ---------
    comparison : Comparison
        Of the full-precision interface.
    interface : Pretrained
        For example quantized.
    chunk : int
        Items that go through at a time.

    Returns
    -------
    float
        In ``comparison.unit``, mean over all items.
    """
    other, error, scale = comparison.of(interface), 0.0, 0.0
    with torch.no_grad():
        for start in range(0, len(comparison), chunk):
            items = slice(start, min(start + chunk, len(comparison)))
            batch = comparison.batch(torch.arange(items.start, items.stop))
            reference = comparison.outputs(*batch)
            error += comparison.error(reference, other.outputs(*batch), items)
            scale += comparison.scale(reference, items)
    return float(error / scale)
