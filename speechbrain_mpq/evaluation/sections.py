"""Sections of the report page, each from the content of one file."""

from functools import partial

from .bit_plots import bits_per_cluster, sensitivity_map
from .curves import convergence, pareto, predicted_and_measured, trace_errors
from .media import picture
from .page import tag, text
from .plots import quality_by_bucket
from .plots import training_curve as draw_training
from .systems import bits_text, size_text


def quality_section(names, runs):
    """Plots of the table's numbers.

    Arguments
    ---------
    names : list[str]
        Name of each run.
    runs : list[dict]
        Contents of metrics.json files.

    Returns
    -------
    str
        HTML, as of all sections.
    """
    draw = partial(quality_by_bucket, names, runs)
    return _figure(draw, "SI-SNR, PESQ and word error rate by angle bucket")


def pareto_section(runs, predicted=None, own=True):
    """Size against quality, and against the predicted score.

    Arguments
    ---------
    runs : list[dict]
        Contents of metrics.json files.
    predicted : dict | None
        Content of pareto.json, see `curves.pareto`.
    own : bool
        Whether the page is about the first run.

    Returns
    -------
    str
        HTML.
    """
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


def plan_section(plan, ceiling=None):
    """Bits per cluster, and how many parameters have how many.

    Arguments
    ---------
    plan : dict
        Content of plan.json.
    ceiling : dict | None
        Content of ceiling.json.

    Returns
    -------
    str
        HTML.
    """
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


def scores_section(scores):
    """Heat map of the sensitivities that the bits follow from.

    Arguments
    ---------
    scores : dict
        Content of scores.json. Hessian scores tell in their details how well
        the traces are known.

    Returns
    -------
    str
        HTML.
    """
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


def additivity_section(rows):
    """Predicted against measured loss of whole plans.

    Arguments
    ---------
    rows : list[dict]
        Content of additivity.json, see `curves.predicted_and_measured`.

    Returns
    -------
    str
        HTML.
    """
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


def admm_section(rows):
    """Convergence of ADMM.

    Arguments
    ---------
    rows : list[dict]
        Content of admm.json, see `curves.convergence`.

    Returns
    -------
    str
        HTML.
    """
    note = (
        "The primal residual says how far the weights are from their "
        "quantized values; the loss is that of the quantized network."
    )
    return (
        tag("h2", "Convergence of ADMM")
        + tag("p", text(note))
        + _figure(partial(convergence, rows), "ADMM by iteration")
    )


def training_section(curve):
    """Curves of the training.

    Arguments
    ---------
    curve : list
        One dict of numbers per epoch, or the losses alone.

    Returns
    -------
    str
        HTML.
    """
    draw = partial(draw_training, curve)
    return tag("h2", "Training") + _figure(draw, "Training by epoch")


def table_row(cells, starts=(), element="td", class_=""):
    """One table row.

    Arguments
    ---------
    cells : list[str]
        Plain text.
    starts : set[int]
        Columns that begin a group.
    element : str
        "td" or "th".
    class_ : str
        Class of the row, if any.

    Returns
    -------
    str
        A `<tr>` element.

    Example
    -------
    >>> table_row(["kl", "4"], {1})
    '<tr><td>kl</td><td class="first">4</td></tr>'
    """
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
        rows.append(table_row(cells))
    header = ["bits", "clusters", "parameters", "share"]
    head = tag("thead", table_row(header, element="th"))
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
