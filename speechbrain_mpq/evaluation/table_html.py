"""The results table as a part of a page."""

from .page import tag, text
from .sections import table_row
from .table import table_notes
from .table_cells import difference_cells, table_cells


def table_section(runs, against=None, seeds="all", ours=False):
    """The results table, what its marks say, and differences by seed.

    Arguments
    ---------
    runs : list[dict]
        Contents of metrics.json files, in the order of the rows.
    against : sequence of str | None
        Baselines of the marks, see `marks.choose_baselines`.
    seeds : str
        "all" or "mean", see `table_cells.table_cells`.
    ours : bool
        Whether the page is about the first run: its row stands out.

    Returns
    -------
    str
        HTML.

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
    >>> html = table_section(
    ...     [{"system": "<kl>", "bits": 4, **summarise([item])}]
    ... )
    >>> "<td>&lt;kl&gt;</td>" in html, "<td>9.00(2.00)</td>" in html
    (True, False)
    """
    groups, header, rows = table_cells(runs, against, seeds)
    starts, column = set(), 0
    for _, columns in groups:
        starts.add(column)
        column += columns
    starts.discard(0)
    titles = "".join(
        tag("th", text(title), colspan=columns) for title, columns in groups
    )
    head = tag("tr", titles) + table_row(header, starts, "th")
    # Row 0 is the mixture, row 1 the first run.
    body = "".join(
        table_row(row, starts, class_="ours" if ours and index == 1 else "")
        for index, row in enumerate(rows)
    )
    notes = table_notes(runs, against, seeds)
    return (
        _table(head, body, class_="results")
        + "".join(tag("p", text(note), class_="soft") for note in notes)
        + _differences(runs)
    )


def _differences(runs):
    """Differences between systems of equal bytes, where seeds allow."""
    header, rows = difference_cells(runs)
    if not rows:
        return ""
    note = (
        "Mean and standard deviation, over the seeds, of the difference "
        "between two systems whose files are of one size."
    )
    body = "".join(table_row(row) for row in rows)
    return (
        tag("h2", "Differences at equal bytes")
        + tag("p", text(note))
        + _table(table_row(header, element="th"), body)
    )


def _table(head, body, **attributes):
    """A table that scrolls where it is wide."""
    inner = tag("thead", head) + tag("tbody", body)
    return tag("div", tag("table", inner, **attributes), class_="scroll")
