"""Describe the language modelling task: perplexity, sentence by sentence.

A test item is a sentence: `{"id", "nats", "words", "nats_unknown", "unknown",
"reference"}`. Words include the sentence's end; `nats` is the negative
log-probability of all of them, `nats_unknown` that of the unknown ones.
"""

import math

from .task import CardText, ItemField, Measure, Task, register_task

_USE = """\
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
        known = self.words - self.unknown
        return {
            "PPL": perplexity(self.total, self.words),
            "PPL_known": perplexity(self.total - self.total_unknown, known),
            "words": self.words,
            "unknown": self.unknown,
        }


def _summarise(items):
    """Perplexity of some sentences, with and without unknown words."""
    nats, words, nats_unknown, unknown = (
        sum(item[key] for item in items)
        for key in ("nats", "words", "nats_unknown", "unknown")
    )
    known = words - unknown
    return {
        "n": len(items),
        "ppl": perplexity(nats, words) if words else None,
        "ppl_known": perplexity(nats - nats_unknown, known) if known else None,
        "words": words,
        "unknown": unknown,
    }


def _card(config):
    """What the card of a language model says."""
    architecture = config.get("architecture") or {}
    transformer = architecture.get("class") == "TiedTransformerLM"
    return CardText(
        title=f"{'Transformer' if transformer else 'Recurrent'} language model",
        about="Probabilities of words and sentences, to rescore the "
        "hypotheses of a\nrecognizer. Written by speechbrain_mpq.",
        use=_USE.format(),
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
        summarise=_summarise,
        card=_card,
        items="sentences",
        counts=("words",),
    )
)
