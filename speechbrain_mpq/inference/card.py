"""Write a model card: what a packed model is for and how good it is.

The `Task` says what the model is for, how it is called and what its measures
are; `write_card` composes what any packed model has: front matter, title,
numbers and bit plan. An array is drawn as text: seen from above by somebody
who stands behind it and looks ahead, to 90 degrees, microphone 1 to the left,
0 degrees to the right.

Beside a card stands a recording to hear, and what the model makes of it. Its
direction and licence are comments inside the FLAC file, so that a card that is
written again still has them.
"""

from collections import defaultdict
from pathlib import Path
from textwrap import wrap

import numpy as np
import soundfile
import yaml

from ..evaluation.signal_tasks import SEPARATION
from ..evaluation.task import markdown_table
from ..lobes.models.spatial_features import LINEAR_15_SPACINGS, used_microphones
from ..utils import SAMPLE_RATE, atomic_write
from .audio import system_path

SAMPLE_FILE = "sample.flac"  # a recording of the microphones
SEPARATED_FILE = "sample_separated.flac"  # one talker of it


CARDS = {}  # class of a network -> its `CardText`, where it has one of its own
COLUMNS = 56  # of the drawing at most; the shipped array has one a centimetre
PLANAR_COLUMNS = 16  # to either side of a planar array's middle
USED, UNUSED = "#", "o"
_END = (
    "The bytes of the file are explained in docs/packed_format.md of "
    "speechbrain_mpq;\n`speechbrain-mpq verify FOLDER` checks them. The "
    "checksum guards against damage,\nnot against an author who means "
    "ill.\n"
)


def model_card(
    config,
    model_bytes,
    metrics=None,
    reference=None,
    base_model=None,
    license="apache-2.0",
    sample=None,
    task=SEPARATION,
):
    """Write the text of README.md.

    Arguments
    ---------
    config : dict
        Content of quantization_config.json.
    model_bytes : int
        Size of model.safetensors.
    metrics : dict or None
        Content of metrics.json.
    reference : dict or None
        The same of the model in full precision.
    base_model : str or None
        Name of the model that was quantized.
    license : str
        Name of the license, as the hub has it.
    sample : dict or None
        Of the recording beside the card, from `read_sample`.
    task : Task
        What the model does and is scored by.

    Returns
    -------
    str
        Markdown with the front matter that the hub reads.

    Example
    -------
    >>> config = {"plan": {"average_bits": 4.0, "clusters": {}}}
    >>> print(model_card(config, 2**20, base_model="separator_mini")[:136])
    ---
    library_name: speechbrain
    license: apache-2.0
    pipeline_tag: audio-to-audio
    base_model: separator_mini
    base_model_relation: quantized
    """
    plan, card = config.get("plan"), _card_text(config, task)
    average_bits = plan["average_bits"] if plan else 32
    bits = bits_word(average_bits)
    if metrics:  # what a recipe does not say is known from the file
        known = {"average_bits": average_bits, "model_bytes": model_bytes}
        metrics = {**known, **metrics}
    return write_card(
        f"{card.title}, {bits} bits",
        card.about,
        _numbers(config, model_bytes, metrics or {}),
        [
            *([_results(task, metrics, reference)] if metrics else []),
            _use(card, sample),
            *_sample(sample),
            *_array(config.get("architecture")),
        ],
        plan,
        card.end or _END,
        license=license,
        pipeline_tag=card.pipeline_tag,
        base_model=base_model,
        tags=card.tags,
    )


def _card_text(config, task):
    """What is said of the class that a configuration names, or of a task."""
    name = (config.get("architecture") or {}).get("class")
    return CARDS.get(name) or task.card(config)


def _numbers(config, model_bytes, metrics):
    """The numbers of the file, and where it comes from."""
    plan = config.get("plan")
    rows = [
        ("average bits of a weight", f"{plan['average_bits']:.3f}")
        if plan
        else ("bits of a weight", "32 (full precision)"),
        ("`model.safetensors`", size_word(model_bytes)),
    ]
    whole = metrics.get("fp32_bytes")
    if whole:
        rows.append(("full precision", size_word(whole)))
        rows.append(("times smaller", f"{whole / model_bytes:.1f}"))
    names = {
        "system": "bits chosen by",
        "estimator": "weights estimated by",
        "corpus": "corpus",
        "seed": "seed",
    }
    values = {**config.get("metadata", {}), **metrics}
    return rows + [
        (label, str(values[key]))
        for key, label in names.items()
        if values.get(key) is not None
    ]


def _results(task, metrics, reference):
    """Quality, against full precision and by condition."""
    systems = {"this model": metrics}
    if reference:
        systems["full precision"] = reference
    titles = [measure.title for measure in task.measures]
    rows, sizes = [], [s.get("model_bytes") or 0 for s in systems.values()]
    small = max(sizes) < SMALL
    unit, title = (KIB, "KiB") if small else (MIB, "MiB")
    for (name, system), size in zip(systems.items(), sizes):
        size = f"{size / unit:.{1 if small else 2}f}" if size else "-"
        bits = bits_word(system.get("average_bits", 32))
        rows.append((name, bits, size, *_quality(task, system["average"])))
    parts = ["## Results\n"]
    overall = markdown_table(("system", "bits", title, *titles), rows)
    if task.conditions:
        parts[0] += f"\nMean of {task.conditions.together} below.\n"
        parts += [overall, *_by_condition(task, systems, titles)]
    else:
        parts.append(overall)
    test = task.tested and task.tested.test
    outcome = metrics.get(test.key) if test else None
    if outcome:
        parts.append(
            f"{test.counted.capitalize()} against {outcome['against']} "
            f"({test.name}): p = {outcome['p']:.3g} over "
            f"{outcome[test.samples]} {test.samples}.\n"
        )
    return "\n".join(parts)


def _by_condition(task, systems, titles):
    """Heading and table of the quality in each condition."""
    names = next(iter(systems.values()))["buckets"]
    rows = [
        (name, system, *_quality(task, metrics["buckets"][name]))
        for name in names
        for system, metrics in systems.items()
        if name in metrics["buckets"]
    ]
    header = (task.conditions.column, "system", *titles)
    return [f"{task.conditions.note}\n", markdown_table(header, rows)]


def _quality(task, scores):
    """Cells of the measures."""
    return [
        "-"
        if scores.get(measure.key) is None
        else f"{scores[measure.key]:.{measure.decimals}f}"
        for measure in task.measures
    ]


def _use(card, sample):
    """How the model is called, on the sample where there is one."""
    if sample is None:
        return card.use.replace("{sample}", '"recording.wav"')
    use = card.use.replace("{sample}", f'"{SAMPLE_FILE}"')
    if sample["doa"] is None:
        return use
    return use.replace("doa=60", f"doa={sample['doa']:g}")


def _sample(sample):
    """Heading and words of the recording to hear, where there is one."""
    if sample is None or sample["doa"] is None:
        return []
    channels = sample["channels"]
    return [
        f"## To hear\n\n* [`{SAMPLE_FILE}`]({SAMPLE_FILE}): "
        f"{sample['title']}, {channels} microphones; the talker at "
        f"{sample['doa']:g} degrees is\n* [`{SEPARATED_FILE}`]"
        f"({SEPARATED_FILE}), separated by this model.\n\n"
        f"Licence of both: {sample['license']}.\n"
    ]


def _array(architecture):
    """Heading and drawing of the microphone array, where there is one."""
    array = array_of(architecture)
    if array is None:
        return []
    drawing = "\n".join(draw_array(**array))
    return [f"## The array\n\n```\n{drawing}\n```\n"]


def array_of(architecture):
    """Read a separator's array from its description."""
    arguments = (architecture or {}).get("arguments", {})
    features = arguments.get("features")
    if not isinstance(features, dict) or "pairs" not in features["arguments"]:
        return None
    settings = features["arguments"]
    microphones = used_microphones(settings["pairs"])
    if settings.get("positions_cm"):
        positions = [list(place) for place in settings["positions_cm"]]
        return {"positions_cm": positions, "microphones": microphones}
    spacings = settings.get("spacings_cm") or LINEAR_15_SPACINGS
    return {"spacings_cm": list(spacings), "microphones": microphones}


def draw_array(spacings_cm=None, microphones=(), positions_cm=None):
    """Draw an array with its directions, to scale."""
    if positions_cm is not None:
        return _draw_planar(positions_cm, microphones)
    places = [0.0]
    for gap in spacings_cm:
        places.append(places[-1] + gap)
    scale = COLUMNS / max(places[-1], 1e-9)
    columns = [round(place * scale) for place in places]
    row = ["-"] * (COLUMNS + 1)
    for number in range(1, len(columns) + 1):
        if number not in microphones:
            row[columns[number - 1]] = UNUSED
    for number in microphones:
        row[columns[number - 1]] = USED
    used = [(columns[n - 1], n, places[n - 1]) for n in microphones]
    ahead = "90° straight ahead"
    return [
        " " * 6 + ahead.center(COLUMNS + 1).rstrip(),
        f"180°  {''.join(row)}  0°",
        f"mic   {_labels((column, f'{n}') for column, n, _ in used)}",
        f"cm    {_labels((column, f'{cm:g}') for column, _, cm in used)}",
        "",
        f"Seen from above; {USED} used, {UNUSED} not used by this model.",
        *_in_words(spacings_cm, microphones),
    ]


def _draw_planar(positions_cm, microphones):
    """Draw a planar array from above; letters are twice as high as wide."""
    x, y = zip(*positions_cm)
    middle = (min(x) + max(x)) / 2, (min(y) + max(y)) / 2
    extent = max(max(x) - min(x), max(y) - min(y)) / 2
    rows = [[" "] * (2 * PLANAR_COLUMNS + 1) for _ in range(PLANAR_COLUMNS + 1)]
    for number, (right, up) in enumerate(positions_cm, 1):
        column = round(PLANAR_COLUMNS * (1 + (right - middle[0]) / extent))
        row = round(PLANAR_COLUMNS / 2 * (1 - (up - middle[1]) / extent))
        label = str(number) if number in microphones else UNUSED
        for place, letter in enumerate(label, column):
            if place < len(rows[row]):
                rows[row][place] = letter
    drawn = ["".join(row).rstrip() for row in rows]
    half, width = len(drawn) // 2, 2 * PLANAR_COLUMNS + 1
    lines = [
        f"{'180°' if index == half else '':6}{line}"
        + ("  0°".rjust(width - len(line) + 4) if index == half else "")
        for index, line in enumerate(drawn)
    ]
    places = ", ".join(f"({right:g}, {up:g})" for right, up in positions_cm)
    used = ", ".join(map(str, microphones))
    return [
        " " * 6 + "90°".center(width).rstrip(),
        *(line.rstrip() for line in lines),
        " " * 6 + "270°".center(width).rstrip(),
        "",
        f"Seen from above; numbers used, {UNUSED} not used by this model.",
        *wrap(
            f"{len(positions_cm)} microphones at {places} cm; used: {used}.", 80
        ),
    ]


def _labels(labels):
    """Words where they belong, as far as there is room."""
    row = ""
    for column, word in labels:
        if not row or column > len(row):
            row = row.ljust(column) + word
    return row


def _in_words(spacings_cm, microphones):
    """The numbers of the drawing, on lines of 80 columns."""
    gaps = ", ".join(f"{gap:g}" for gap in spacings_cm)
    used = ", ".join(map(str, microphones))
    return wrap(
        f"{len(spacings_cm) + 1} microphones, {gaps} cm apart; used: {used}.",
        80,
    )


KIB, MIB = 2**10, 2**20  # bytes
SMALL = MIB // 10  # below it, MiB of two digits say little


def write_card(
    title, about, numbers, sections, plan=None, end="", tags=(), **matter
):
    """Compose the text of README.md.

    Arguments
    ---------
    title, about : str
        Heading, and what stands below it, Markdown.
    numbers : list of (str, str)
        Rows of the first table: what, and how much.
    sections : list of str
        What follows, Markdown.
    plan : dict or None
        Content of plan.json, see `BitPlan.to_dict`; None: full precision.
    end : str
        Last paragraph, Markdown.
    tags : sequence of str
        For the hub, besides those of every packed model.
    **matter : dict
        What else the hub reads, such as `license` and `pipeline_tag`;
        `base_model` is the name of the model that was quantized. None: not
        known.

    Returns
    -------
    str
        Markdown with the front matter that the hub reads.

    Example
    -------
    >>> print(write_card("Tagger", "Tags.", [("bits", "32")], [], tags=["x"]))
    ---
    library_name: speechbrain
    tags:
    - speechbrain_mpq
    - x
    ---
    <BLANKLINE>
    # Tagger
    <BLANKLINE>
    Tags.
    <BLANKLINE>
    |  |  |
    | --- | --- |
    | bits | 32 |
    <BLANKLINE>
    """
    head = f"# {title}\n\n{about}\n\n{markdown_table(('', ''), numbers)}"
    parts = [_front_matter(plan, tags, **matter), head, *sections]
    parts += [_plan_table(plan)] if plan else []
    return "\n".join([*parts, *([end] if end else [])])


def bits_word(bits):
    """Average bits as people say them, up to two digits."""
    return f"{bits:.1f}".removesuffix(".0")


def size_word(count):
    """Bytes, and MiB or KiB."""
    if count < SMALL:
        return f"{count:,} bytes ({count / KIB:.1f} KiB)"
    return f"{count:,} bytes ({count / MIB:.2f} MiB)"


def _front_matter(plan, tags, base_model=None, **matter):
    """What the hub reads of a card."""
    tags = ["speechbrain_mpq", *map(str, tags)]
    if plan:
        tags += ["quantized", f"{bits_word(plan['average_bits'])}-bit"]
        bits = {cluster["bits"] for cluster in plan["clusters"].values()}
        tags += ["mixed-precision"] if len(bits) > 1 else []
    fields = {key: value for key, value in matter.items() if value is not None}
    if plan and base_model is not None:
        fields["base_model"] = base_model
        fields["base_model_relation"] = "quantized"
    text = yaml.safe_dump(
        {
            "library_name": "speechbrain",
            **fields,
            "tags": list(dict.fromkeys(tags)),
        },
        sort_keys=False,
        allow_unicode=True,
    )
    return f"---\n{text}---\n"


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
    return "## Bit plan\n\n" + markdown_table(
        ("bits", "clusters", "weights", "share"), rows
    )


def _share(part, total):
    """A part in percent."""
    return f"{100 * part / total:.1f} %"


MOST_SECONDS = 2.5  # half a megabyte with seven microphones
MOST_CHANNELS = 8  # of FLAC
LICENSE = "Apache-2.0"  # of the embedded corpus, as of all that makes it


def write_sample(folder, mixture, separated, doa, title, license=LICENSE):
    """Write a mixture and its separated talker as FLAC files.

    Arguments
    ---------
    folder : str or Path
        Packed folder.
    mixture : array
        [samples, microphones], 16 kHz, full scale 1; the loudest 2.5 seconds
        of it are kept.
    separated : array
        [samples], at any level.
    doa : float
        Direction of the talker in degrees.
    title : str
        What is heard.
    license : str
        Of the recording.

    Returns
    -------
    bool
        False where FLAC has not as many channels: nothing is written.

    Example
    -------
    >>> folder = getfixture("tmpdir")
    >>> noise = np.random.default_rng(0).standard_normal((16000, 2)) / 9
    >>> write_sample(folder, noise, noise[:, 0], 62.5, "noise")
    True
    >>> read_sample(folder)
    {'doa': 62.5, 'title': 'noise', 'license': 'Apache-2.0', 'channels': 2}
    """
    mixture, separated = np.asarray(mixture), np.asarray(separated)
    if mixture.shape[1] > MOST_CHANNELS:
        return False
    part = _loudest(separated)
    peak = np.abs(separated).max(initial=1e-9)
    level = np.abs(mixture[part]).max(initial=1e-9)
    tags = {"title": title, "license": license, "comment": f"doa={doa:g}"}
    for name, signal in (
        (SAMPLE_FILE, mixture[part]),
        (SEPARATED_FILE, 0.9 * min(level, 1.0) / peak * separated[part]),
    ):
        with (
            atomic_write(Path(folder, name)) as written,
            soundfile.SoundFile(
                system_path(written),
                "w",
                SAMPLE_RATE,
                channels=1 if signal.ndim == 1 else signal.shape[1],
                format="FLAC",
                subtype="PCM_16",
            ) as file,
        ):
            for key, value in tags.items():
                setattr(file, key, value)
            file.write(signal)
    return True


def read_sample(folder):
    """Read what the sample of a folder says of itself; None without one."""
    path = Path(folder, SAMPLE_FILE)
    try:
        with soundfile.SoundFile(system_path(path)) as file:
            key, _, doa = file.comment.partition("=")
            tags = {"title": file.title, "license": file.license}
            channels = file.channels
    except (OSError, soundfile.LibsndfileError):
        return None
    has_doa = key == "doa" and doa.replace(".", "", 1).isdigit()
    return {
        "doa": float(doa) if has_doa else None,
        **tags,
        "channels": channels,
    }


def _loudest(signal):
    """The window of a signal that has most of its energy."""
    samples = round(MOST_SECONDS * SAMPLE_RATE)
    if len(signal) <= samples:
        return slice(0, len(signal))
    energy = np.concatenate([[0.0], np.cumsum(np.square(signal, dtype=float))])
    first = int(np.argmax(energy[samples:] - energy[:-samples]))
    return slice(first, first + samples)
