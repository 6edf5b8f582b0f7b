"""What the numbers of a system say against its baselines, in words.

Sections of the report page, each from the content of one file.

The results table as a part of a page.

Pages of results: one HTML file each, with all it shows inside.
"""

from functools import partial

from .comparisons import compare
from .mapsswe import SIGNIFICANCE_LEVEL
from .media import picture
from .page import tag, text
from .plots import (
    bits_per_cluster,
    convergence,
    pareto,
    predicted_and_measured,
    quality_by_bucket,
    sensitivity_map,
    trace_errors,
)
from .plots import training_curve as draw_training
from .results_table import difference_cells, table_cells, table_notes
from .runs import FULL_PRECISION, bits_text, label, size_text

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError(
        'the report needs matplotlib: pip install "speechbrain_mpq[evaluate]"'
    ) from error
from ..utils import write_text
from .media import example_section
from .page import page


def verdict(metrics):
    """Headline and sentences on the first of several systems.

    Arguments
    ---------
    metrics : list[dict]
        Metrics of the system, then of its baselines.

    Returns
    -------
    tuple[str, list[str]]
        One line, and sentences with the numbers.
    """
    system, *baselines = metrics
    full = [m for m in baselines if m["bits"] >= FULL_PRECISION]
    headline = label(system)
    if full:
        headline += f": {_headline(system, full[0])}"
    sentences = [_gain(system)]
    sentences += [_comparison(system, baseline) for baseline in baselines]
    return headline, [sentence for sentence in sentences if sentence]


def _headline(system, full):
    """Compression and loss against full precision, in one line."""
    parts = []
    if system.get("model_bytes") and full.get("model_bytes"):
        ratio = full["model_bytes"] / system["model_bytes"]
        parts.append(f"{ratio:.1f} times smaller")
    test = compare(system, full)
    if test is None:
        difference = _difference(system, full, "wer")
        if difference is not None:
            parts.append(f"word error rate {difference:+.1f} points")
    elif test["p"] >= SIGNIFICANCE_LEVEL:
        parts.append("no significant change in word errors")
    else:
        more = "more" if test["z"] > 0 else "fewer"
        parts.append(f"significantly {more} word errors")
    return ", ".join(parts)


def _gain(system):
    """Sentence on what separation does to the mixture."""
    before = [b["si_snr_mixture"] for b in system["buckets"].values()]
    after = system["average"]["si_snr"]
    if not before or None in before or after is None:
        return None
    before = sum(before) / len(before)
    return (
        f"Separation takes the SI-SNR from {before:.2f} dB in the mixture to "
        f"{after:.2f} dB, the mean of the four angle buckets."
    )


def _comparison(system, baseline):
    """Sentence on the system against one baseline."""
    parts = []
    for key, unit, decimals in (
        ("wer", "points WER", 1),
        ("si_snr", "dB SI-SNR", 2),
        ("pesq", "PESQ", 2),
    ):
        difference = _difference(system, baseline, key)
        if difference is not None:
            parts.append(f"{difference:+.{decimals}f} {unit}")
    sizes = [m.get("model_bytes") for m in (system, baseline)]
    size = ""
    if all(sizes):
        size = f" ({size_text(sizes[0])} against {size_text(sizes[1])})"
    if not parts:
        return None
    text = f"Against {label(baseline)}{size}: {', '.join(parts)}."
    test = compare(system, baseline)
    if test is None:
        return f"{text} The difference in word errors was not tested."
    outcome = "is" if test["p"] < SIGNIFICANCE_LEVEL else "is not"
    return (
        f"{text} The difference in word errors {outcome} significant "
        f"(MAPSSWE, z = {test['z']:.2f}, {_p_text(test['p'])}, "
        f"{test['segments']} segments)."
    )


def _p_text(p):
    """A p value; small ones as a bound."""
    return f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"


def _difference(system, baseline, key):
    """System minus baseline on average, or None where one is unknown."""
    ours, theirs = system["average"][key], baseline["average"][key]
    return None if ours is None or theirs is None else ours - theirs


def _quality_section(names, runs):
    """Plots of the table's numbers."""
    draw = partial(quality_by_bucket, names, runs)
    return _figure(draw, "SI-SNR, PESQ and word error rate by angle bucket")


def _pareto_section(runs, predicted=None, own=True):
    """Size against quality, and against the predicted score."""
    note = (
        "Every system by the size of its file; full precision is the dashed "
        "line, vertical bars span the seeds, figures are bits."
    )
    if own:
        note += " The ring is around this system."
    if predicted:
        note += (
            " On the right, the least sum of scores that a file of each size "
            "allows, and the plan that was chosen."
        )
    draw = partial(pareto, runs, predicted, own)
    return (
        tag("h2", "Size against quality")
        + tag("p", text(note))
        + _figure(draw, "Quality against the size of the file")
    )


def _plan_section(plan, ceiling=None):
    """Bits per cluster, and how many parameters have how many."""
    clusters = plan["clusters"]
    average = bits_text({"bits": plan["average_bits"]})
    note = (
        f"{len(clusters)} clusters, {average} bits per parameter on average, "
        f"{size_text(plan['bytes'])} by the plan's count."
    )
    parts = [tag("h2", "Where the bits went"), tag("p", text(note))]
    if ceiling:
        parts.append(tag("p", text(_ceiling_note(ceiling))))
    caption = "Bits of every cluster, in the order of the signal"
    parts.append(_figure(partial(bits_per_cluster, clusters), caption, "wide"))
    parts.append(tag("div", _bits_table(clusters), class_="scroll"))
    return "".join(parts)


def _scores_section(scores):
    """Heat map of the sensitivities that the bits follow from."""
    note = f"Method: {scores.get('method', 'not named')}. " + (
        "Brighter clusters lose more at these bits; empty cells are zero or "
        "below."
    )
    parts = [
        tag("h2", "Sensitivity to quantization"),
        tag("p", text(note)),
        _figure(
            partial(sensitivity_map, scores),
            "Sensitivity of every cluster by bits",
            "map",
        ),
    ]
    traces = scores.get("details", {}).get("traces")
    if traces:
        caption = "Hessian trace of every cluster with its standard error"
        parts.append(_figure(partial(trace_errors, traces), caption))
    return "".join(parts)


def _additivity_section(rows):
    """Predicted against measured loss of whole plans."""
    note = (
        "Scores change one cluster at a time; their sum is what a whole plan "
        "should lose if clusters did not act on each other. Above the dashed "
        "line a plan loses more than that."
    )
    draw = partial(predicted_and_measured, rows)
    return (
        tag("h2", "Predicted and measured loss")
        + tag("p", text(note))
        + _figure(draw, "Predicted against measured loss of whole plans")
    )


def _admm_section(rows):
    """Convergence of ADMM."""
    note = (
        "The primal residual says how far the weights are from their "
        "quantized values; the loss is that of the quantized network."
    )
    return (
        tag("h2", "Convergence of ADMM")
        + tag("p", text(note))
        + _figure(partial(convergence, rows), "ADMM by iteration")
    )


def _training_section(curve):
    """Curves of the training."""
    draw = partial(draw_training, curve)
    return tag("h2", "Training") + _figure(draw, "Training by epoch")


def _table_row(cells, starts=(), element="td", class_=""):
    """One table row."""
    inner = "".join(
        tag(element, text(cell.strip()), class_="first")
        if index in starts
        else tag(element, text(cell.strip()))
        for index, cell in enumerate(cells)
    )
    return tag("tr", inner, class_=class_) if class_ else tag("tr", inner)


def _bits_table(clusters):
    """How many clusters and parameters have how many bits."""
    total = sum(cluster["parameters"] for cluster in clusters.values())
    rows = []
    for bits in sorted({cluster["bits"] for cluster in clusters.values()}):
        sizes = [
            cluster["parameters"]
            for cluster in clusters.values()
            if cluster["bits"] == bits
        ]
        share = f"{100 * sum(sizes) / max(total, 1):.1f} %"
        cells = [f"{bits:g} bit", str(len(sizes)), f"{sum(sizes):,}", share]
        rows.append(_table_row(cells))
    header = ["bits", "clusters", "parameters", "share"]
    head = tag("thead", _table_row(header, element="th"))
    return tag("table", head + tag("tbody", "".join(rows)))


def _ceiling_note(ceiling):
    """What mixed precision can win here, and what the plan wins."""
    note = (
        "By the scores, mixed precision can do at most "
        f"{ceiling['am_gm_db']:.1f} dB less damage than uniform precision of "
        "the same bytes: the arithmetic over the geometric mean of the "
        "sensitivities."
    )
    limited, planned = ceiling.get("limited_db"), ceiling.get("planned_db")
    if limited is not None:
        note += f" Within the candidate bits it is {limited:.1f} dB."
    if planned is not None:
        note += f" This plan is predicted to do {planned:.1f} dB less."
    return note


def _figure(draw, caption, class_=""):
    """A figure with its caption, which scrolls where it is wide."""
    image = tag(
        "div", picture(draw, caption), class_=f"scroll {class_}".strip()
    )
    return tag("figure", image + tag("figcaption", text(caption)))


def _table_section(runs, against=None, seeds="all", ours=False):
    """The results table, what its marks say, and differences by seed."""
    groups, header, rows = table_cells(runs, against, seeds)
    starts, column = set(), 0
    for _, columns in groups:
        starts.add(column)
        column += columns
    starts.discard(0)
    titles = "".join(
        tag("th", text(title), colspan=columns) for title, columns in groups
    )
    head = tag("tr", titles) + _table_row(header, starts, "th")
    # Row 0 is the mixture, row 1 the first run.
    body = "".join(
        _table_row(row, starts, class_="ours" if ours and index == 1 else "")
        for index, row in enumerate(rows)
    )
    notes = table_notes(runs, against, seeds)
    return (
        _table(head, body, class_="results")
        + "".join(tag("p", text(note), class_="soft") for note in notes)
        + _differences(runs)
    )


def _differences(runs):
    """Differences between systems of equal bytes, where seeds allow."""
    header, rows = difference_cells(runs)
    if not rows:
        return ""
    note = (
        "Mean and standard deviation, over the seeds, of the difference "
        "between two systems whose files are of one size."
    )
    body = "".join(_table_row(row) for row in rows)
    return (
        tag("h2", "Differences at equal bytes")
        + tag("p", text(note))
        + _table(_table_row(header, element="th"), body)
    )


def _table(head, body, **attributes):
    """A table that scrolls where it is wide."""
    inner = tag("thead", head) + tag("tbody", body)
    return tag("div", tag("table", inner, **attributes), class_="scroll")


def write_report(
    path,
    metrics,
    plan=None,
    scores=None,
    examples=(),
    training_curve=None,
    neighbours=(),
    ceiling=None,
    pareto=None,
    additivity=None,
    admm=None,
):
    """Write the report of a system and its baselines as one HTML file.

    Arguments
    ---------
    metrics : list[dict]
        Contents of metrics.json: the system first, then baselines such as
        full and uniform precision, all scored on one test set.
    examples : list[dict]
        Test items to look at and to listen to: {"id", "doa_target",
        "doa_interferer", "angle", "sample_rate", "reference", "signals",
        "hypotheses", "si_snr"}; signals, hypotheses and si_snr are dicts by
        "mixture", "target" and system.
    neighbours : list[dict]
        Metrics of more systems, drawn beside these by their size.
    additivity : list[dict] | None
        Content of additivity.json: "plan", "predicted" and "measured".
    admm : list[dict] | None
        Content of admm.json: "iteration", "primal_residual", "valid_loss".
    """
    headline, sentences = verdict(metrics)
    names = [label(m) for m in metrics]
    sections = [
        tag("h1", tag("small", "Separation report") + text(headline)),
        *(tag("p", text(sentence)) for sentence in sentences),
        tag("p", text(_origin(metrics[0])), class_="soft"),
        tag("h2", "Results by angle between the speakers"),
        _table_section(metrics, ours=True),
        _quality_section(names, metrics),
    ]
    if neighbours or pareto:
        runs = [*metrics, *neighbours]
        sections.append(_pareto_section(runs, pareto))
    if plan:
        sections.append(_plan_section(plan, ceiling))
    if scores:
        sections.append(_scores_section(scores))
    if additivity:
        sections.append(_additivity_section(additivity))
    if admm:
        sections.append(_admm_section(admm))
    if training_curve:
        sections.append(_training_section(training_curve))
    if examples:
        sections.append(tag("h2", "Look and listen"))
        sections.append(tag("p", _EXAMPLES_NOTE, class_="soft"))
        sections += [example_section(example) for example in examples]
    write_text(path, page(headline, "\n".join(sections)))


def write_table(path, runs, against=None, seeds="all"):
    """Write the results table of many systems as one HTML file.

    Arguments
    ---------
    runs : list[dict]
        Contents of metrics.json files, as `runs.gather` gives them.
    """
    sections = [
        tag("h1", tag("small", "Results") + "Systems on one test set"),
        tag("p", text(_origin(runs[0], ("corpus", "test_set"))), class_="soft"),
        _table_section(runs, against, seeds),
        _pareto_section(runs, own=False),
    ]
    write_text(path, page("Results", "\n".join(sections)))


_EXAMPLES_NOTE = (
    "All signals of an item are brought to one loudness. In transcripts, "
    "<span class='words'><mark>wrong <s>right</s></mark></span> is a "
    "substitution, <span class='words'><del>left out</del></span> a deletion "
    "and <span class='words'><ins>added</ins></span> an insertion. "
    "Spectrograms reach from 0 Hz at the bottom to half the sample rate and "
    "show 70 dB."
)


def _origin(metrics, keys=("corpus", "seed", "test_set")):
    """Corpus, seed, test set and times of a run in one line."""
    shown = [key for key in keys if metrics.get(key) is not None]
    parts = [f"{key.replace('_', ' ')} {metrics[key]}" for key in shown]
    parts.insert(
        len(parts) - ("test_set" in shown),
        f"{sum(b['n'] for b in metrics['buckets'].values())} mixtures",
    )
    if "seed" in keys:
        parts += [
            f"{name} {seconds:.0f} s"
            for name, seconds in (metrics.get("wall_seconds") or {}).items()
        ]
    return " · ".join(parts)
