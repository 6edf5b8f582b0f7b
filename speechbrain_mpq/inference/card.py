"""The model card: README.md of a packed folder, from plain dictionaries.

What is said of a class of models, and how one is used, comes from its
`CardText`; sizes, results and the bit plan are told of all alike.
"""

from collections import defaultdict
from dataclasses import dataclass

import yaml

MIB = 2**20  # bytes


@dataclass(frozen=True)
class CardText:
    """What a model card says of a class of models.

    Arguments
    ---------
    title : str
        Headline, as "Speech enhancer".
    about : str
        One or two sentences, with a line feed at their end.
    use : str
        Markdown from "## How to use" on; `{sample}` in it becomes the name of
        a recording.
    tags : tuple of str
        For the hub, beside those of speechbrain_mpq.
    task : str
        The hub's word for what it does.

    Example
    -------
    >>> CardText("Speech enhancer", "Takes noise away.\\n").task
    'audio-to-audio'
    """

    title: str
    about: str
    use: str = ""
    tags: tuple = ()
    task: str = "audio-to-audio"


_SEPARATOR_USE = """\
## How to use

It takes speechbrain_mpq, a plugin for SpeechBrain.

Safely, from this folder or from the hub (JSON and safetensors are read,
nothing is executed):

```python
from speechbrain_mpq import QuantizedSeparator

model = QuantizedSeparator.from_pretrained("FOLDER or user/name")
{call}
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


_CALL = 'model.separate_file({sample}, doa=60, out="talker.wav")'
_CALL_WITH_LIPS = (
    'model.separate_file({sample}, doa=60, lips=lips, out="talker.wav")'
)


_LIPS = """\
`lips` are grey pictures of the talker's mouth, {height} x {width} pixels,
uint8, 25 a second from the first sample of the recording on: [pictures,
height, width]. Zeros are no picture, and `lips=None` none at all.
`speechbrain_mpq.vision.mouth` cuts them out of a video; `speechbrain-mpq
separate --track track.json --video talk.mp4` does that and the rest.
"""


def _separator_text(arguments):
    """What is said of a separator, with or without a lip stream."""
    visual = arguments.get("visual")
    call = _CALL_WITH_LIPS if visual else _CALL
    watches = ", and watches the talker's mouth where there is video"
    return CardText(
        f"Multichannel speech separator{' with lips' if visual else ''}",
        "Separates the talker in a given direction from the recording of a "
        f"microphone\narray{watches if visual else ''}.",
        _SEPARATOR_USE.format(call=call)
        + (f"\n{_LIPS.format(**visual)}" if visual else ""),
        ("speech-separation", "multi-channel"),
    )


# Class name -> CardText, or what makes one of a model's arguments
CARDS = {"Separator": _separator_text}
_NO_TEXT = CardText("Packed model", "Speech model.")


def model_card(
    config,
    model_bytes,
    metrics=None,
    reference=None,
    base_model=None,
    license="apache-2.0",
    has_sample=False,
):
    """Compose the model card, the text of README.md.

    Arguments
    ---------
    config : dict
        Content of quantization_config.json.
    model_bytes : int
        Size of model.safetensors.
    metrics : dict or None
        Content of metrics.json.
    reference : dict or None
        The same of the full-precision system, on the same test set.
    base_model : str or None
        What was quantized: a name on the hub or one that readers know. Left
        out where nothing is quantized.
    license : str
        Of the weights, as the hub writes it.
    has_sample : bool
        Whether there is a sample.flac.

    Returns
    -------
    str

    Example
    -------
    >>> config = {"plan": {"average_bits": 3.998, "bytes": 1, "clusters": {}}}
    >>> print(model_card(config, 2**20, base_model="separator_mini")[:136])
    ---
    library_name: speechbrain
    license: apache-2.0
    pipeline_tag: audio-to-audio
    base_model: separator_mini
    base_model_relation: quantized
    """
    plan, text = config.get("plan"), _card_text(config)
    sample = '"sample.flac"' if has_sample else '"recording.wav"'
    parts = [
        _front_matter(plan, base_model, license, text),
        _summary(config, model_bytes, metrics, text),
        *([_results(metrics, reference)] if metrics else []),
        *([text.use.replace("{sample}", sample)] if text.use else []),
        *([_plan_table(plan)] if plan else []),
        "The bytes of the file are explained in docs/packed_format.md of "
        "speechbrain_mpq;\n`speechbrain-mpq verify FOLDER` checks them. The "
        "checksum guards against damage,\nnot against an author who means "
        "ill.\n",
    ]
    return "\n".join(parts)


def _bits_word(bits):
    """Average bits as people say them, up to two digits."""
    return f"{bits:.1f}".removesuffix(".0")


def _card_text(config):
    """The text of the class that a configuration names."""
    architecture = config.get("architecture") or {}
    # Formats without an architecture were separators' only
    text = CARDS.get(architecture.get("class", "Separator"), _NO_TEXT)
    return text(architecture.get("arguments", {})) if callable(text) else text


def _front_matter(plan, base_model, license, text):
    """What the hub reads of a card."""
    tags = ["speechbrain_mpq", *text.tags]
    if plan:
        tags += ["quantized", f"{_bits_word(plan['average_bits'])}-bit"]
        bits = {cluster["bits"] for cluster in plan["clusters"].values()}
        tags += ["mixed-precision"] if len(bits) > 1 else []
    matter = {
        "library_name": "speechbrain",
        "license": license,
        "pipeline_tag": text.task,
    }
    if plan and base_model is not None:
        matter["base_model"] = base_model
        matter["base_model_relation"] = "quantized"
    text = yaml.safe_dump({**matter, "tags": tags}, sort_keys=False)
    return f"---\n{text}---\n"


def _summary(config, model_bytes, metrics, text):
    """Title and the numbers of the file."""
    plan, metrics = config.get("plan"), metrics or {}
    bits = _bits_word(plan["average_bits"]) if plan else "32"
    rows = [
        ("average bits of a weight", f"{plan['average_bits']:.3f}")
        if plan
        else ("bits of a weight", "32 (full precision)"),
        ("`model.safetensors`", _size(model_bytes)),
    ]
    whole = metrics.get("fp32_bytes")
    if whole:
        rows.append(("full precision", _size(whole)))
        rows.append(("times smaller", f"{whole / model_bytes:.1f}"))
    names = {
        "system": "bits chosen by",
        "estimator": "weights estimated by",
        "corpus": "corpus",
        "seed": "seed",
    }
    values = {**config.get("metadata", {}), **metrics}
    rows += [
        (label, str(values[key]))
        for key, label in names.items()
        if values.get(key) is not None
    ]
    title = f"# {text.title}, {bits} bits\n\n"
    about = f"{text.about.rstrip()} Written by speechbrain_mpq.\n\n"
    return title + about + _table(("", ""), rows)


def _results(metrics, reference):
    """Quality, against full precision and by angle."""
    systems = {"this model": metrics}
    if reference:
        systems["full precision"] = reference
    rows = []
    for name, system in systems.items():
        size = system.get("model_bytes")
        size = f"{size / MIB:.2f}" if size else "-"
        bits = _bits_word(system.get("average_bits", 32))
        rows.append((name, bits, size, *_quality(system["average"])))
    parts = [
        "## Results\n\nMean of the four angle buckets below.\n",
        _table(("system", "bits", "MiB", *_QUALITY), rows),
        "Angle between the talkers, in degrees.\n",
        _table(
            ("angle", "system", *_QUALITY),
            [
                (angle, name, *_quality(system["buckets"][angle]))
                for angle in metrics["buckets"]
                for name, system in systems.items()
                if angle in system["buckets"]
            ],
        ),
    ]
    test = metrics.get("mapsswe")
    if test:
        parts.append(
            f"Word errors against {test['against']} (MAPSSWE): p = "
            f"{test['p']:.3g} over {test['segments']} segments.\n"
        )
    return "\n".join(parts)


_QUALITY = ("SI-SNR dB", "PESQ", "WER %")


def _quality(scores):
    """Cells of the three measures."""
    digits = {"si_snr": 2, "pesq": 2, "wer": 1}
    return [
        "-" if scores.get(key) is None else f"{scores[key]:.{count}f}"
        for key, count in digits.items()
    ]


def _plan_table(plan):
    """How many clusters and weights have which bits."""
    clusters, weights = defaultdict(int), defaultdict(int)
    for cluster in plan["clusters"].values():
        clusters[cluster["bits"]] += 1
        weights[cluster["bits"]] += cluster["parameters"]
    rest = plan.get("rest_parameters", 0)
    total = sum(weights.values()) + rest
    rows = [
        (str(b), str(clusters[b]), f"{weights[b]:,}", _share(weights[b], total))
        for b in sorted(clusters)
    ]
    if rest:
        rows.append(("32 (left alone)", "-", f"{rest:,}", _share(rest, total)))
    return "## Bit plan\n\n" + _table(
        ("bits", "clusters", "weights", "share"), rows
    )


def _share(part, total):
    """A part in percent."""
    return f"{100 * part / total:.1f} %"


def _size(count):
    """Bytes, and MiB."""
    return f"{count:,} bytes ({count / MIB:.2f} MiB)"


def _table(header, rows):
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[str(c).replace("|", "\\|") for c in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"
