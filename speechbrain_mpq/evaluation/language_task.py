"""Describe the language modelling task: perplexity, sentence by sentence.

A test item is a sentence: `{"id", "nats", "words", "nats_unknown", "unknown",
"reference"}`. Words include the sentence's end; `nats` is the negative
log-probability of all of them, `nats_unknown` that of the unknown ones.
"""

from .perplexity import perplexity
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
