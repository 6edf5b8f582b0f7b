"""Describe the tasks whose items are words: recognition, language, classes.

A test item of recognition is an utterance: `{"id", "reference",
"hypothesis"}`, words between white space. One of classification is a sequence
with the same keys, both names of classes.

An item of language modelling is a sentence: `{"id", "nats", "words",
"nats_unknown", "unknown", "reference"}`. Words include the sentence's end;
`nats` is the negative log-probability of all of them, `nats_unknown` that of
the unknown ones.
"""

import math
from dataclasses import replace
from textwrap import fill

from .significance import mcnemar
from .task import (
    WER,
    CardText,
    ItemField,
    Measure,
    SignificanceTest,
    Task,
    count_word_errors,
    register_task,
)

_USE_RECOGNITION = """\
## How to use

It takes speechbrain_mpq, a plugin for SpeechBrain (JSON, text and safetensors
are read, nothing is executed):

```python
from speechbrain_mpq import HybridASR

model = HybridASR.from_pretrained("FOLDER or user/name")
print(model.transcribe_file({sample}))
```

It knows the words of `lm.arpa` by the phones that `lexicon.txt` gives them;
other words with the same phones:

```python
model = HybridASR.from_pretrained(
    "FOLDER or user/name", lexicon="my_lexicon.txt", ngram="my_lm.arpa"
)
```
"""


def _summarise_recognition(items):
    """Word errors of some utterances; WER is in percent."""
    words = count_word_errors(items)
    return {
        "n": len(items),
        "wer": words.rate if words.words else None,
        "words": words.words,
        "substitutions": words.substitutions,
        "deletions": words.deletions,
        "insertions": words.insertions,
    }


def _recognition_card(config):
    """What the card of a recognizer says."""
    return CardText(
        title="Hybrid speech recognizer",
        about="TDNN-F by LF-MMI, with a lexicon and a word n-gram. Written by "
        "speechbrain_mpq.",
        use=_USE_RECOGNITION,
        tags=("automatic-speech-recognition", "lf-mmi", "tdnn-f"),
        pipeline_tag="automatic-speech-recognition",
    )


RECOGNITION = register_task(
    Task(
        name="speech recognition",
        measures=(replace(WER, decimals=2, least_span=2),),
        fields=(
            ItemField("reference", str, plural="references"),
            ItemField("hypothesis", str, plural="hypotheses"),
        ),
        summarise=_summarise_recognition,
        card=_recognition_card,
        items="utterances",
        counts=("words",),
    )
)


_USE_LANGUAGE = """\
## How to use

It takes speechbrain_mpq, a plugin for SpeechBrain. Lists of hypotheses from
any recognizer, as lines of JSON:

```
speechbrain-mpq rescore nbest.json --lm "FOLDER or user/name"
```

In SpeechBrain's rescorers (JSON, text and safetensors are read, nothing is
executed):

```python
from speechbrain.decoders.scorer import RescorerBuilder
from speechbrain_mpq import LanguageModel

rescorer = LanguageModel.from_pretrained("FOLDER or user/name").rescorer()
builder = RescorerBuilder({{rescorer.name: 0.5}}, [rescorer])
```

Words that are not in `vocab.txt` count as `<unk>`, which stands for all of
them together.
"""


def perplexity(nats, words):
    """Perplexity of words with a negative log-probability.

    Arguments
    ---------
    nats : float
        Of all of them together.
    words : int

    Returns
    -------
    float
        NaN of no words; infinity where floats cannot hold it.

    Example
    -------
    >>> round(perplexity(2 * math.log(10), 2), 4)
    10.0
    """
    if not words:
        return math.nan
    try:
        return math.exp(nats / words)
    except OverflowError:
        return math.inf


class Perplexity:
    """Perplexity over all words and sentence ends.

    Where <unk> stands for many words its probability is that of all of them
    together, which no other vocabulary compares with: the perplexity of the
    known words alone leaves the places out where the text has an unknown one.

    Arguments
    ---------
    unk_index : int
        Number of <unk>.

    Example
    -------
    >>> import torch
    >>> measured = Perplexity(unk_index=0)
    >>> log_probs = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).double().log()
    >>> measured.append(log_probs, torch.tensor([0, 1]))
    >>> {name: round(n, 4) for name, n in measured.summarize().items()}
    {'PPL': 2.8284, 'PPL_known': 4.0, 'words': 2, 'unknown': 1}
    """

    def __init__(self, unk_index):
        self.unk_index = unk_index
        self.words = self.unknown = 0
        self.total = self.total_unknown = 0.0  # nats

    def append(self, log_probs, targets):
        """Count some words.

        Arguments
        ---------
        log_probs : torch.Tensor
            [words, vocabulary]
        targets : torch.Tensor
            [words]
        """
        own = (
            -log_probs.detach().gather(-1, targets[..., None])[..., 0].double()
        )
        unknown = targets == self.unk_index
        self.words += targets.numel()
        self.unknown += int(unknown.sum())
        self.total += float(own.sum())
        self.total_unknown += float(own[unknown].sum())

    def summarize(self):
        """Perplexities and what they were counted over.

        Returns
        -------
        dict
            "PPL", "PPL_known" (without <unk>), "words" and "unknown"; a
            perplexity of no words is NaN.
        """
        known_words = self.words - self.unknown
        return {
            "PPL": perplexity(self.total, self.words),
            "PPL_known": perplexity(
                self.total - self.total_unknown, known_words
            ),
            "words": self.words,
            "unknown": self.unknown,
        }


def _summarise_language(items):
    """Perplexity of some sentences, with and without unknown words."""
    nats, words, nats_unknown, unknown = (
        sum(item[key] for item in items)
        for key in ("nats", "words", "nats_unknown", "unknown")
    )
    known_words = words - unknown
    return {
        "n": len(items),
        "ppl": perplexity(nats, words) if words else None,
        "ppl_known": perplexity(nats - nats_unknown, known_words)
        if known_words
        else None,
        "words": words,
        "unknown": unknown,
    }


def _language_card(config):
    """What the card of a language model says."""
    architecture = config.get("architecture") or {}
    transformer = architecture.get("class") == "TiedTransformerLM"
    return CardText(
        title=f"{'Transformer' if transformer else 'Recurrent'} language model",
        about="Probabilities of words and sentences, to rescore the "
        "hypotheses of a\nrecognizer. Written by speechbrain_mpq.",
        use=_USE_LANGUAGE.format(),
        tags=("language-modeling", "automatic-speech-recognition"),
        pipeline_tag="text-generation",
    )


LANGUAGE_MODELLING = register_task(
    Task(
        name="language modelling",
        measures=(
            Measure("ppl", "PPL", "perplexity", higher_is_better=False),
            Measure(
                "ppl_known",
                "PPL of known words",
                "perplexity of known words",
                higher_is_better=False,
            ),
        ),
        fields=(
            ItemField("nats"),
            ItemField("words"),
            ItemField("nats_unknown"),
            ItemField("unknown"),
            ItemField("reference", str, plural="references"),
        ),
        summarise=_summarise_language,
        card=_language_card,
        items="sentences",
        counts=("words",),
    )
)


_USE_CLASSIFICATION = """\
## How to use

It takes speechbrain_mpq, a plugin for SpeechBrain. Safetensors and JSON are
read, nothing is executed:

```python
from speechbrain_mpq import SpokenWordClassifier

classifier = SpokenWordClassifier.from_pretrained("FOLDER or user/name")
scores, score, index, label = classifier.classify_file("seven.wav")
```

One channel of any sampling rate; what is behind {seconds:g} s is not heard.
Whatever it hears it takes for one of

{labels}.
"""
_END_CLASSIFICATION = (
    "What the file holds: docs/integer-gru.md of speechbrain_mpq; "
    "`speechbrain-mpq\nverify FOLDER` checks it. Constants with which an "
    "integer could overflow are\nrefused.\n"
)


def _right(item):
    """Whether an item's class was found."""
    return item["reference"] == item["hypothesis"]


def _summarise_classification(items):
    """Accuracy of some items."""
    right = sum(map(_right, items))
    accuracy = 100 * right / len(items) if items else None
    return {"n": len(items), "accuracy": accuracy}


def _test_classification(pairs):
    """McNemar's test of two systems' items; z > 0: the first errs more."""
    pairs = [(_right(own), _right(other)) for own, other in pairs]
    result = mcnemar(*zip(*pairs)) if pairs else mcnemar((), ())
    differ = result.only_first + result.only_second
    more = result.only_second - result.only_first
    z = more / math.sqrt(differ) if differ else 0.0
    return {"z": z, "p": result.p, "items": len(pairs)}


def _classification_card(config):
    """What the card of a classifier says."""
    description = config.get("integer_gru") or {}
    labels = description.get("labels") or []
    seconds = (description.get("features") or {}).get("most_seconds", 1)
    return CardText(
        title="Spoken words by an integer GRU",
        about="Classifies one spoken word. From the codes of its features to "
        "the class it\ncomputes with integers only: products with matrices, "
        "sums, products and look-up\ntables, each of them at a bit width of "
        "its own. Written by speechbrain_mpq.",
        use=_USE_CLASSIFICATION.format(
            labels=fill(", ".join(labels), 78), seconds=seconds
        ),
        tags=("audio-classification", "keyword-spotting", "integer"),
        pipeline_tag="audio-classification",
        end=_END_CLASSIFICATION,
    )


CLASSIFICATION = register_task(
    Task(
        name="classification",
        measures=(
            Measure(
                "accuracy",
                "accuracy",
                unit="%",
                decimals=1,
                test=SignificanceTest(
                    "mcnemar",
                    "McNemar",
                    "errors",
                    "items",
                    _test_classification,
                ),
                least_span=5,
            ),
        ),
        fields=(
            ItemField("reference", str, plural="references"),
            ItemField("hypothesis", str, plural="hypotheses"),
        ),
        summarise=_summarise_classification,
        card=_classification_card,
        items="sequences",
    )
)
