"""The results table as plain text, laid out like Table 1 of the paper."""

from .mapsswe import SIGNIFICANCE_LEVEL
from .marks import choose_baselines, significance_marks
from .seeds import by_system
from .systems import full_label, system_key
from .table_cells import difference_cells, table_cells

_TO_THE_LEFT = ("sys", "system", "estimation", "same size, by seed")


def results_table(runs, against=None, seeds="all"):
    """Table of several systems scored on one test set, as plain text.

    Arguments
    ---------
    runs : list[dict]
        Contents of metrics.json files, in the order of the rows.
    against : sequence of str | None
        Baselines that marks refer to, see `marks.choose_baselines`.
    seeds : str
        "all" or "mean", see `table_cells.table_cells`.

    Returns
    -------
    str
        SI-SNR (PESQ) and word error rate by angle bucket, size, compression
        ratio and time; below it what the marks say and, where systems have
        several seeds, the differences between those of equal bytes.

    Example
    -------
    >>> from .metrics import summarise
    >>> item = {
    ...     "id": "a",
    ...     "angle": 7.0,
    ...     "si_snr": 9.0,
    ...     "si_snr_mixture": 0.0,
    ...     "pesq": 2.0,
    ...     "reference": "set red",
    ...     "hypothesis": "set blue",
    ... }
    >>> run = {"system": "kl", "bits": 4, **summarise([item])}
    >>> print(results_table([run]).splitlines()[-1].split()[:4])
    ['1', 'kl', '4', '9.00(2.00)']
    """
    groups, header, rows = table_cells(runs, against, seeds)
    lines = _aligned(header, rows)
    lines.insert(0, _group_line(groups, _widths(header, rows)))
    lines += table_notes(runs, against, seeds)
    header, rows = difference_cells(runs)
    if rows:
        lines += ["", *_aligned(header, rows)]
    return "\n".join(lines)


def table_notes(runs, against=None, seeds="all"):
    """Lines below the table on what the marks say.

    Arguments
    ---------
    runs : list[dict]
        Contents of metrics.json files.
    against : sequence of str | None
        Baselines, see `marks.choose_baselines`.
    seeds : str
        "all" or "mean".

    Returns
    -------
    list[str]
        One line for each baseline that something was tested against, and one
        on the rows over several seeds.

    Example
    -------
    >>> test = {"against": "fp32", "z": 0.8, "p": 0.42, "segments": 90}
    >>> kl = {"system": "kl", "bits": 4, "mapsswe": test}
    >>> table_notes([kl, {"system": "fp32", "bits": 32}])
    ['* no significant WER difference from sys 2, fp32 (MAPSSWE, p >= 0.05)']
    """
    baselines = choose_baselines(runs, against)
    marks = [significance_marks(run, runs, baselines) for run in runs]
    systems = by_system(runs)
    numbers = {system_key(s[0]): n for n, s in enumerate(systems, 1)}
    names = {key: full_label(s[0], runs) for key, s in zip(numbers, systems)}
    notes = []
    for mark, key in baselines.items():
        outcomes = [own[mark] for own in marks if mark in own]
        if set(outcomes) <= {None}:
            continue
        note = (
            f"{mark} no significant WER difference from sys {numbers[key]}, "
            f"{names[key]} (MAPSSWE, p >= {SIGNIFICANCE_LEVEL})"
        )
        untested = [
            names[system_key(run)]
            for run, own in zip(runs, marks)
            if own.get(mark, True) is None
        ]
        if untested:
            note += f"; not tested: {', '.join(dict.fromkeys(untested))}"
        notes.append(note)
    if len(systems) < len(runs):
        over = "mean and standard deviation over the seeds of a system"
        marked = "; marked if no seed differs" if notes else ""
        notes.append(f"mean, ± sd: {over}{marked}")
    return notes


def _aligned(header, rows):
    """Lines of a table with its columns aligned, ruled below the header."""
    widths = _widths(header, rows)
    left = [title in _TO_THE_LEFT for title in header]
    lines = [
        "  ".join(
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(row, widths, left)
        )
        for row in (header, *rows)
    ]
    lines.insert(1, "-" * len(lines[0]))
    return lines


def _widths(header, rows):
    """Width of every column."""
    return [max(map(len, column)) for column in zip(header, *rows)]


def _group_line(groups, widths):
    """Titles over the columns they span."""
    parts, first = [], 0
    for title, columns in groups:
        span = widths[first : first + columns]
        parts.append(title.center(sum(span) + 2 * (columns - 1)))
        first += columns
    return "  ".join(parts).rstrip()
