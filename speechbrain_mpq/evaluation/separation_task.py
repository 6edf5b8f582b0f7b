"""Describe the separation task: one talker out of two, by direction.

A test item is a mixture: `{"id", "angle", "si_snr", "si_snr_mixture", "pesq",
"reference", "hypothesis"}` and, where these were recognised too,
"hypothesis_mixture" and "hypothesis_target", which give `wer_mixture` and
`wer_target`. The angle is the one between the two speakers in degrees; `pesq`
is None where it is undefined or was not measured.
"""

from dataclasses import replace

from ..utils import BUCKETS
from .task import (
    WER,
    CardText,
    Conditions,
    ItemField,
    Measure,
    SameInput,
    Task,
    count_word_errors,
    mean,
    register_task,
)

BUCKET_NAMES = tuple(f"{low}-{high}" for low, high in BUCKETS)
_USE = """\
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


def _summarise(items):
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
        known = all(item.get(key) is not None for item in items)
        if words.words and known:
            block[f"wer_{signal}"] = count_word_errors(items, key).rate
    return block


def _card(config):
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
        _USE.format(lips=" lips=lips," if visual else "")
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
        summarise=_summarise,
        card=_card,
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
