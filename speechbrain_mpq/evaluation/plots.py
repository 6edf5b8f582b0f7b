"""Draw the figures of the report.

Every function takes plain data and gives a matplotlib figure. Colours of text
and grid are matplotlib's settings, so that one figure can be drawn for light
and for dark pages. Clusters named as `mask_net.tcn_0_3.d_conv` are drawn by
ConvBlock and sublayer as in the paper's Fig. 3, which counts from 1; any other
name gets a plain place.
"""

import math
import re
from statistics import fmean

import numpy as np
from matplotlib import rcParams
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from .comparisons import by_system
from .runs import FULL_PRECISION, KIB, bits_text, full_label, task_of

GREY = "#8a8f98"
PALETTE = ("#e4572e", "#2e86de", "#17a589", "#b07cc6", "#d9a404", "#5dade2")


def quality_by_condition(names, metrics):
    """Draw every measure by condition, as SI-SNR by angle bucket.

    Arguments
    ---------
    names : list[str]
        Name of each system.
    metrics : list[dict]
        Contents of metrics.json files; the first system stands out.

    Returns
    -------
    matplotlib.figure.Figure
        A panel for each measure.

    Example
    -------
    >>> empty = dict.fromkeys(["si_snr", "si_snr_mixture", "pesq", "wer"])
    >>> buckets = dict.fromkeys(["0-15", "15-45", "45-90", "90-180"], empty)
    >>> len(quality_by_condition(["kl"], [{"buckets": buckets}]).axes)
    3
    """
    task = task_of(metrics[0])
    count = len(task.measures)
    figure = Figure(figsize=(3.5 * count, 3.6), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
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
                color=PALETTE[index % len(PALETTE)],
                marker="o" if index == 0 else "s",
                lw=2.6 if index == 0 else 1.5,
                ms=6 if index == 0 else 4,
            )
        _widen(axes, measure.least_span)
        axes.set_title(measure.axis_title, loc="left")
        axes.set_xlabel(task.conditions.axis)
        axes.grid(axis="y")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="outside lower center", ncols=6
    )
    return figure


def training_curve(curve):
    """Draw losses and scores over the epochs of a training.

    Arguments
    ---------
    curve : list[dict] | list[float]
        One dict of numbers per epoch, with "epoch" or counted from 1; or the
        losses alone.

    Returns
    -------
    matplotlib.figure.Figure
        One panel per number.

    Example
    -------
    >>> curve = [{"epoch": 1, "train loss": -3.0, "valid SI-SNR": 2.5}]
    >>> len(training_curve(curve).axes)
    2
    """
    rows = [x if isinstance(x, dict) else {"loss": x} for x in curve]
    keys = dict.fromkeys(key for row in rows for key in row)
    keys.pop("epoch", None)
    figure = Figure(figsize=(3.5 * len(keys), 2.8), layout="constrained")
    panels = figure.subplots(1, len(keys), squeeze=False)[0]
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
    interferer : float | None
        The same for the other speaker.

    Returns
    -------
    matplotlib.figure.Figure
        A half circle with one arrow per speaker; distances are not drawn.

    Example
    -------
    >>> len(top_view(30, 120).axes)
    1
    """
    figure = Figure(figsize=(3.0, 1.9), layout="constrained")
    axes = figure.subplots()
    arc = np.linspace(0, np.pi)
    axes.plot(np.cos(arc), np.sin(arc), color=GREY, lw=0.8)
    for angle in (0, 45, 90, 135, 180):
        x, y = _on_circle(angle, 1.14)
        axes.text(x, y, f"{angle}°", ha="center", va="center", fontsize=8)
    # Symmetric and denser in the middle, as the paper's array; no scale.
    axes.plot(np.linspace(-1, 1, 15) ** 3 * 0.22, np.zeros(15), ".", color=GREY)
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
    axes.set(xlim=(-1.4, 1.4), ylim=(-0.12, 1.25), aspect="equal")
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


def pareto(runs, predicted=None, own=True):
    """Draw quality against the bytes of the file.

    Arguments
    ---------
    runs : list[dict]
        Contents of metrics.json files. Systems with several seeds are drawn
        at their mean, with the span of their runs.
    predicted : dict | None
        Content of pareto.json: "points" and "chosen", each point a dict of
        "bytes" and "score", the summed score of the best plan of that size.
    own : bool
        Whether the first run stands out.

    Returns
    -------
    matplotlib.figure.Figure
        The measures with columns of their own and the predicted score.

    Example
    -------
    >>> average = {"si_snr": 8.0, "pesq": 2.0, "wer": 25.0}
    >>> run = {"system": "kl", "bits": 4, "model_bytes": 1024}
    >>> figure = pareto([{**run, "average": average}])
    >>> figure.axes[0].lines[0].get_xydata().tolist()
    [[1.0, 8.0]]
    """
    measures = task_of(runs[0]).columns
    panels = len(measures) + bool(predicted)
    figure = Figure(figsize=(4.4 * panels, 3.8), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for panel, measure in zip(axes, measures):
        _draw_measured(panel, runs, measure.key, own)
        _size_axis(panel, measure.axis_title)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    if predicted:
        _draw_predicted(axes[-1], predicted)
        _size_axis(axes[-1], "predicted score (lower is better)")
    return figure


def predicted_and_measured(rows):
    """Draw predicted against measured loss of whole plans.

    Arguments
    ---------
    rows : list[dict]
        Content of additivity.json: dicts of "plan" (a name), "predicted" (the
        sum of its clusters' scores) and "measured" in the same unit. Plans
        without a prediction are left out.

    Returns
    -------
    matplotlib.figure.Figure
        On the dashed line both are equal. Axes are logarithmic unless a value
        is zero or less.

    Example
    -------
    >>> rows = [{"plan": "uniform 4", "predicted": 2.0, "measured": 2.5}]
    >>> axes = predicted_and_measured(rows).axes[0]
    >>> axes.get_xscale(), axes.texts[0].get_text()
    ('log', 'uniform 4')
    """
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
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


def convergence(rows):
    """Draw the convergence of ADMM over its iterations.

    Arguments
    ---------
    rows : list[dict]
        Content of admm.json: dicts of "iteration", "primal_residual" and
        "valid_loss", None where an iteration was not validated; the residual
        is relative to the weights.

    Returns
    -------
    matplotlib.figure.Figure
        Residual and loss over the iterations.

    Example
    -------
    >>> row = {"iteration": 1, "primal_residual": 0.1, "valid_loss": -8.0}
    >>> [axes.get_yscale() for axes in convergence([row]).axes]
    ['log', 'linear']
    """
    figure = Figure(figsize=(8.0, 3.0), layout="constrained")
    panels = figure.subplots(1, 2)
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


def trace_errors(traces):
    """Draw Hessian traces of the clusters with their standard errors.

    Arguments
    ---------
    traces : dict
        Cluster -> {"trace", "standard_error"}, in the order of the signal.

    Returns
    -------
    matplotlib.figure.Figure
        Estimates of zero or less are drawn as hollow marks at the size of
        their standard error, which is all that is known of them.

    Example
    -------
    >>> traces = {"fc": {"trace": 20.0, "standard_error": 1.0}}
    >>> len(trace_errors(traces).axes)
    1
    """
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    axes = figure.subplots()
    rows = [(row["trace"], row["standard_error"]) for row in traces.values()]
    trace, error = np.array(rows, dtype=float).T
    place = np.arange(len(rows))
    good = trace > 0
    style = {"fmt": ".", "color": PALETTE[1], "ecolor": GREY, "lw": 1}
    axes.errorbar(place[good], trace[good], error[good], **style)
    known = ~good & (error > 0)
    style = {"mfc": "none", "color": PALETTE[0], "label": "not above zero"}
    if known.any():
        axes.plot(place[known], error[known], "o", **style)
        axes.legend()
    if good.any() or known.any():
        axes.set_yscale("log")
    axes.set_xlabel("cluster, in the order of the signal")
    axes.set_ylabel("trace")
    axes.grid(axis="y")
    return figure


def _draw_measured(axes, runs, key, own):
    """Systems of one method as a line over their sizes."""
    lines = {}
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
            lines.setdefault(_method(system[0], runs), []).append(point)
            place = {"xytext": (5, 4), "textcoords": "offset points"}
            axes.annotate(bits_text(system[0]), (x, y), fontsize=7, **place)
            if own and runs[0] in system:
                _circle(axes, x, y)
    for index, (name, points) in enumerate(lines.items()):
        x, y, low, high = zip(*sorted(points))
        colour = PALETTE[index % len(PALETTE)]
        marker = MARKERS[index % len(MARKERS)]
        style = {"color": colour, "label": name, "lw": 1.3, "ms": 5}
        axes.plot(x, y, marker=marker, **style)
        axes.vlines(x, low, high, color=colour)


def _method(run, runs):
    """Label of a system without its bits."""
    return full_label(run, runs).replace(f" {bits_text(run)} bit", "", 1)


def _circle(axes, x, y):
    """A ring around the point that was chosen."""
    ring = {"mfc": "none", "mec": PALETTE[0], "mew": 2, "ms": 14}
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


def _size_axis(axes, title):
    """A logarithmic axis of sizes with plain numbers."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("file, KiB")
    axes.set_title(title, loc="left")
    axes.grid()


# The paper's seven sublayers of a ConvBlock: 1x1 and depthwise convolutions
# in strong colours, what belongs to them in lighter ones.
SUBLAYERS = {
    "conv_1x1_in": "#2e86de",
    "prelu_in": "#9ecbf5",
    "norm_in": "#b9a3e3",
    "d_conv": "#e4572e",
    "prelu_out": "#f5b7a3",
    "norm_out": "#e8c65a",
    "conv_1x1_out": "#17a589",
}


_SUBLAYER = re.compile(r"(?:^|\.)tcn_(\d+)_(\d+)\.(\w+)$")
_ENDS = {"conv_in": "in", "conv_out": "out"}
_MOST_LABELS = 60  # tick labels that still can be read


def bits_per_cluster(clusters):
    """Draw the bits of every cluster, as the paper's Fig. 3 if it can.

    Arguments
    ---------
    clusters : dict
        `clusters` of plan.json: name -> {"bits", "parameters"}, in order.

    Returns
    -------
    matplotlib.figure.Figure
        Seven coloured bars per ConvBlock, or a plain bar per cluster.

    Example
    -------
    >>> plan = {"encoder.fc": {"bits": 4, "parameters": 9}}
    >>> bits_per_cluster(plan).axes[0].get_xticklabels()[0].get_text()
    'encoder.fc'
    """
    places = [_place(name) for name in clusters]
    blocks = list(dict.fromkeys(block for block, _ in places))
    known = None not in blocks
    groups = len(blocks) if known else len(clusters)
    width = min(24, max(9, 0.55 * groups if known else 0.22 * groups))
    figure = Figure(figsize=(width, 3.6), layout="constrained")
    axes = figure.subplots()
    if known:
        _draw_blocks(axes, clusters, places, blocks)
    else:
        bits = [cluster["bits"] for cluster in clusters.values()]
        axes.bar(range(len(bits)), bits, color=PALETTE[1], width=0.8)
        _name_ticks(axes, list(clusters))
    _bit_axis(axes, [cluster["bits"] for cluster in clusters.values()])
    axes.grid(axis="y")
    return figure


def sensitivity_map(scores):
    """Draw the sensitivity of every cluster at every bit width.

    Arguments
    ---------
    scores : dict
        Content of scores.json: `clusters` maps names to {"scores": {bits: x}}.

    Returns
    -------
    matplotlib.figure.Figure
        Colours are logarithmic; scores of zero or less stay empty.

    Example
    -------
    >>> row = {"scores": {"2": 1.0, "4": 0.1}}
    >>> len(sensitivity_map({"clusters": {"fc": row}}).axes)  # map, colour bar
    2
    """
    names = list(scores["clusters"])
    rows = [
        {float(bits): float(x) for bits, x in cluster["scores"].items()}
        for cluster in scores["clusters"].values()
    ]
    bits = sorted({b for row in rows for b in row})
    table = np.array([[row.get(b, math.nan) for row in rows] for b in bits])
    table = np.ma.masked_invalid(np.where(table > 0, table, math.nan))
    figure = Figure(
        figsize=(min(24, max(9, 0.09 * len(names))), 2.8), layout="constrained"
    )
    axes = figure.subplots()
    norm = LogNorm() if table.count() else None
    style = {"aspect": "auto", "cmap": "viridis", "norm": norm}
    image = axes.imshow(table, interpolation="nearest", **style)
    axes.set_yticks(range(len(bits)), [f"{b:g} bit" for b in bits])
    _cluster_ticks(axes, names)
    figure.colorbar(image, ax=axes, label="sensitivity", pad=0.01)
    return figure


def _place(name):
    """(block label, sublayer) of a cluster name; (None, None) if foreign."""
    found = _SUBLAYER.search(name)
    if found and found[3] in SUBLAYERS:
        return f"{int(found[1]) + 1}-{int(found[2]) + 1}", found[3]
    end = name.rsplit(".", 1)[-1]
    return _ENDS.get(end), end if end in _ENDS else None


def _draw_blocks(axes, clusters, places, blocks):
    """Bars of the sublayers, grouped by ConvBlock."""
    order = list(SUBLAYERS)
    sizes = {}
    for cluster, (block, sublayer) in zip(clusters.values(), places):
        inner = sublayer in SUBLAYERS
        offset = (order.index(sublayer) - 3) / 8.5 if inner else 0
        axes.bar(
            blocks.index(block) + offset,
            cluster["bits"],
            width=1 / 8.5 if inner else 0.4,
            color=SUBLAYERS.get(sublayer, GREY),
        )
        sizes.setdefault(sublayer, []).append(cluster.get("parameters", 0))
    shown = [name for name in (*order, *_ENDS) if name in sizes]
    handles = [
        axes.bar(0, 0, color=SUBLAYERS.get(name, GREY)) for name in shown
    ]
    labels = [f"{name} ({_range(sizes[name])})" for name in shown]
    axes.figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=5,
        title="sublayer (parameters each)",
    )
    axes.set_xticks(range(len(blocks)), blocks)
    axes.set_xlim(-0.7, len(blocks) - 0.3)
    axes.set_xlabel("TCN block m, ConvBlock n")


def _range(sizes):
    """One number, or the span of several."""
    low, high = min(sizes), max(sizes)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _bit_axis(axes, bits):
    """Logarithmic axis, so that 2, 4, 8 and 16 bits lie evenly."""
    axes.set_yscale("log", base=2)
    ticks = sorted({1, 2, 4, 8, 16} | set(bits))
    ticks = [tick for tick in ticks if tick <= max(bits)]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(min(1, min(bits) / 2), max(bits) * 1.25)
    axes.set_ylabel("bits")


def _cluster_ticks(axes, names):
    """Mark the ConvBlocks below a map of clusters, or name all clusters."""
    blocks = [_place(name)[0] for name in names]
    if None in blocks:
        _name_ticks(axes, names)
        return
    middles, labels = [], []
    for block in dict.fromkeys(blocks):
        columns = [i for i, other in enumerate(blocks) if other == block]
        middles.append(np.mean(columns))
        labels.append(block)
        line = {"color": rcParams["axes.edgecolor"], "lw": 0.6}
        axes.axvline(columns[-1] + 0.5, **line)
    axes.set_xticks(middles, labels)
    axes.set_xlabel("TCN block m, ConvBlock n; sublayers from left to right")


def _name_ticks(axes, names):
    """Cluster names as upright labels, thinned out where there are many."""
    step = math.ceil(len(names) / _MOST_LABELS)
    shown = range(0, len(names), step)
    axes.set_xticks(shown, [names[i] for i in shown], rotation=90, fontsize=7)
    axes.set_xlim(-0.7, len(names) - 0.3)
