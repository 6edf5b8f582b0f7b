"""Describe the noise suppression task: quality of the speech that is left.

A test item is an utterance in noise and what the last exit makes of it:
`{"id", "noise", "si_snr", "si_snr_noisy", "pesq", "pesq_noisy", "dnsmos",
"dnsmos_noisy"}`. PESQ and DNSMOS are None where they are undefined or were not
measured. The card shows the other exits where the metadata of a packed folder
has "exits", {exit: averages}, and "noisy".
"""

from .task import (
    CardText,
    ItemField,
    Measure,
    Task,
    markdown_table,
    mean,
    register_task,
)

_USE = """\
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


def _summarise(items):
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
        ("noisy", "", *_cells(noisy)),
        *(
            (exit, f"{scores['macs'] / 1e6:.2f} M", *_cells(scores))
            for exit, scores in exits.items()
        ),
    ]
    header = ("exit", "multiplications a frame", "PESQ", "SI-SNR dB", "DNSMOS")
    return f"## What each exit does\n\n{markdown_table(header, rows)}\n"


def _cells(scores):
    """Cells of the measures."""
    values = [scores.get(key) for key in ("pesq", "si_snr", "dnsmos")]
    return ["-" if value is None else f"{value:.2f}" for value in values]


def _card(config):
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
        + _USE.format(
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
        summarise=_summarise,
        card=_card,
        items="utterances",
        reference="id",
        unprocessed="noisy",
    )
)
