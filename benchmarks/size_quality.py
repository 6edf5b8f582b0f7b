"""The README's picture: SI-SNR against stored bytes, ours and other tools.

> python benchmarks/size_quality.py

Draws what is kept in `benchmarks/results/entropy` (`best`, whole files),
`benchmarks/results/post_training` and `benchmarks/quality/results` (tensors) to
`docs/size_quality.svg`. The points are written into the file, too, so that a
test can hold them against the results.
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks/results"
OTHERS = ROOT / "benchmarks/quality/results"
PICTURE = ROOT / "docs/size_quality.svg"
WIDEST = 8  # bits; more are as good as full precision
FLOOR = 2.0  # dB; what is below is no use to anybody
# Okabe and Ito's colours, which the colour-blind can tell apart
STYLES = {  # label: colour, marker
    "speechbrain_mpq, best": ("#D55E00", "o"),
    "uniform, same rounding": ("#0072B2", "s"),
    "PARQ (trained)": ("#666666", "X"),
    "HQQ": ("#009E73", "^"),
    "NNCF": ("#CC79A7", "D"),
    "ModelOpt": ("#56B4E9", "v"),
    "quanto": ("#E69F00", "P"),
}
BEST, UNIFORM = list(STYLES)[:2]
TITLE = (
    "Separation quality for the bytes: 200 unseen mixtures, "
    "no training after quantization (but PARQ)"
)


def read_points():
    """Every drawn point, by label.

    Returns
    -------
    points : dict of str -> list of [float, float, float or None]
        Stored kB, SI-SNR in dB, average bits where they are ours; by size.
        "full precision" has one.
    """
    points = {label: [] for label in STYLES}
    ours = ((BEST, "entropy/best"), (UNIFORM, "post_training/uniform"))
    for label, system in ours:
        for path in KEPT.glob(f"{system}*_*bit/1234/metrics.json"):
            metrics = json.loads(path.read_text(encoding="utf-8"))
            if metrics["bits"] > WIDEST:
                continue
            size = metrics["model_bytes"]
            if label == UNIFORM:  # as of the other tools, without a header
                plan = path.with_name("plan.json").read_text(encoding="utf-8")
                size = json.loads(plan)["bytes"]
            points[label].append(
                [*_point(size, metrics["average"]), metrics["bits"]]
            )
    names = {label.split()[0].lower(): label for label in STYLES}
    for path in OTHERS.glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["tool"] == "full":
            points["full precision"] = [
                [*_point(result["stored_bytes"], result), 32]
            ]
        elif result["tool"] in names:
            points[names[result["tool"]]].append(
                [*_point(result["stored_bytes"], result), None]
            )
    return {label: _front(own) for label, own in points.items()}


def draw(points):
    """Draw the points.

    Arguments
    ---------
    points : dict
        From `read_points`.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for label, (colour, marker) in STYLES.items():
        shown = [p for p in points[label] if p[1] >= FLOOR]
        axes.plot(
            [p[0] for p in shown],
            [p[1] for p in shown],
            color=colour,
            marker=marker,
            ms=9 if label == BEST else 7,
            lw=3.2 if label == BEST else 1.3,
            zorder=3 if label == BEST else 2,
            label=label,
        )
    for label, usual in ((BEST, (-6, 9)), (UNIFORM, (5, -15))):
        for kb, db, bits in points[label]:
            lowest = label == UNIFORM and bits == 2
            axes.annotate(
                f"{bits:g} bit" if bits == 2 else f"{bits:g}",
                (kb, db),
                (9, -6) if lowest else usual,
                textcoords="offset points",
                color=STYLES[label][0],
                fontsize=9,
            )
    kb, db, _ = points["full precision"][0]
    axes.axhline(db, color="#444444", ls="--", lw=1, zorder=1)
    axes.annotate(
        f"full precision, {kb:.0f} kB",
        (0.99, db),
        (0, 8),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        color="#444444",
        fontsize=9,
    )
    axes.set_xscale("log")
    ticks = (250, 300, 400, 500, 700, 1000)
    axes.set_xticks(ticks, [f"{tick}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("stored weights, kB (log)")
    axes.set_ylabel("SI-SNR, dB")
    axes.set_ylim(FLOOR, db + 0.8)
    axes.set_title(TITLE, loc="left", fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=2, frameon=False, loc="lower right", fontsize=9)
    return figure


def main():
    """Write the picture."""
    import matplotlib

    points = read_points()
    with matplotlib.rc_context({"svg.hashsalt": "size_quality"}):
        draw(points).savefig(
            PICTURE,
            metadata={
                "Date": None,
                "Title": TITLE,
                "Description": json.dumps(points),
            },
        )
    # matplotlib leaves blanks at the ends of lines
    text = PICTURE.read_text(encoding="utf-8")
    lines = [line.rstrip() for line in text.splitlines()]
    PICTURE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(PICTURE)


def _point(size, measures):
    """Stored kB and SI-SNR, as the picture has them."""
    return [round(size / 1000, 1), round(measures["si_snr"], 2)]


def _front(points):
    """Those that are better than every smaller one, by size."""
    kept = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return kept


if __name__ == "__main__":
    main()
