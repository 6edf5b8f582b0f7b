"""Table of the systems that joint_budget.py measures."""

from speechbrain_mpq.evaluation.metrics import significance, summarise

COLUMNS = (
    *("bits", "plan", "rounding", "separator", "recognizer", "KiB"),
    *("KL", "SI-SNR dB", "WER %", "p full", "p own"),
)
TO_THE_LEFT = ("plan", "rounding")


def table(rows):
    """Plain table: a row for each system, budget after budget.

    Arguments
    ---------
    rows : list of dict
        From `with_metrics`.

    Returns
    -------
    table : str

    Example
    -------
    >>> full = {"plan": "full precision", "bits": 32, "si_snr": 9, "wer": 22}
    >>> print(table([full]).splitlines()[-1])
      32  full precision...9.00   22.0
    """
    lines = [COLUMNS, *[_cells(row) for row in rows]]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = [
        "  ".join(
            cell.ljust(width) if name in TO_THE_LEFT else cell.rjust(width)
            for name, cell, width in zip(COLUMNS, line, widths)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def _cells(row):
    """The cells of one row."""
    cells = [f"{row['bits']:g}", row["plan"], row.get("rounding", "")]
    for model in ("separator", "recognizer"):
        bits = row.get(f"{model}_bits")
        cells.append("" if bits is None else f"{bits:.2f}")
    size = row.get("bytes")
    cells.append("" if size is None else f"{size / 1024:.0f}")
    cells.append(f"{row['kl']:.3f}" if "kl" in row else "")
    cells += [f"{row['si_snr']:.2f}", f"{row['wer']:.1f}"]
    for rival in ("full", "own"):
        test = row.get(f"against_{rival}")
        itself = rival == row["plan"]
        cells.append("" if test is None or itself else f"{test['p']:.3f}")
    return cells


def with_metrics(results):
    """Averages and significance of every system, without its items.

    Arguments
    ---------
    results : dict
        From `joint_budget.measure_all`.

    Returns
    -------
    rows : list of dict
    """
    full = results["full"]["items"]
    own = {
        (s["bits"], s["rounding"]): s["items"]
        for s in results["systems"]
        if s["plan"] == "own"
    }
    rows = [{"plan": "full precision", "bits": 32, **_averages(full)}]
    for system in sorted(results["systems"], key=_order):
        items = system["items"]
        row = {key: system[key] for key in system if key != "items"}
        row |= _averages(items)
        row["against_full"] = significance(items, full)
        rival = own[system["bits"], system["rounding"]]
        row["against_own"] = significance(items, rival, "own")
        rows.append(row)
    return rows


def _averages(items):
    """WER by bucket; averages of WER and SI-SNR."""
    summary = summarise(items)
    buckets = {k: b["wer"] for k, b in summary["buckets"].items()}
    average = summary["average"]
    return {"si_snr": average["si_snr"], "wer": average["wer"], "by": buckets}


def _order(system):
    """Budget after budget, the plainer rounding first."""
    return -system["bits"], system["rounding"] != "nearest"
