"""Table and plot of the points that plans.py measures."""

from statistics import fmean, stdev

from matplotlib.figure import Figure

UNIFORM, RANDOM = "uniform", "RandomScores"  # names of points


def table(points, budgets, full_precision):
    """Plain table: a row for each score, random plans in one.

    Arguments
    ---------
    points : list of dict
        With "scores", "bits", "bytes", "si_snr".
    budgets : sequence of float
        Average bits, one column each.
    full_precision : float
        SI-SNR in dB.

    Returns
    -------
    table : str

    Example
    -------
    >>> rows = [("uniform", 8.0), ("RandomScores:seed=0", 5.0)]
    >>> rows += [("RandomScores:seed=1", 7.0), ("KLScores", 8.5)]
    >>> points = [
    ...     {"scores": s, "bits": 4, "bytes": 1024, "si_snr": x}
    ...     for s, x in rows
    ... ]
    >>> print(table(points, [4], 9.0))
    SI-SNR dB (KiB)         4 bit
    -----------------------------
    full precision           9.00
    uniform            8.00 (1.0)
    random, mean of 2  6.00 (1.0)
    random, sd               1.41
    random, best             7.00
    KLScores           8.50 (1.0)
    """
    random = [p for p in points if p["scores"].startswith(RANDOM)]
    others = dict.fromkeys(p["scores"] for p in points if p not in random)

    def column(bits):
        cells = {"full precision": f"{full_precision:.2f}"}
        for name in others:
            for p in points:
                if (p["scores"], p["bits"]) == (name, bits):
                    cells[name] = f"{p['si_snr']:.2f} ({p['bytes'] / 1024:.1f})"
        drawn = [p["si_snr"] for p in random if p["bits"] == bits]
        if drawn:
            size = max(p["bytes"] for p in random if p["bits"] == bits)
            mean = f"{fmean(drawn):.2f} ({size / 1024:.1f})"
            cells[f"random, mean of {len(drawn)}"] = mean
            spread = stdev(drawn) if len(drawn) > 1 else 0.0
            cells["random, sd"] = f"{spread:.2f}"
            cells["random, best"] = f"{max(drawn):.2f}"
        return cells

    columns = [column(bits) for bits in budgets]
    names = list(dict.fromkeys(name for cells in columns for name in cells))
    first = ("full precision", UNIFORM)
    names.sort(key=lambda n: (n not in first, not n.startswith("random")))
    head = ["SI-SNR dB (KiB)", *(f"{bits:g} bit" for bits in budgets)]
    rows = [[n, *(cells.get(n, "-") for cells in columns)] for n in names]
    widths = [max(map(len, cells)) for cells in zip(head, *rows)]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        )
        for row in (head, *rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plot(path, points, full_precision):
    """Draw SI-SNR against bytes, random plans as dots."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(full_precision, color="grey", ls="--", label="full precision")
    random = [p for p in points if p["scores"].startswith(RANDOM)]
    axes.plot(
        [p["bytes"] / 1024 for p in random],
        [p["si_snr"] for p in random],
        ".",
        color="lightgrey",
        label="random plans",
    )
    for name in dict.fromkeys(p["scores"] for p in points if p not in random):
        line = sorted(
            (p["bytes"] / 1024, p["si_snr"])
            for p in points
            if p["scores"] == name
        )
        axes.plot(*zip(*line), marker="o", ms=4, label=name)
    axes.set_xlabel("KiB")
    axes.set_ylabel("SI-SNR, dB")
    axes.grid()
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
