"""Describe the tasks whose items are signals: separation, enhancement, quality.

A test item of separation is a mixture: `{"id", "angle", "si_snr",
"si_snr_mixture", "pesq", "reference", "hypothesis"}` and, where these were
recognised too, "hypothesis_mixture" and "hypothesis_target", which give
`wer_mixture` and `wer_target`. The angle is the one between the two speakers in
degrees.

An item of noise suppression is an utterance in noise and what the last exit
makes of it: `{"id", "noise", "si_snr", "si_snr_noisy", "pesq", "pesq_noisy",
"dnsmos", "dnsmos_noisy"}`. The card shows the other exits where the metadata of
a packed folder has "exits", {exit: averages}, and "noisy".

An item of speech quality is a clip: `{"id", "score", "label", "held_out"}`.
`score` is what a network says, `label` what it should, `held_out` whether
training has never heard the clip's type of noise.

PESQ and DNSMOS are None where they are undefined or were not measured.
"""

import math
from dataclasses import replace

from ..utils import BUCKETS
from .significance import mse, paired_z_test, pcc, srcc
from .task import (
    WER,
    CardText,
    Conditions,
    ItemField,
    Measure,
    SameInput,
    SignificanceTest,
    Task,
    count_word_errors,
    markdown_table,
    mean,
    register_task,
)

BUCKET_NAMES = tuple(f"{low}-{high}" for low, high in BUCKETS)
_USE_SEPARATION = """\
## How to use

It takes speechbrain_mpq, a plugin for SpeechBrain.

Safely, from this folder or from the hub (JSON and safetensors are read,
nothing is executed):

```python
from speechbrain_mpq import QuantizedSeparator

model = QuantizedSeparator.from_pretrained("FOLDER or user/name")
model.separate_file({{sample}}, doa=60,{lips} out="talker.wav")
```

In SpeechBrain's way, which executes what `hyperparams.yaml` says:

```python
model = QuantizedSeparator.from_hparams(source="FOLDER or user/name")
```

Into a module that is there already:

```python
from speechbrain_mpq import load_packed_

load_packed_(separator, "FOLDER")
```

The DOA is the direction of the talker in degrees from the array's axis: 0
towards the last microphone, 90 straight ahead. Recordings have 16 kHz and all
microphones of the array, or those that `model.microphones` names.
"""
_LIPS = """
`lips` are grey pictures of the talker's mouth, {height} x {width} pixels,
uint8, 25 a second from the first sample of the recording on: [pictures,
height, width]. Zeros are no picture, and `lips=None` none at all.
`speechbrain_mpq.vision.video` cuts them out of a video; `speechbrain-mpq
separate --track track.json --video talk.mp4` does that and the rest.
"""


def bucket_of(angle):
    """Find the bucket of an angle between two speakers."""
    for name, (low, high) in zip(BUCKET_NAMES, BUCKETS):
        if low <= angle < high or angle == high == 180:
            return name
    raise ValueError(f"an angle of {angle} degrees is not within 0 to 180")


def _bucket_of_item(item):
    """Name of the bucket of a test item."""
    return bucket_of(item["angle"])


def _summarise_separation(items):
    """Averages of the mixtures of one bucket; WER is in percent."""
    words = count_word_errors(items)
    pesq = [item["pesq"] for item in items if item["pesq"] is not None]
    block = {
        "n": len(items),
        "si_snr": mean([item["si_snr"] for item in items]),
        "si_snr_mixture": mean([item["si_snr_mixture"] for item in items]),
        "pesq": mean(pesq),
        "pesq_n": len(pesq),  # those with a PESQ
        "wer": words.rate if words.words else None,
        "words": words.words,
        "substitutions": words.substitutions,
        "deletions": words.deletions,
        "insertions": words.insertions,
        # The share where another talker than the target was separated
        "confusions": mean([item["si_snr"] < 0 for item in items]),
    }
    for signal in ("mixture", "target"):
        key = f"hypothesis_{signal}"
        recognised = all(item.get(key) is not None for item in items)
        if words.words and recognised:
            block[f"wer_{signal}"] = count_word_errors(items, key).rate
    return block


def _separation_card(config):
    """What the card of a separator says; other words where it has lips."""
    architecture = config.get("architecture") or {}
    visual = architecture.get("arguments", {}).get("visual")
    title = "Multichannel speech separator"
    about = (
        "Separates the talker in a given direction from the recording of a "
        "microphone\narray"
    )
    if visual:
        title += " with lips"
        about += ", and watches the talker's mouth where there is video"
    return CardText(
        title,
        f"{about}. Written by speechbrain_mpq.",
        _USE_SEPARATION.format(lips=" lips=lips," if visual else "")
        + (_LIPS.format(**visual) if visual else ""),
        ("speech-separation", "multi-channel"),
        "audio-to-audio",
    )


SEPARATION = register_task(
    Task(
        name="separation",
        measures=(
            Measure(
                "si_snr",
                "SI-SNR",
                unit="dB",
                unprocessed="si_snr_mixture",
                least_span=3,
            ),
            Measure(
                "pesq",
                "PESQ",
                beside="si_snr",
                axis="PESQ, wide band",
                least_span=0.5,
            ),
            replace(WER, unprocessed="wer_mixture"),
        ),
        fields=(
            ItemField("angle"),
            ItemField("si_snr"),
            ItemField("si_snr_mixture"),
            ItemField("pesq", optional=True),
            ItemField("reference", str, plural="references"),
            ItemField("hypothesis", str, plural="hypotheses"),
        ),
        summarise=_summarise_separation,
        card=_separation_card,
        conditions=Conditions(
            names=BUCKET_NAMES,
            of=_bucket_of_item,
            title="angle between the speakers",
            axis="angle between the speakers, degrees",
            noun="angle bucket",
            together="the four angle buckets",
            column="angle",
            note="Angle between the talkers, in degrees.",
        ),
        items="mixtures",
        unprocessed="mixture",
        same_input=SameInput(
            "si_snr_mixture",
            0.01,  # dB
            "mixtures of the same words: theirs have another SI-SNR before "
            "separation",
        ),
        counts=("words",),
        speed="s/hour",
    )
)


_USE_ENHANCEMENT = """\
## How to use

It takes speechbrain_mpq, a plugin for SpeechBrain (JSON and safetensors are
read, nothing is executed):

```
speechbrain-mpq enhance noisy.wav -o clean.wav --exit {first} \\
    --model "FOLDER or user/name"
```

```python
from speechbrain_mpq import SpeechEnhancer

model = SpeechEnhancer.from_pretrained("FOLDER or user/name")
model.enhance_file({{sample}}, "clean.wav", exit={last})
stream = model.stream(exit="auto")  # an exit for each frame
```

Its exits are {exits}: the earlier, the fewer multiplications. It works at 16
kHz, on frames of 32 ms, and needs 32 ms of delay.
"""


def _summarise_enhancement(items):
    """Averages of one exit; counts of the utterances that have a score."""
    block = {"n": len(items)}
    for key in ("si_snr", "pesq", "dnsmos"):
        for name in (key, f"{key}_noisy"):
            values = [
                item[name] for item in items if item.get(name) is not None
            ]
            block[name] = mean(values)
            if name == key and key != "si_snr":
                block[f"{key}_n"] = len(values)
    return block


def _exits_table(metadata):
    """Heading and table of all exits, where they were measured."""
    exits, noisy = metadata.get("exits"), metadata.get("noisy", {})
    if not exits:
        return ""
    rows = [
        ("noisy", "", *_enhancement_cells(noisy)),
        *(
            (exit, f"{scores['macs'] / 1e6:.2f} M", *_enhancement_cells(scores))
            for exit, scores in exits.items()
        ),
    ]
    header = ("exit", "multiplications a frame", "PESQ", "SI-SNR dB", "DNSMOS")
    return f"## What each exit does\n\n{markdown_table(header, rows)}\n"


def _enhancement_cells(scores):
    """Cells of the measures."""
    values = [scores.get(key) for key in ("pesq", "si_snr", "dnsmos")]
    return ["-" if value is None else f"{value:.2f}" for value in values]


def _enhancement_card(config):
    """What the card of an enhancer says."""
    architecture = config.get("architecture") or {}
    exits = architecture.get("arguments", {}).get("exits") or [5]
    shown = _exits_table(config.get("metadata") or {})
    return CardText(
        title="Noise suppression with early exits"
        if len(exits) > 1
        else "Noise suppression",
        about="nsNet2, a causal network that multiplies a noisy spectrum by a "
        "mask. Written\nby speechbrain_mpq.",
        use=shown
        + _USE_ENHANCEMENT.format(
            exits=", ".join(map(str, exits)),
            # the very first may cost more speech than noise
            first=exits[min(1, len(exits) - 1)],
            last=exits[-1],
        ),
        tags=("speech-enhancement", "noise-suppression", "early-exit"),
    )


ENHANCEMENT = register_task(
    Task(
        name="noise suppression",
        measures=(
            Measure(
                "pesq",
                "PESQ",
                axis="PESQ, wide band",
                unprocessed="pesq_noisy",
                least_span=0.5,
            ),
            Measure(
                "si_snr",
                "SI-SNR",
                unit="dB",
                unprocessed="si_snr_noisy",
                least_span=3,
            ),
            Measure(
                "dnsmos",
                "DNSMOS",
                axis="DNSMOS P.808",
                unprocessed="dnsmos_noisy",
                least_span=0.5,
            ),
        ),
        fields=(
            ItemField("noise", str),
            ItemField("si_snr"),
            ItemField("si_snr_noisy"),
            ItemField("pesq", optional=True),
            ItemField("dnsmos", optional=True),
        ),
        summarise=_summarise_enhancement,
        card=_enhancement_card,
        items="utterances",
        reference="id",
        unprocessed="noisy",
    )
)


CONDITIONS = ("heard", "held out")

_USE_QUALITY = """\
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


def _summarise_quality(items):
    """Correlations, None where they are undefined, and the squared error."""
    if not items:
        return {"n": 0, "pcc": None, "srcc": None, "mse": None}
    scores = [item["score"] for item in items]
    labels = [item["label"] for item in items]
    values = {f.__name__: f(scores, labels) for f in (pcc, srcc, mse)}
    defined = {k: v if math.isfinite(v) else None for k, v in values.items()}
    return {"n": len(items), **defined}


def _test_quality(pairs):
    """Paired z-test of two networks' squared errors, two-tailed."""
    differences = [
        (own["score"] - own["label"]) ** 2
        - (other["score"] - other["label"]) ** 2
        for own, other in pairs
    ]
    z, p, clips, *_ = paired_z_test(differences)
    return {"z": z, "p": p, "clips": clips}


def _quality_card(config):
    """What the card of a quality predictor says."""
    architecture = config.get("architecture") or {}
    binary = architecture.get("class") == "BinaryDNSMOS"
    how = "with binary activation maps" if binary else "in float"
    return CardText(
        title="Speech quality predictor"
        + (" with binary activation maps" if binary else ""),
        about="Predicts the quality of speech, without a reference, from a "
        f"log-mel spectrogram,\n{how}. Written by speechbrain_mpq.",
        use=_USE_QUALITY,
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
                    _test_quality,
                ),
            ),
        ),
        fields=(
            ItemField("score"),
            ItemField("label"),
            ItemField("held_out", bool),
        ),
        summarise=_summarise_quality,
        card=_quality_card,
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
