"""Figures of the report: quality by bucket, training, directions.

Every function takes plain data and gives a matplotlib figure. Colours of text
and grid are matplotlib's settings, so that one figure can be drawn for light
and for dark pages.
"""

import math

import numpy as np
from matplotlib.figure import Figure

from .metrics import BUCKET_NAMES

GREY = "#8a8f98"
PALETTE = ("#e4572e", "#2e86de", "#17a589", "#b07cc6", "#d9a404", "#5dade2")
# Title, its key and the mixture's in a bucket, least height of the axis.
_PANELS = (
    ("SI-SNR, dB (higher is better)", "si_snr", "si_snr_mixture", 3),
    ("PESQ, wide band (higher is better)", "pesq", None, 0.5),
    ("word error rate, % (lower is better)", "wer", "wer_mixture", 10),
)


def quality_by_bucket(names, metrics):
    """SI-SNR, PESQ and word error rate by angle bucket.

    Arguments
    ---------
    names : list[str]
        Name of each system.
    metrics : list[dict]
        Contents of metrics.json files; the first system stands out.

    Returns
    -------
    matplotlib.figure.Figure
        Three panels; the mixture is dashed.

    Example
    -------
    >>> empty = dict.fromkeys(["si_snr", "si_snr_mixture", "pesq", "wer"])
    >>> metrics = {"buckets": dict.fromkeys(BUCKET_NAMES, empty)}
    >>> len(quality_by_bucket(["kl"], [metrics]).axes)
    3
    """
    figure = Figure(figsize=(10.5, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, panel in zip(panels, _PANELS):
        title, key, mixture, least_span = panel
        if mixture:
            values = _by_bucket(metrics[0], mixture)
            style = {"color": GREY, "ls": "--", "marker": ".", "lw": 1.2}
            axes.plot(BUCKET_NAMES, values, label="mixture", **style)
        for index in reversed(range(len(metrics))):
            axes.plot(
                BUCKET_NAMES,
                _by_bucket(metrics[index], key),
                label=names[index],
                color=PALETTE[index % len(PALETTE)],
                marker="o" if index == 0 else "s",
                lw=2.6 if index == 0 else 1.5,
                ms=6 if index == 0 else 4,
            )
        _widen(axes, least_span)
        axes.set_title(title, loc="left")
        axes.set_xlabel("angle between the speakers, degrees")
        axes.grid(axis="y")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="outside lower center", ncols=6
    )
    return figure


def training_curve(curve):
    """Losses and scores over the epochs of a training.

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
    """Directions of the speakers seen from above, the array at the bottom.

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


def _by_bucket(metrics, key):
    """Values of the buckets; NaN, which leaves a gap, where unknown."""
    values = (metrics["buckets"][name].get(key) for name in BUCKET_NAMES)
    return [math.nan if value is None else value for value in values]


def _on_circle(angle, radius):
    """Point at an angle in degrees."""
    turn = math.radians(angle)
    return radius * math.cos(turn), radius * math.sin(turn)
