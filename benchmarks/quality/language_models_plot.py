"""Perplexity and word errors of the language models: one table, one plot.

> python benchmarks/quality/language_models_plot.py

Reads what `language_models.py`, `language_model_peers.py` and `rescoring.py`
have left in `benchmarks/results/language_models`, prints the table and writes
`docs/language-models.svg`.
"""

import argparse

from language_models import KEPT, ROOT, in_order, published_result, table

from speechbrain_mpq.utils import read_json

PICTURE = ROOT / "docs/language-models.svg"
# Okabe and Ito's colours, which the colour-blind can tell apart
STYLES = {  # name of rows: label, colour, marker
    "rounded_uniform": ("uniform, rounded", "#56b4e9", "s"),
    "ste_uniform": ("uniform, fine-tuned", "#0072b2", "s"),
    "rounded_midrise": ("four levels at 2 bits, rounded", "#888888", "^"),
    "ste_midrise": ("four levels at 2 bits, fine-tuned", "#000000", "^"),
    "admm_uniform": ("uniform, ADMM", "#cc79a7", "X"),
    "rounded_entropy": ("entropy codebook, rounded", "#e69f00", "o"),
    "calibrated_midrise": ("four levels, calibrated", "#009e73", "^"),
    "calibrated_entropy_uniform": (
        "entropy codebook, calibrated",
        "#009e73",
        "o",
    ),
    "ste_entropy": ("entropy codebook, fine-tuned", "#d55e00", "o"),
    "pretrained": ("the published one, trained for longer", "#d55e00", "*"),
}
TICKS = (200, 400, 800, 1600)  # kB
PUBLISHED = "pretrained/lm_sotu_2bit"
FULL = ("full", "longer")
WORST = 2.0  # times full precision's perplexity; what is above is no use


def points_of(rows, measure):
    """Points of every drawn method.

    Arguments
    ---------
    rows : dict
        Name -> result.
    measure : callable
        Result -> number, or None.

    Returns
    -------
    dict
        Key of `STYLES` -> list of (kilobytes, number), by size.
    """
    points = {key: [] for key in STYLES}
    for name, row in rows.items():
        key = next((k for k in STYLES if name.startswith(k)), None)
        value = measure(row)
        if key and value is not None and row.get("bytes"):
            points[key].append((row["bytes"] / 1000, value))
    return {key: sorted(own) for key, own in points.items()}


def error_of(row, name):
    """Word error rate on a set, None where it was not rescored."""
    return row["sets"].get(name, {}).get("wer")


def draw_panel(axes, points, full, title):
    """Draw one measure."""
    for key, (label, colour, marker) in STYLES.items():
        shown = [p for p in points[key] if p[1] <= WORST * full]
        if shown:
            axes.plot(
                *zip(*shown), color=colour, marker=marker, label=label, lw=1.3
            )
    axes.axhline(full, color="#444444", ls="--", lw=1, label="full precision")
    axes.set_xscale("log", base=2)
    axes.set_xlim(TICKS[0], 1.1 * TICKS[-1])
    axes.set_xticks(TICKS, [f"{tick}" for tick in TICKS])
    axes.minorticks_off()
    axes.set_xlabel("file, kB")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.3)


def draw(perplexities, errors):
    """Draw all panels.

    Arguments
    ---------
    perplexities : dict
        Row -> result of `language_models.py`.
    errors : dict
        Row -> result of `rescoring.py`.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from matplotlib.figure import Figure

    sets = list(errors.get(FULL[1], errors.get(FULL[0], {})).get("sets", {}))
    panels = 1 + len(sets)
    figure = Figure(figsize=(3.6 * panels, 4), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    full = next(perplexities[n] for n in FULL[::-1] if n in perplexities)
    draw_panel(
        axes[0],
        points_of(perplexities, lambda row: row["ppl"]),
        full["ppl"],
        "perplexity of the test addresses",
    )
    full = next((errors[n] for n in FULL[::-1] if n in errors), None)
    for panel, name in zip(axes[1:], sets):
        draw_panel(
            panel,
            points_of(errors, lambda row, n=name: error_of(row, n)),
            full["sets"][name]["wer"],
            f"WER %, {name}",
        )
    shown = {}
    for panel in axes:
        handles, labels = panel.get_legend_handles_labels()
        shown |= dict(zip(labels, handles))
    figure.legend(
        shown.values(),
        shown,
        loc="outside lower center",
        ncols=4,
        fontsize=8,
    )
    return figure


def main():
    """Write the picture."""
    import matplotlib

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="lstm_1234")
    model = parser.parse_args().model
    path = KEPT / f"rescoring_{model}.json"
    errors = read_json(path)["rows"] if path.exists() else {}
    perplexities = in_order(read_json(KEPT / f"{model}.json"))
    path = KEPT / f"peers_{model}.json"
    if path.exists():
        perplexities |= read_json(path)
    if PUBLISHED in errors:
        perplexities[PUBLISHED] = published_result(ROOT / PUBLISHED)
    passes = {n: {} for n, row in errors.items() if "bytes" not in row}
    print(table({**passes, **perplexities}, errors))
    with matplotlib.rc_context({"svg.hashsalt": "language-models"}):
        figure = draw(perplexities, errors)
        figure.savefig(PICTURE, metadata={"Date": None})
    # matplotlib leaves blanks at the ends of lines
    lines = PICTURE.read_text(encoding="utf-8").splitlines()
    text = "\n".join(line.rstrip() for line in lines) + "\n"
    PICTURE.write_text(text, encoding="utf-8")
    print(PICTURE)


if __name__ == "__main__":
    main()
