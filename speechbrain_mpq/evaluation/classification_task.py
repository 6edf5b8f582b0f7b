"""Describe the classification task: accuracy, one class an item.

A test item is a sequence: `{"id", "reference", "hypothesis"}`, both names of
classes.
"""

import math
from textwrap import fill

from .significance import mcnemar
from .task import (
    CardText,
    ItemField,
    Measure,
    SignificanceTest,
    Task,
    register_task,
)

_USE = """\
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
_END = (
    "What the file holds: docs/integer-gru.md of speechbrain_mpq; "
    "`speechbrain-mpq\nverify FOLDER` checks it. Constants with which an "
    "integer could overflow are\nrefused.\n"
)


def _right(item):
    """Whether an item's class was found."""
    return item["reference"] == item["hypothesis"]


def _summarise(items):
    """Accuracy of some items."""
    right = sum(map(_right, items))
    accuracy = 100 * right / len(items) if items else None
    return {"n": len(items), "accuracy": accuracy}


def _test_errors(pairs):
    """McNemar's test of two systems' items; z > 0: the first errs more."""
    pairs = [(_right(own), _right(other)) for own, other in pairs]
    result = mcnemar(*zip(*pairs)) if pairs else mcnemar((), ())
    differ = result.only_first + result.only_second
    more = result.only_second - result.only_first
    z = more / math.sqrt(differ) if differ else 0.0
    return {"z": z, "p": result.p, "items": len(pairs)}


def _card(config):
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
        use=_USE.format(labels=fill(", ".join(labels), 78), seconds=seconds),
        tags=("audio-classification", "keyword-spotting", "integer"),
        pipeline_tag="audio-classification",
        end=_END,
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
                    "mcnemar", "McNemar", "errors", "items", _test_errors
                ),
                least_span=5,
            ),
        ),
        fields=(
            ItemField("reference", str, plural="references"),
            ItemField("hypothesis", str, plural="hypotheses"),
        ),
        summarise=_summarise,
        card=_card,
        items="sequences",
    )
)
