"""Write model cards: README.md of a packed folder, as the hub reads it.

Here is what a card says of any packed model: front matter, title, numbers and
bit plan. What it says of a task or of a kind of model comes as sections.
"""

from collections import defaultdict

import yaml

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
    head = f"# {title}\n\n{about}\n\n{table(('', ''), numbers)}"
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


def table(header, rows):
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[str(c).replace("|", "\\|") for c in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def _front_matter(plan, tags, base_model=None, **matter):
    """What the hub reads of a card."""
    tags = ["speechbrain_mpq", *map(str, tags)]
    if plan:
        tags += ["quantized", f"{bits_word(plan['average_bits'])}-bit"]
        bits = {cluster["bits"] for cluster in plan["clusters"].values()}
        tags += ["mixed-precision"] if len(bits) > 1 else []
    known = {key: value for key, value in matter.items() if value is not None}
    if plan and base_model is not None:
        known["base_model"] = base_model
        known["base_model_relation"] = "quantized"
    text = yaml.safe_dump(
        {
            "library_name": "speechbrain",
            **known,
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
    return "## Bit plan\n\n" + table(
        ("bits", "clusters", "weights", "share"), rows
    )


def _share(part, total):
    """A part in percent."""
    return f"{100 * part / total:.1f} %"
