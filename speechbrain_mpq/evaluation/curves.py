"""Curves of the report: size against quality, scores against what came out.

Every function takes plain data and gives a matplotlib figure, in the colours
that matplotlib is set to.
"""

from statistics import fmean

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from .plots import GREY, PALETTE
from .seeds import by_system
from .systems import FULL_PRECISION, KIB, bits_text, full_label

MARKERS = "osD^vPX"
# Title and key of the measured panels.
_MEASURED = (
    ("SI-SNR, dB (higher is better)", "si_snr"),
    ("word error rate, % (lower is better)", "wer"),
)


def pareto(runs, predicted=None, own=True):
    """Quality against the bytes of the file.

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
        SI-SNR, WER and, where it is given, the predicted score.

    Example
    -------
    >>> average = {"si_snr": 8.0, "pesq": 2.0, "wer": 25.0}
    >>> run = {"system": "kl", "bits": 4, "model_bytes": 1024}
    >>> figure = pareto([{**run, "average": average}])
    >>> figure.axes[0].lines[0].get_xydata().tolist()
    [[1.0, 8.0]]
    """
    panels = 2 + bool(predicted)
    figure = Figure(figsize=(4.4 * panels, 3.8), layout="constrained")
    axes = figure.subplots(1, panels)
    for panel, (title, key) in zip(axes, _MEASURED):
        _draw_measured(panel, runs, key, own)
        _size_axis(panel, title)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    if predicted:
        _draw_predicted(axes[2], predicted)
        _size_axis(axes[2], "predicted score (lower is better)")
    return figure


def predicted_and_measured(rows):
    """Predicted against measured loss of whole plans.

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
    """Convergence of ADMM over its iterations.

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
    """Hessian traces of the clusters with their standard errors.

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
