"""Draw the figures of the report.

Every function takes plain data and gives a matplotlib figure. Colours of text
and grid are matplotlib's settings, so that one figure can be drawn for light
and for dark pages. Where blocks of a network repeat, as the ConvBlocks of the
paper's Fig. 3, their clusters are drawn by block and sublayer, named as in the
network.
"""

import math
from statistics import fmean

import numpy as np
from matplotlib import rcParams
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from ..utils import repeated_blocks
from .results_table import by_system
from .runs import FULL_PRECISION, KIB, bits_text, task_of

GREY = "#8a8f98"
# Okabe and Ito's colours, which nearly everybody can tell apart.
PALETTE = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# A system has one colour and one marker wherever it is drawn.
LOOKS = {
    "best": (PALETTE[0], "o"),
    "uniform": (PALETTE[1], "s"),
    "kl": (PALETTE[2], "D"),
    "mask_error": (PALETTE[3], "^"),
    "hes": (PALETTE[4], "v"),
    "nas": (PALETTE[5], "P"),
    "admm": (PALETTE[3], "X"),
    "one_stage": (PALETTE[4], "h"),
}
LINES = {"PostTraining": "-", "LearnedStep": "--"}  # by estimation; others :
NARROW = 3.6  # inches, of figures for a phone
_ROOM = 0.15  # in powers of two, between ticks at sizes


def look(run):
    """Tell how a system is drawn.

    Arguments
    ---------
    run : dict
        Metrics, of which the system and its estimation are used.

    Returns
    -------
    style : dict
        Colour, marker and line for matplotlib.

    Example
    -------
    >>> look({"system": "uniform", "estimator": "PostTraining"})
    {'color': '#0072b2', 'marker': 's', 'ls': '-'}
    """
    name = run["system"]
    if run.get("bits", 0) >= FULL_PRECISION and name not in LOOKS:
        return {"color": GREY, "marker": ".", "ls": "-"}
    spare = sum(map(ord, name))  # the same in every report
    colour, marker = LOOKS.get(
        name, (PALETTE[spare % len(PALETTE)], MARKERS[spare % len(MARKERS)])
    )
    line = LINES.get(run.get("estimator"), ":")
    return {"color": colour, "marker": marker, "ls": line}


def _panels(count, width, height, narrow):
    """A figure with panels side by side or, narrow, below each other."""
    size = (NARROW, height * count) if narrow else (width * count, height)
    figure = Figure(figsize=size, layout="constrained")
    shape = (count, 1) if narrow else (1, count)
    return figure, figure.subplots(*shape, squeeze=False).ravel()


def _width(wide, narrow):
    """Inches across."""
    return NARROW if narrow else wide


def quality_by_condition(names, metrics, narrow=False):
    """Draw every measure by condition, as SI-SNR by angle bucket.

    Arguments
    ---------
    names : list[str]
        Name of each system.
    metrics : list[dict]
        Contents of metrics.json files; the first system stands out.

    Example
    -------
    >>> empty = dict.fromkeys(["si_snr", "si_snr_mixture", "pesq", "wer"])
    >>> buckets = dict.fromkeys(["0-15", "15-45", "45-90", "90-180"], empty)
    >>> run = {"system": "kl", "buckets": buckets}
    >>> len(quality_by_condition(["kl"], [run]).axes)
    3
    """
    task = task_of(metrics[0])
    figure, panels = _panels(len(task.measures), 3.5, 3.6, narrow)
    for axes, measure in zip(panels, task.measures):
        if measure.unprocessed:
            values = _by_condition(task, metrics[0], measure.unprocessed)
            style = {"color": GREY, "ls": "--", "marker": ".", "lw": 1.2}
            axes.plot(
                task.condition_names, values, label=task.unprocessed, **style
            )
        for index in reversed(range(len(metrics))):
            axes.plot(
                task.condition_names,
                _by_condition(task, metrics[index], measure.key),
                label=names[index],
                lw=2.6 if index == 0 else 1.5,
                ms=7 if index == 0 else 4,
                **look(metrics[index]),
            )
        _widen(axes, measure.least_span)
        axes.set_title(measure.axis_title, loc="left")
        axes.set_xlabel(task.conditions.axis)
        axes.grid(axis="y")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles[::-1],
        labels[::-1],
        loc="outside lower center",
        ncols=1 if narrow else 6,
    )
    return figure


def training_curve(curve, narrow=False):
    """Draw losses and scores over the epochs of a training.

    Arguments
    ---------
    curve : list[dict] | list[float]
        One dict of numbers per epoch, with "epoch" or counted from 1; or the
        losses alone.
    """
    rows = [x if isinstance(x, dict) else {"loss": x} for x in curve]
    keys = dict.fromkeys(key for row in rows for key in row)
    keys.pop("epoch", None)
    figure, panels = _panels(len(keys), 3.5, 2.8, narrow)
    for axes, key, colour in zip(panels, keys, PALETTE * len(keys)):
        points = [
            (row.get("epoch", index), row[key])
            for index, row in enumerate(rows, 1)
            if key in row
        ]
        axes.plot(*zip(*points), color=colour, marker=".")
        axes.set_title(key, loc="left")
        axes.set_xlabel("epoch")
        axes.grid(axis="y")
    return figure


def top_view(target, interferer=None):
    """Draw the speakers' directions from above, the array at the bottom.

    Arguments
    ---------
    target : float
        Direction of arrival in degrees: 0 is the last microphone's end.
    """
    around = max(target, interferer or 0) > 180  # a planar array
    size = (3.0, 3.0) if around else (3.0, 1.9)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    arc = np.linspace(0, 2 * np.pi if around else np.pi)
    axes.plot(np.cos(arc), np.sin(arc), color=GREY, lw=0.8)
    for angle in range(0, 360 if around else 181, 45):
        x, y = _on_circle(angle, 1.14)
        axes.text(x, y, f"{angle}°", ha="center", va="center", fontsize=8)
    if around:
        axes.plot(0, 0, ".", color=GREY)
    else:
        # Symmetric and denser in the middle, as the paper's array; no scale.
        places = np.linspace(-1, 1, 15) ** 3 * 0.22
        axes.plot(places, np.zeros(15), ".", color=GREY)
        axes.text(-0.27, 0, "mic 1", ha="right", va="center", fontsize=8)
    speakers = [(target, PALETTE[2], "target")]
    if interferer is not None:
        speakers.append((interferer, PALETTE[0], "interferer"))
    for angle, colour, name in speakers:
        arrow = {"arrowstyle": "-|>", "color": colour, "lw": 2}
        axes.annotate(
            "", xy=(0, 0.04), xytext=_on_circle(angle, 0.9), arrowprops=arrow
        )
        text = f"{name} {angle:.0f}°"
        axes.plot(*_on_circle(angle, 0.93), "o", color=colour, label=text)
    low = -1.25 if around else -0.12
    axes.set(xlim=(-1.4, 1.4), ylim=(low, 1.25), aspect="equal")
    axes.axis("off")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _widen(axes, least_span):
    """Give an axis a least height, lest a tie look like a difference."""
    low, high = axes.get_ylim()
    missing = max(0, least_span - (high - low)) / 2
    axes.set_ylim(low - missing, high + missing)


def _by_condition(task, metrics, key):
    """Values by condition; NaN, which leaves a gap, where unknown."""
    values = (
        metrics["buckets"][name].get(key) for name in task.condition_names
    )
    return [math.nan if value is None else value for value in values]


def _on_circle(angle, radius):
    """Point at an angle in degrees."""
    turn = math.radians(angle)
    return radius * math.cos(turn), radius * math.sin(turn)


MARKERS = "osD^vPX"


def pareto(runs, predicted=None, own=True, narrow=False):
    """Draw quality against the bytes of the file.

    Arguments
    ---------
    runs : list[dict]
        Contents of metrics.json files. Systems with several seeds are drawn
        at their mean, with the span of their runs.
    """
    measures = task_of(runs[0]).columns
    count = len(measures) + bool(predicted)
    figure, axes = _panels(count, 4.4, 3.8, narrow)
    small = [r.get("model_bytes") for r in runs if r["bits"] < FULL_PRECISION]
    for panel, measure in zip(axes, measures):
        _draw_measured(panel, runs, measure.key, own)
        _size_axis(panel, measure.axis_title, small, narrow)
    handles, labels = axes[0].get_legend_handles_labels()
    columns = 2 if narrow else 6
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    if predicted:
        _draw_predicted(axes[-1], predicted)
        sizes = [point["bytes"] for point in predicted["points"]]
        _size_axis(axes[-1], "predicted score (lower is better)", sizes, narrow)
    return figure


def predicted_and_measured(rows, narrow=False):
    """Draw predicted against measured loss of whole plans.

    Arguments
    ---------
    rows : list[dict]
        Content of additivity.json: dicts of "plan" (a name), "predicted" (the
        sum of its clusters' scores) and "measured" in the same unit. Plans
        without a prediction are left out.
    """
    size = _width(6.4, narrow), _width(4.6, narrow)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    rows = [row for row in rows if row["predicted"] is not None]
    points = [(row["predicted"], row["measured"]) for row in rows]
    values = [value for point in points for value in point]
    if min(values, default=0) > 0:
        axes.set(xscale="log", yscale="log")
    ends = [min(values, default=0), max(values, default=1)]
    axes.plot(ends, ends, color=GREY, ls="--", lw=1)
    for row, point in zip(rows, points):
        axes.plot(*point, "o", color=PALETTE[1])
        place = {"xytext": (5, -3), "textcoords": "offset points"}
        axes.annotate(row["plan"], point, fontsize=7, **place)
    axes.set_xlabel("predicted: sum of the scores")
    axes.set_ylabel("measured")
    axes.grid()
    return figure


def convergence(rows, narrow=False):
    """Draw the convergence of ADMM over its iterations.

    Arguments
    ---------
    rows : list[dict]
        Content of admm.json: dicts of "iteration", "primal_residual" and
        "valid_loss", None where an iteration was not validated; the residual
        is relative to the weights.
    """
    figure, panels = _panels(2, 4.0, 3.0, narrow)
    for axes, key, title, colour in zip(
        panels,
        ("primal_residual", "valid_loss"),
        ("primal residual", "validation loss"),
        PALETTE,
    ):
        points = [
            (row["iteration"], row[key]) for row in rows if row[key] is not None
        ]
        axes.plot(*zip(*points), color=colour, marker=".")
        axes.set_title(title, loc="left")
        axes.set_xlabel("iteration")
        axes.grid(axis="y")
    if all(row["primal_residual"] > 0 for row in rows):
        panels[0].set_yscale("log")
    return figure


def trace_errors(traces, narrow=False):
    """Draw Hessian traces of the clusters with their standard errors."""
    figure = Figure(figsize=(_width(11, narrow), 2.8), layout="constrained")
    axes = figure.subplots()
    rows = [(row["trace"], row["standard_error"]) for row in traces.values()]
    trace, error = np.array(rows, dtype=float).T
    place = np.arange(len(rows))
    good = trace > 0
    style = {"fmt": ".", "color": PALETTE[1], "ecolor": GREY, "lw": 1}
    axes.errorbar(place[good], trace[good], error[good], **style)
    imprecise = ~good & (error > 0)
    style = {"mfc": "none", "color": PALETTE[0], "label": "not above zero"}
    if imprecise.any():
        axes.plot(place[imprecise], error[imprecise], "o", **style)
        axes.legend()
    if good.any() or imprecise.any():
        axes.set_yscale("log")
    axes.set_xlabel("cluster, in the order of the signal")
    axes.set_ylabel("trace")
    axes.grid(axis="y")
    return figure


def _draw_measured(axes, runs, key, own):
    """Systems of one method as a line over their sizes."""
    lines, looks, figures = {}, {}, set()
    for system in by_system(runs):
        values = [run["average"][key] for run in system]
        sizes = [run.get("model_bytes") for run in system]
        if None in values or not all(sizes):
            continue
        x, y = fmean(sizes) / KIB, fmean(values)
        full = system[0]["bits"] >= FULL_PRECISION
        if full:
            style = {"color": GREY, "ls": "--", "lw": 1.2}
            axes.axhline(y, label=system[0]["system"], **style)
        else:
            point = (x, y, min(values), max(values))
            method = _method(system[0], runs)
            looks.setdefault(method, look(system[0]))
            lines.setdefault(method, []).append(point)
            place = {"xytext": (5, 4), "textcoords": "offset points"}
            named = bits_text(system[0]), round(math.log2(x), 1)
            if named not in figures:  # one figure for all of a size
                axes.annotate(named[0], (x, y), fontsize=7, **place)
            figures.add(named)
            if own and runs[0] in system:
                _circle(axes, x, y)
    for name, points in lines.items():
        x, y, low, high = zip(*sorted(points))
        style = looks[name]
        axes.plot(x, y, label=name, lw=1.3, ms=5, **style)
        axes.vlines(x, low, high, color=style["color"])


def _method(run, runs):
    """Name of a system, with its estimation where there are several."""
    same = [r for r in runs if r["system"] == run["system"]]
    name = run["system"]
    if len({other.get("estimator") for other in same}) > 1:
        name += f" {run.get('estimator')}"
    if run.get("variant"):
        name += f" ({run['variant']})"
    return name


def _circle(axes, x, y):
    """A ring around the point that was chosen."""
    edge = rcParams["text.color"]
    ring = {"mfc": "none", "mec": edge, "mew": 1.5, "ms": 14}
    axes.plot([x], [y], "o", **ring)


def _draw_predicted(axes, predicted):
    """Least summed score for every size, and the plan that was chosen."""
    points = sorted((p["bytes"] / KIB, p["score"]) for p in predicted["points"])
    axes.plot(*zip(*points), color=PALETTE[1], marker=".", lw=1.3)
    if all(score > 0 for _, score in points):
        axes.set_yscale("log")
    chosen = predicted.get("chosen")
    if chosen:
        _circle(axes, chosen["bytes"] / KIB, chosen["score"])


def _size_axis(axes, title, sizes, narrow):
    """A logarithmic axis with ticks at the sizes that there are."""
    axes.set_xscale("log", base=2)
    sizes = sorted({size / KIB for size in sizes if size})
    room = max(_ROOM, math.log2(sizes[-1] / sizes[0]) / 8) if sizes else _ROOM
    ticks = []
    for size in sizes:
        if not ticks or math.log2(size / ticks[-1]) > room:
            ticks.append(size)
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.tick_params(axis="x", rotation=45 if narrow else 0)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("file, KiB")
    axes.set_title(title, loc="left")
    axes.grid()


# Sublayers in the order of the network: of a ConvBlock, 1x1 and depthwise
# convolutions are in strong colours, what belongs to them in lighter ones.
COLOURS = (
    *("#0072b2", "#56b4e9", "#cc79a7", "#d55e00"),
    *("#e69f00", "#f0e442", "#009e73", "#000000"),
)
_MOST_LABELS = 60  # tick labels that still can be read


def bits_per_cluster(clusters, narrow=False):
    """Draw the bits of every cluster, as the paper's Fig. 3 if it can."""
    places = list(repeated_blocks(clusters).values())
    colours = _colours(places)
    figure = Figure(figsize=(_width(11, narrow), 3.9), layout="constrained")
    axes = figure.subplots()
    bits = [cluster["bits"] for cluster in clusters.values()]
    widths = [max(c.get("parameters", 1), 1) for c in clusters.values()]
    starts = np.concatenate([[0], np.cumsum(widths)])
    edge = {"edgecolor": "white", "lw": 0.3, "align": "edge"}
    shown = [
        colours.get(sublayer, GREY) if colours else PALETTE[1]
        for _, sublayer in places
    ]
    axes.bar(starts[:-1], bits, widths, color=shown, **edge)
    if colours:
        _name_blocks(axes, places, starts)
        _sublayer_legend(axes, clusters, places, 2 if narrow else 5)
    else:
        _name_bars(axes, list(clusters), starts)
    axes.set_xlim(0, starts[-1])
    shown = []
    for tick in sorted({*bits}):
        if tick >= 1 and (not shown or tick - shown[-1] > max(bits) / 22):
            shown.append(tick)
    axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
    axes.set_ylabel("bits")
    axes.grid(axis="y")
    return figure


def sensitivity_map(scores, narrow=False):
    """Draw the sensitivity of every cluster at every bit width."""
    names = list(scores["clusters"])
    rows = [
        {float(bits): float(x) for bits, x in cluster["scores"].items()}
        for cluster in scores["clusters"].values()
    ]
    bits = sorted({b for row in rows for b in row})
    table = np.array([[row.get(b, math.nan) for row in rows] for b in bits])
    table = np.ma.masked_invalid(np.where(table > 0, table, math.nan))
    figure = Figure(figsize=(_width(11, narrow), 2.8), layout="constrained")
    axes = figure.subplots()
    norm = LogNorm() if table.count() else None
    style = {"aspect": "auto", "cmap": "viridis", "norm": norm}
    image = axes.imshow(table, interpolation="nearest", **style)
    axes.set_yticks(range(len(bits)), [f"{b:g} bit" for b in bits])
    _cluster_ticks(axes, names)
    figure.colorbar(image, ax=axes, label="sensitivity", pad=0.01)
    return figure


def _colours(places):
    """Sublayer -> colour; none without blocks, or with too many sublayers."""
    sublayers = dict.fromkeys(part for _, part in places if part is not None)
    few = len(sublayers) <= len(COLOURS)
    return dict(zip(sublayers, COLOURS)) if few else {}


def _short(names):
    """Names without the module that is at the beginning of all."""
    modules = {name.partition(".")[0] for name in names}
    if len(modules) > 1 or any("." not in name for name in names):
        return list(names)
    return [name.partition(".")[2] for name in names]


def _name_blocks(axes, places, starts):
    """Ticks in the middle of every ConvBlock, as far as there is room."""
    spans = {}
    for index, (block, _) in enumerate(places):
        first, _ = spans.get(block, (starts[index], 0))
        spans[block] = first, starts[index + 1]
    centers = [sum(span) / 2 for span in spans.values()]
    labels = [
        block if last - first > starts[-1] / 60 else ""
        for block, (first, last) in zip(_short(spans), spans.values())
    ]
    axes.set_xticks(centers, labels, rotation=90 if len(labels) > 8 else 0)
    axes.set_xlabel("blocks, as wide as their parameters")


def _name_bars(axes, names, starts):
    """Names of wide bars below them."""
    widths = np.diff(starts)
    shown = [i for i in range(len(names)) if widths[i] > starts[-1] / 80]
    shown = shown or range(len(names))
    centers = [(starts[i] + starts[i + 1]) / 2 for i in shown]
    axes.set_xticks(centers, [names[i] for i in shown], rotation=90, fontsize=7)


def _sublayer_legend(axes, clusters, places, columns):
    """What the colours are."""
    sizes = {}
    for cluster, (_, sublayer) in zip(clusters.values(), places):
        sizes.setdefault(sublayer, []).append(cluster.get("parameters", 0))
    alone, colours = sizes.pop(None, []), _colours(places)
    handles = [Patch(color=colours[name]) for name in sizes]
    labels = [f"{name} ({_range(sizes[name])})" for name in sizes]
    if alone:
        handles.append(Patch(color=GREY))
        labels.append(f"others ({_range(alone)})")
    axes.figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        title="sublayer (parameters each)",
    )


def _range(sizes):
    """One number, or the span of several."""
    low, high = min(sizes), max(sizes)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _cluster_ticks(axes, names):
    """Mark blocks that repeat below a map of clusters, or name all clusters."""
    places = list(repeated_blocks(names).values())
    if not _colours(places):
        _name_ticks(axes, names)
        return
    blocks = [block for block, _ in places]
    centers, labels = [], _short(dict.fromkeys(blocks))
    for block in dict.fromkeys(blocks):
        columns = [i for i, other in enumerate(blocks) if other == block]
        centers.append(np.mean(columns))
        line = {"color": rcParams["axes.edgecolor"], "lw": 0.6}
        axes.axvline(columns[-1] + 0.5, **line)
    axes.set_xticks(centers, labels, rotation=90 if len(labels) > 8 else 0)
    axes.set_xlabel("blocks; their sublayers from left to right")


def _name_ticks(axes, names):
    """Cluster names as upright labels, thinned out where there are many."""
    step = math.ceil(len(names) / _MOST_LABELS)
    shown = range(0, len(names), step)
    axes.set_xticks(shown, [names[i] for i in shown], rotation=90, fontsize=7)
    axes.set_xlim(-0.7, len(names) - 0.3)
