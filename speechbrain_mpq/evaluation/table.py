"""The results table, laid out like Table 1 of the paper."""

from statistics import fmean

from .files import gather, load_metrics, write_json
from .mapsswe import SIGNIFICANCE_LEVEL
from .metrics import (
    BUCKET_NAMES,
    BUCKETS,
    bucket_of,
    hash_test_set,
    significance,
    summarise,
)

__all__ = [
    "BUCKETS",
    "BUCKET_NAMES",
    "bucket_of",
    "check_same_test_set",
    "gather",
    "load_metrics",
    "results_table",
    "significance",
    "summarise",
    "table_cells",
    "table_notes",
    "write_json",
]

KIB = 2**10  # bytes
MIB = 2**20  # bytes
NOTHING = "-"  # shown where a value is not known


def results_table(metrics):
    """Table of several systems scored on one test set, as plain text.

    Arguments
    ---------
    metrics : list[dict]
        Contents of metrics.json files, one row each.

    Returns
    -------
    str
        SI-SNR (PESQ) and word error rate by angle bucket, size and time. A
        star marks a word error rate that does not differ significantly from
        the baseline's.

    Example
    -------
    >>> item = {
    ...     "id": "a",
    ...     "angle": 7.0,
    ...     "si_snr": 9.0,
    ...     "si_snr_mixture": 0.0,
    ...     "pesq": 2.0,
    ...     "reference": "set red",
    ...     "hypothesis": "set blue",
    ... }
    >>> row = {"system": "kl", "bits": 4, **summarise([item])}
    >>> print(results_table([row]).splitlines()[-1].split()[:3])
    ['kl', '4', '9.00(2.00)']
    """
    groups, header, rows = table_cells(metrics)
    table = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = [_group_line(groups, widths)]
    lines += [_line(row, widths) for row in table]
    lines.insert(2, "-" * len(lines[1]))
    return "\n".join([*lines, *table_notes(metrics)])


def table_cells(metrics):
    """Cells of the results table as text.

    Arguments
    ---------
    metrics : list[dict]
        Contents of metrics.json files.

    Returns
    -------
    tuple
        (groups, header, rows): groups are (title, number of columns) and lie
        over the header; the first row is the unprocessed mixture's.

    Example
    -------
    >>> item = {
    ...     "id": "a",
    ...     "angle": 7.0,
    ...     "si_snr": 9.0,
    ...     "si_snr_mixture": 0.0,
    ...     "pesq": 2.0,
    ...     "reference": "set red",
    ...     "hypothesis": "set blue",
    ... }
    >>> row = {"system": "kl", "bits": 4, **summarise([item])}
    >>> groups, header, rows = table_cells([row])
    >>> groups[1], rows[0][:3], rows[1][7:9]
    (('SI-SNR dB (PESQ)', 5), ['mixture', '-', '0.00'], ['50.0', '-'])
    """
    check_same_test_set(metrics)
    sizes = [m["model_bytes"] for m in metrics if m.get("model_bytes")]
    unit, name = (KIB, "KiB") if max(sizes, default=0) < MIB else (MIB, "MiB")
    groups = [
        ("", 2),
        ("SI-SNR dB (PESQ)", len(BUCKETS) + 1),
        ("WER %", len(BUCKETS) + 1),
        ("", 2),
    ]
    names = [*BUCKET_NAMES, "avg."]
    header = ["system", "#bit", *names, *names, name, "s/hour"]
    many_seeds = len({m.get("seed") for m in metrics}) > 1
    rows = [_mixture_row(metrics[0])]
    rows += [_system_row(m, unit, many_seeds) for m in metrics]
    return groups, header, rows


def table_notes(metrics):
    """Lines below the table on what the star says.

    Arguments
    ---------
    metrics : list[dict]
        Contents of metrics.json files.

    Returns
    -------
    list[str]
        None or one line.
    """
    tests = [m["mapsswe"] for m in metrics if m.get("mapsswe")]
    baselines = sorted({test["against"] for test in tests})
    untested = [m["system"] for m in metrics if not m.get("mapsswe")]
    if not baselines:
        return []
    note = (
        f"* no significant WER difference from {', '.join(baselines)} "
        f"(MAPSSWE, p >= {SIGNIFICANCE_LEVEL})"
    )
    untested = [name for name in untested if name not in baselines]
    if untested:
        note += f"; not tested: {', '.join(untested)}"
    return [note]


def check_same_test_set(metrics):
    """Refuse systems that were scored on different test sets.

    Arguments
    ---------
    metrics : list[dict]
        Contents of metrics.json files, each with `test_set` or `items`.
    """
    if not metrics:
        raise ValueError("a table needs the metrics of at least one system")
    if len(metrics) == 1:
        return
    tested = {}
    for m in metrics:
        tested.setdefault(_test_set(m), []).append(f"{m['system']} {m['bits']}")
    if len(tested) > 1:
        sides = "; ".join(
            f"{', '.join(systems)} on {test_set}"
            for test_set, systems in tested.items()
        )
        raise ValueError(
            f"systems were scored on different test sets ({sides}): "
            "evaluate them again on one"
        )


def _test_set(metrics):
    """Hash of the test set of a system."""
    if metrics.get("test_set"):
        return metrics["test_set"]
    if metrics.get("items"):
        return hash_test_set(metrics["items"])
    raise ValueError(
        f"the metrics of {metrics['system']} {metrics['bits']} tell no "
        "`test_set`: evaluate it again"
    )


def _mixture_row(metrics):
    """Cells of the unprocessed mixture."""
    buckets = [metrics["buckets"][name] for name in BUCKET_NAMES]
    si_snr = [bucket["si_snr_mixture"] for bucket in buckets]
    wer = [bucket.get("wer_mixture") for bucket in buckets]
    wer = [_number(value, 1) for value in [*wer, _mean(wer)]]
    return [
        "mixture",
        NOTHING,
        *(_number(value, 2) for value in [*si_snr, _mean(si_snr)]),
        *wer[:-1],
        wer[-1] + " ",
        NOTHING,
        NOTHING,
    ]


def _system_row(metrics, unit, with_seed):
    """Cells of one system."""
    blocks = [metrics["buckets"][name] for name in BUCKET_NAMES]
    blocks.append(metrics["average"])
    name = metrics["system"]
    if with_seed:
        name += f" (seed {metrics.get('seed', '?')})"
    quality = [_number(block["si_snr"], 2) for block in blocks]
    for index, block in enumerate(blocks):
        if block["pesq"] is not None:
            quality[index] += f"({block['pesq']:.2f})"
    wer = [_number(block["wer"], 1) for block in blocks]
    wer[-1] += _mark(metrics) or " "  # keeps the digits in one column
    size = metrics.get("model_bytes") or None
    return [
        name,
        bits_text(metrics),
        *quality,
        *wer,
        _number(size and size / unit, 1 if unit == KIB else 2),
        _number(metrics.get("seconds_per_hour") or None, 1),
    ]


def bits_text(metrics):
    """Average bits of a system, without needless decimals."""
    bits = metrics.get("average_bits") or metrics["bits"]
    return f"{bits:.2f}".rstrip("0").rstrip(".")


def _mark(metrics):
    """Star where the test against the baseline found no difference."""
    test = metrics.get("mapsswe")
    return "*" if test and test["p"] >= SIGNIFICANCE_LEVEL else ""


def _group_line(groups, widths):
    """Titles over the columns they span."""
    parts, first = [], 0
    for title, columns in groups:
        span = widths[first : first + columns]
        parts.append(title.center(sum(span) + 2 * (columns - 1)))
        first += columns
    return "  ".join(parts).rstrip()


def _line(row, widths):
    """One row: the first cell to the left, the others to the right."""
    cells = [row[0].ljust(widths[0])]
    cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
    return "  ".join(cells)


def _number(value, decimals):
    """A number as text, or a dash."""
    return NOTHING if value is None else f"{value:.{decimals}f}"


def _mean(values):
    """Mean, or None where one is None."""
    return None if None in values else fmean(values)
