"""What is said of a quantized interface: a table, and a model card."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Outcome:
    """What became of an interface.

    Arguments
    ---------
    folder : Path
        The packed folder.
    source : str
        Folder or hub name that it was made from.
    cls : type
        Class that loads both.
    asked : str
        The budget.
    plan : BitPlan
        Bits of its clusters.
    bytes : dict of str -> int
        "source" and "packed": the files that were packed.
    divergence : float
        Of the packed interface's outputs on the calibration items.
    unit : str
        What the divergence is.
    quality : dict of str -> Quality
        "source" and "packed"; empty where the manifest has no reference.
    left_alone : list of dict
        Rows of the coverage table for parameters that stay in float.
    reasons : dict of str -> str
        Loadables that are no packed model, and why.

    Example
    -------
    >>> import torch
    >>> from speechbrain_mpq import quantize_
    >>> outcome = Outcome(
    ...     folder=Path("asr_4bit"),
    ...     source="asr",
    ...     cls=type,
    ...     asked="4bit",
    ...     plan=quantize_(torch.nn.Linear(8, 4), 4, exclude="bias"),
    ...     bytes={"source": 144, "packed": 36},
    ...     divergence=0.01,
    ...     unit="KL",
    ...     quality={},
    ...     left_alone=[{"reason": "biases", "parameters": 4}],
    ...     reasons={},
    ... )
    >>> for row in outcome_rows(outcome)[1:]:
    ...     print(row)
    ('files with weights, bytes', '144', '36')
    ('average bits of a quantized weight', '32', '4.00')
    ('KL', '0', '0.01')
    >>> outcome_notes(outcome)[1]
    '4 parameters stay in float: biases.'
    """

    folder: Path
    source: str
    cls: type
    asked: str
    plan: object
    bytes: dict
    divergence: float
    unit: str
    quality: dict
    left_alone: list
    reasons: dict


def outcome_rows(outcome):
    """The before/after table: name, source, packed.

    Arguments
    ---------
    outcome : Outcome
        What to show.

    Returns
    -------
    list of tuple of str
    """
    before, after = outcome.bytes["source"], outcome.bytes["packed"]
    rows = [
        ("", "source", "packed"),
        ("files with weights, bytes", f"{before}", f"{after}"),
        (
            "average bits of a quantized weight",
            "32",
            f"{outcome.plan.average_bits:.2f}",
        ),
        (outcome.unit, "0", f"{outcome.divergence:.4g}"),
    ]
    if outcome.quality:
        source, packed = outcome.quality["source"], outcome.quality["packed"]
        name = f"{source.name} ({source.count} items)"
        rows.append((name, f"{source.value:.2f}", f"{packed.value:.2f}"))
    return rows


def outcome_table(outcome):
    """The table as text, with what else there is to say below it.

    Arguments
    ---------
    outcome : Outcome
        What to show.

    Returns
    -------
    str
    """
    rows = outcome_rows(outcome)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{name:{widths[0]}}  {source:>{widths[1]}}  {packed:>{widths[2]}}"
        for name, source, packed in rows
    ]
    lines.insert(1, "-" * (sum(widths) + 4))
    return "\n".join([*lines, *outcome_notes(outcome)])


def outcome_notes(outcome):
    """What a user has to know beside the table.

    Arguments
    ---------
    outcome : Outcome
        What to show.

    Returns
    -------
    list of str
    """
    notes = []
    if not outcome.quality:
        notes.append(
            "No quality was measured: the manifest has no reference for it, "
            "or this class no measure. Only the outputs were compared."
        )
    left = Counter()
    for row in outcome.left_alone:
        left[row["reason"]] += row["parameters"]
    for reason, count in left.items():
        notes.append(f"{count} parameters stay in float: {reason}.")
    for name, reason in outcome.reasons.items():
        notes.append(f"Not quantized: {name} ({reason}).")
    return notes


def model_card(outcome):
    """README.md of the packed folder.

    Arguments
    ---------
    outcome : Outcome
        What to describe.

    Returns
    -------
    str
    """
    head, *rows = outcome_rows(outcome)
    table = ["| " + " | ".join(head) + " |", "|---|---|---|"]
    table += ["| " + " | ".join(row) + " |" for row in rows]
    bits = Counter()
    for cluster in outcome.plan.clusters.values():
        bits[cluster.bits] += cluster.parameters
    shares = ", ".join(f"{bits[b]} with {b} bits" for b in sorted(bits))
    notes = "\n".join(f"* {note}" for note in outcome_notes(outcome))
    return f"""# {outcome.folder.name}

Post-training mixed-precision quantization of `{outcome.source}` to a budget
of {outcome.asked}, made by speechbrain_mpq. Its licence is that of the source.

```python
from {outcome.cls.__module__} import {outcome.cls.__name__}

model = {outcome.cls.__name__}.from_hparams(source="{outcome.folder.name}")
```

needs `pip install speechbrain_mpq`: the .ckpt files with weights are packed
models (safetensors with bit-packed integers, no pickle), which a hook in
hyperparams.yaml reads. Once loaded, the model is an ordinary one in float32.

{chr(10).join(table)}

Parameters: {shares}.
`quantization_config.json` lists the bits of every tensor.

{notes}
"""
