"""Describe the speech recognition task: word errors, utterance by utterance.

A test item is an utterance: `{"id", "reference", "hypothesis"}`, words between
white space.
"""

from dataclasses import replace

from .task import (
    WER,
    CardText,
    ItemField,
    Task,
    count_word_errors,
    register_task,
)

_USE = """\
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


def _summarise(items):
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


def _card(config):
    """What the card of a recognizer says."""
    return CardText(
        title="Hybrid speech recognizer",
        about="TDNN-F by LF-MMI, with a lexicon and a word n-gram. Written by "
        "speechbrain_mpq.",
        use=_USE,
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
        summarise=_summarise,
        card=_card,
        items="utterances",
        counts=("words",),
    )
)
