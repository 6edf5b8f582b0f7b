"""Describe the speech quality task: correlations with the labels of clips.

A test item is a clip: `{"id", "score", "label", "held_out"}`. `score` is what
a network says, `label` what it should, `held_out` whether training has never
heard the clip's type of noise.
"""

import math

from .significance import mse, paired_z_test, pcc, srcc
from .task import (
    CardText,
    Conditions,
    ItemField,
    Measure,
    SignificanceTest,
    Task,
    register_task,
)

CONDITIONS = ("heard", "held out")

_USE = """\
## How to use

It takes speechbrain_mpq, a plugin for SpeechBrain:

```
speechbrain-mpq quality speech.wav --model "FOLDER or user/name"
```

In Python (JSON and safetensors are read, nothing is executed):

```python
from speechbrain_mpq import QualityEstimator

estimator = QualityEstimator.from_pretrained("FOLDER or user/name")
print(estimator.estimate_file({sample}).score)
```

Speech of one channel, 16 kHz or more. Scores are estimates of a measure, no
opinions of listeners, and hold for speech and noise like those of training.
"""


def _condition_of(item):
    """Whether training has heard the type of noise."""
    return CONDITIONS[bool(item["held_out"])]


def _summarise(items):
    """Correlations, None where they are undefined, and the squared error."""
    if not items:
        return {"n": 0, "pcc": None, "srcc": None, "mse": None}
    scores = [item["score"] for item in items]
    labels = [item["label"] for item in items]
    values = {f.__name__: f(scores, labels) for f in (pcc, srcc, mse)}
    defined = {k: v if math.isfinite(v) else None for k, v in values.items()}
    return {"n": len(items), **defined}


def _test_errors(pairs):
    """Paired z-test of two networks' squared errors, two-tailed."""
    differences = [
        (own["score"] - own["label"]) ** 2
        - (other["score"] - other["label"]) ** 2
        for own, other in pairs
    ]
    z, p, clips, *_ = paired_z_test(differences)
    return {"z": z, "p": p, "clips": clips}


def _card(config):
    """What the card of a quality predictor says."""
    architecture = config.get("architecture") or {}
    binary = architecture.get("class") == "BinaryDNSMOS"
    how = "with binary activation maps" if binary else "in float"
    return CardText(
        title="Speech quality predictor"
        + (" with binary activation maps" if binary else ""),
        about="Predicts the quality of speech, without a reference, from a "
        f"log-mel spectrogram,\n{how}. Written by speechbrain_mpq.",
        use=_USE,
        tags=("speech-quality", "non-intrusive"),
        pipeline_tag="audio-classification",
    )


SPEECH_QUALITY = register_task(
    Task(
        name="speech quality",
        measures=(
            Measure("pcc", "PCC", "Pearson's correlation", decimals=3),
            Measure("srcc", "SRCC", "Spearman's correlation", decimals=3),
            Measure(
                "mse",
                "MSE",
                "mean squared error",
                decimals=3,
                higher_is_better=False,
                test=SignificanceTest(
                    "paired_z",
                    "paired z-test",
                    "squared errors",
                    "clips",
                    _test_errors,
                ),
            ),
        ),
        fields=(ItemField("score"), ItemField("label"), ItemField("held_out")),
        summarise=_summarise,
        card=_card,
        conditions=Conditions(
            names=CONDITIONS,
            of=_condition_of,
            title="type of noise",
            axis="type of noise",
            noun="type of noise",
            together="both types of noise",
            column="noise",
            note="Types of noise that training has heard, and the one that "
            "it has not.",
        ),
        items="clips",
        reference="label",
    )
)
