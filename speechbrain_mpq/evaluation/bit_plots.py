"""Figures of the report: bits and sensitivity of every cluster.

Names as `mask_net.tcn_0_3.d_conv` are drawn by ConvBlock and sublayer as in
the paper's Fig. 3, which counts from 1; any other name gets a plain place.
"""

import math
import re

import numpy as np
from matplotlib import rcParams
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from .plots import GREY, PALETTE

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
    """Bits of every cluster, drawn as the paper's Fig. 3 where names allow.

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
    """Heat map of the sensitivity of every cluster at every bit width.

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
