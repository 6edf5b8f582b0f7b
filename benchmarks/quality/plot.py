"""Pareto plot and table of what `run.py` and our own trainings have measured.

> benchmarks/quality/.venv/bin/python benchmarks/quality/plot.py
> ... benchmarks/quality/plot.py --ours results/   # after your own runs

Writes pareto.png and table.md beside the points. Lines go through the points
of a tool that no smaller one of it equals; nothing is interpolated or fitted.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from speechbrain_mpq.evaluation.task import markdown_table

HERE = Path(__file__).parent
OURS = ("ours, mixed", "ours, uniform")  # labels, drawn bold
UNIFORM = ("uniform", "admm")  # systems of one precision
COLOURS = {
    "ours, mixed": "#e4572e",
    "ours, uniform": "#f3a683",
    "quanto": "#2e86de",
    "hqq": "#17a589",
    "nncf": "#b07cc6",
    "modelopt": "#d9a404",
    "parq": "#5f6caf",
    "diffq": "#8a6d3b",
    "nncodec": "#576574",
}
MEASURES = (  # key, title, whether more is better
    ("si_snr", "SI-SNR, dB", True),
    ("wer", "word error rate, %", False),
)
COLUMNS = ("tool", "setting", "stored bytes", "container", "SI-SNR dB") + (
    "against fp32, dB",
    "PESQ",
    "WER %",
    "p",
    "ours at no more bytes",
)


def read_points(folder):
    """The points that `run.py` wrote.

    Arguments
    ---------
    folder : Path

    Returns
    -------
    full : dict
        The full-precision point.
    points : list of dict
        All others, with a "label" each.
    """
    points = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]
    full = [point for point in points if point["tool"] == "full"]
    if not full:
        raise SystemExit(f"no full-precision point in {folder}: run run.py")
    points = [point for point in points if point["tool"] != "full"]
    for point in points:
        uniform = point["setting"].startswith(UNIFORM)
        ours = OURS[1] if uniform else OURS[0]
        point["label"] = ours if point["tool"] == "ours" else point["tool"]
    return full[0], points


def read_trained(folder):
    """Our trained systems, as points; seeds are averaged.

    Arguments
    ---------
    folder : Path
        Holds `metrics.json` files and, beside them, `plan.json`, as a results
        folder does, or several results folders: these are kept apart.

    Returns
    -------
    points : list of dict
    """
    runs = {}
    for path in sorted(Path(folder).glob("**/metrics.json")):
        metrics = json.loads(path.read_text())
        trained = metrics.get("estimator") != "PostTraining"
        if metrics["bits"] != 32 and trained:
            plan = json.loads(path.with_name("plan.json").read_text())
            key = metrics["system"], metrics["bits"], path.parents[2]
            runs.setdefault(key, []).append((metrics, plan["bytes"]))
    return [_trained(*key, members) for key, members in runs.items()]


def _trained(system, bits, results, members):
    """One point of the runs of a system with several seeds."""
    metrics = [m for m, _ in members]
    point = {
        key: fmean(m["average"][key] for m in metrics)
        for key in ("si_snr", "pesq", "wer")
    }
    seeds = f", {len(members)} seeds" if len(members) > 1 else ""
    mapsswe = metrics[0].get("mapsswe") if len(members) == 1 else None
    return {
        **point,
        "tool": "ours",
        "setting": f"{system} {bits:g}{seeds} ({results.name})",
        "label": OURS[1] if system.startswith(UNIFORM) else OURS[0],
        "post_training": False,
        "stored_bytes": round(fmean(size for _, size in members)),
        "container_bytes": round(fmean(m["model_bytes"] for m in metrics)),
        "mapsswe": mapsswe,
        "test_set": metrics[0]["test_set"],
    }


def front(points, key, more_is_better):
    """The points that are better than every smaller one.

    Arguments
    ---------
    points : list of dict
    key : str
        What is compared.
    more_is_better : bool

    Returns
    -------
    list of dict
        By size.

    Example
    -------
    >>> points = [{"stored_bytes": b, "wer": w} for b, w in [(2, 9), (1, 8)]]
    >>> front(points, "wer", more_is_better=False)
    [{'stored_bytes': 1, 'wer': 8}]
    """
    sign = 1 if more_is_better else -1
    best, kept = None, []
    for point in sorted(
        points, key=lambda p: (p["stored_bytes"], -sign * p[key])
    ):
        if best is None or sign * point[key] > best:
            best = sign * point[key]
            kept.append(point)
    return kept


def draw(full, points):
    """Quality against bytes, post-training and trained apart.

    Arguments
    ---------
    full : dict
        The full-precision point.
    points : list of dict

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    for column, post_training in enumerate((True, False)):
        shown = [p for p in points if p["post_training"] == post_training]
        for row, (key, title, more) in enumerate(MEASURES):
            axes = panels[row][column]
            _draw_panel(axes, shown, key, more)
            axes.axhline(full[key], color="grey", ls="--", lw=1)
            if not column:
                axes.set_ylabel(title)
            if row:
                axes.set_xlabel("stored bytes")
            axes.grid(which="both", alpha=0.3)
        name = "without training" if post_training else "trained"
        panels[0][column].set_title(name, loc="left")
    top, bottom = panels[0][0], panels[1][0]
    top.set_xscale("log")
    ticks = [s * 1000 for s in (200, 300, 400, 500, 600, 800, 1000)]
    bottom.set_xticks(ticks, [f"{t // 1000}k" for t in ticks])
    bottom.minorticks_off()
    top.set_ylim(2, full["si_snr"] + 0.4)  # below: a model that is no use
    bottom.set_ylim(full["wer"] - 3, 60)
    handles = {}
    for axes in panels[0]:
        handles |= dict(zip(*axes.get_legend_handles_labels()[::-1]))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=8
    )
    return figure


def _draw_panel(axes, points, key, more_is_better):
    """Every tool's points and the line through its front."""
    for label, colour in COLOURS.items():
        own = [p for p in points if p["label"] == label]
        if not own:
            continue
        line = front(own, key, more_is_better)
        axes.plot(
            [p["stored_bytes"] for p in line],
            [p[key] for p in line],
            color=colour,
            lw=2.4 if label in OURS else 1.4,
            label=label,
        )
        axes.plot(
            [p["stored_bytes"] for p in own],
            [p[key] for p in own],
            "o" if label in OURS else "s",
            color=colour,
            ms=4,
        )


def table(full, points):
    """All points as a Markdown table.

    Arguments
    ---------
    full : dict
        The full-precision point.
    points : list of dict

    Returns
    -------
    str
    """
    parts = []
    for post_training in (True, False):
        shown = [p for p in points if p["post_training"] == post_training]
        ours = [p for p in shown if p["tool"] == "ours"]
        name = "Without training" if post_training else "Trained"
        shown.sort(key=lambda p: (p["stored_bytes"], p["tool"], p["setting"]))
        rows = [_cells(point, ours) for point in (full, *reversed(shown))]
        parts.append(f"## {name}\n\n{markdown_table(COLUMNS, rows)}")
    return "\n".join(parts)


def _cells(point, ours):
    """What the table says of a point."""
    difference = point.get("si_snr_difference")
    mapsswe = point.get("mapsswe")
    against = "{mean:.2f} [{low:.2f}, {high:.2f}]"
    return (
        point["tool"],
        point["setting"],
        f"{point['stored_bytes']:,}",
        f"{point['container_bytes']:,}",
        f"{point['si_snr']:.2f}",
        against.format(**difference) if difference else "",
        f"{point['pesq']:.2f}",
        f"{point['wer']:.1f}",
        f"{mapsswe['p']:.3f}" if mapsswe else "",
        _our_answer(point, ours),
    )


def _our_answer(point, ours):
    """Our best SI-SNR that takes no more bytes than a peer's point."""
    if point["tool"] in ("ours", "full"):
        return ""
    small = [p for p in ours if p["stored_bytes"] <= point["stored_bytes"]]
    if not small:
        return "none so small"
    best = max(small, key=lambda p: p["si_snr"])
    return (
        f"{best['setting']}: {best['si_snr'] - point['si_snr']:+.2f} dB, "
        f"{best['wer'] - point['wer']:+.1f} % WER"
    )


def main():
    """Read, check, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=Path, default=HERE / "results")
    parser.add_argument("--ours", type=Path, default=HERE.parent / "results")
    arguments = parser.parse_args()
    full, points = read_points(arguments.points)
    points += read_trained(arguments.ours)
    for point in points:
        if point["test_set"] != full["test_set"]:
            raise SystemExit(
                f"{point['tool']} {point['setting']} was scored on another "
                f"test set ({point['test_set']}) than full precision "
                f"({full['test_set']}): measure it again"
            )
    figure = arguments.points / "pareto.png"
    draw(full, points).savefig(figure, dpi=110)
    text = arguments.points / "table.md"
    text.write_text(table(full, points))
    print(f"{len(points)} points in {figure} and {text}")


if __name__ == "__main__":
    main()
