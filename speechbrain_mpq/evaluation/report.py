"""The report page of one experiment: one HTML file with all it shows."""

from functools import partial

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError(
        'the report needs matplotlib: pip install "speechbrain_mpq[evaluate]"'
    ) from error

from .bit_plots import bits_per_cluster, sensitivity_map
from .examples import example_section
from .files import write_text
from .media import picture
from .page import page, tag, text
from .plots import quality_by_bucket
from .plots import training_curve as draw_training
from .table import bits_text, table_cells, table_notes
from .verdict import label, size_text, verdict


def write_report(
    path, metrics, plan=None, scores=None, examples=(), training_curve=None
):
    """Write the report of a system and its baselines as one HTML file.

    Arguments
    ---------
    path : str | Path
        The file; its folder must exist.
    metrics : list[dict]
        Contents of metrics.json: the system first, then baselines such as
        full and uniform precision, all scored on one test set.
    plan : dict | None
        Content of plan.json.
    scores : dict | None
        Content of scores.json.
    examples : list[dict]
        Test items to look at and to listen to: {"id", "doa_target",
        "doa_interferer", "angle", "sample_rate", "reference", "signals",
        "hypotheses", "si_snr"}; signals, hypotheses and si_snr are dicts by
        "mixture", "target" and system.
    training_curve : list | None
        One dict of numbers per epoch, or the losses alone.

    Example
    -------
    >>> from .table import summarise
    >>> item = {
    ...     "id": "a",
    ...     "angle": 7.0,
    ...     "si_snr": 9.0,
    ...     "si_snr_mixture": 0.0,
    ...     "pesq": 2.0,
    ...     "reference": "set red",
    ...     "hypothesis": "set blue",
    ... }
    >>> path = getfixture("tmpdir") / "report.html"
    >>> write_report(path, [{"system": "kl", "bits": 4, **summarise([item])}])
    >>> "9.00(2.00)" in path.read_text("utf-8")
    True
    """
    headline, sentences = verdict(metrics)
    names = [label(m) for m in metrics]
    sections = [
        tag("h1", tag("small", "Separation report") + text(headline)),
        *(tag("p", text(sentence)) for sentence in sentences),
        tag("p", text(_origin(metrics[0])), class_="soft"),
        _table_section(metrics),
        _quality_section(names, metrics),
    ]
    if plan:
        sections.append(_plan_section(plan))
    if scores:
        sections.append(_scores_section(scores))
    if training_curve:
        sections.append(_training_section(training_curve))
    if examples:
        sections.append(tag("h2", "Look and listen"))
        sections.append(tag("p", _EXAMPLES_NOTE, class_="soft"))
        sections += [example_section(example) for example in examples]
    write_text(path, page(headline, "\n".join(sections)))


_EXAMPLES_NOTE = (
    "All signals of an item are brought to one loudness. In transcripts, "
    "<span class='words'><mark>wrong <s>right</s></mark></span> is a "
    "substitution, <span class='words'><del>left out</del></span> a deletion "
    "and <span class='words'><ins>added</ins></span> an insertion. "
    "Spectrograms reach from 0 Hz at the bottom to half the sample rate and "
    "show 70 dB."
)


def _origin(metrics):
    """Corpus, seed and times of a run in one line."""
    parts = []
    if metrics.get("corpus"):
        parts.append(f"corpus {metrics['corpus']}")
    if metrics.get("seed") is not None:
        parts.append(f"seed {metrics['seed']}")
    parts.append(f"{sum(b['n'] for b in metrics['buckets'].values())} mixtures")
    if metrics.get("test_set"):
        parts.append(f"test set {metrics['test_set']}")
    parts += [
        f"{name} {seconds:.0f} s"
        for name, seconds in metrics.get("wall_seconds", {}).items()
    ]
    return " · ".join(parts)


def _table_section(metrics):
    """The results table; the first system's row stands out."""
    groups, header, rows = table_cells(metrics)
    starts, column = set(), 0
    for _, columns in groups:
        starts.add(column)
        column += columns
    starts.discard(0)
    titles = "".join(
        tag("th", text(title), colspan=columns) for title, columns in groups
    )
    head = tag("tr", titles) + _row(header, starts, "th")
    # Row 0 is the mixture, row 1 the system that the page is about.
    body = "".join(
        _row(row, starts, "td", "ours" if index == 1 else "")
        for index, row in enumerate(rows)
    )
    table = tag("table", tag("thead", head) + tag("tbody", body))
    notes = [tag("p", text(n), class_="soft") for n in table_notes(metrics)]
    return (
        tag("h2", "Results by angle between the speakers")
        + tag("div", table, class_="scroll")
        + "".join(notes)
    )


def _row(cells, starts, element, class_=""):
    """One table row; `starts` are the columns that begin a group."""
    inner = "".join(
        tag(element, text(cell.strip()), class_="first")
        if index in starts
        else tag(element, text(cell.strip()))
        for index, cell in enumerate(cells)
    )
    return tag("tr", inner, class_=class_) if class_ else tag("tr", inner)


def _quality_section(names, metrics):
    """Plots of the table's numbers."""
    draw = partial(quality_by_bucket, names, metrics)
    return _figure(draw, "SI-SNR, PESQ and word error rate by angle bucket")


def _plan_section(plan):
    """Bits per cluster, and how many parameters have how many."""
    clusters = plan["clusters"]
    total = sum(cluster["parameters"] for cluster in clusters.values())
    rows = []
    for bits in sorted({cluster["bits"] for cluster in clusters.values()}):
        sizes = [
            cluster["parameters"]
            for cluster in clusters.values()
            if cluster["bits"] == bits
        ]
        share = f"{100 * sum(sizes) / max(total, 1):.1f} %"
        cells = [f"{bits} bit", str(len(sizes)), f"{sum(sizes):,}", share]
        rows.append(_row(cells, (), "td"))
    header = ["bits", "clusters", "parameters", "share"]
    head = tag("thead", _row(header, (), "th"))
    table = tag("table", head + tag("tbody", "".join(rows)))
    average = bits_text({"bits": plan["average_bits"]})
    note = (
        f"{len(clusters)} clusters, {average} bits per parameter on average, "
        f"{size_text(plan['bytes'])} by the plan's count."
    )
    draw = partial(bits_per_cluster, clusters)
    caption = "Bits of every cluster, in the order of the signal"
    return (
        tag("h2", "Where the bits went")
        + tag("p", text(note))
        + _figure(draw, caption, "wide")
        + tag("div", table, class_="scroll")
    )


def _scores_section(scores):
    """Heat map of the sensitivities that the bits follow from."""
    draw = partial(sensitivity_map, scores)
    note = f"Method: {scores.get('method', 'not named')}. " + (
        "Brighter clusters lose more at these bits; empty cells are zero or "
        "below."
    )
    return (
        tag("h2", "Sensitivity to quantization")
        + tag("p", text(note))
        + _figure(draw, "Sensitivity of every cluster by bits", "map")
    )


def _training_section(curve):
    """Curves of the training."""
    draw = partial(draw_training, curve)
    return tag("h2", "Training") + _figure(draw, "Training by epoch")


def _figure(draw, caption, class_=""):
    """A figure with its caption, which scrolls where it is wide."""
    image = tag(
        "div", picture(draw, caption), class_=f"scroll {class_}".strip()
    )
    return tag("figure", image + tag("figcaption", text(caption)))
