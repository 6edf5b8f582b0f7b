"""Systems and their runs: names, order and sizes in words.

A run is the content of one metrics.json, a dict. Runs that differ in nothing
but their seed are one system.
"""

FULL_PRECISION = 32  # bits
KIB = 2**10  # bytes
MIB = 2**20  # bytes
# Rows of the paper's Table 1 in its order; others come behind, by name.
_PAPER_ORDER = ("uniform", "hes", "kl", "nas")


def bits_text(run):
    """Average bits of a run, without needless decimals.

    Arguments
    ---------
    run : dict
        With "bits" and, where it is known, "average_bits".

    Returns
    -------
    str

    Example
    -------
    >>> bits_text({"bits": 4, "average_bits": 4.031}), bits_text({"bits": 2})
    ('4.03', '2')
    """
    bits = run.get("average_bits") or run["bits"]
    return f"{bits:.2f}".rstrip("0").rstrip(".")


def label(run):
    """Name of a system with its bits.

    Arguments
    ---------
    run : dict
        Content of metrics.json.

    Returns
    -------
    str
        As "kl 4.03 bit"; full precision goes without bits.

    Example
    -------
    >>> label({"system": "kl", "bits": 4, "average_bits": 4.031})
    'kl 4.03 bit'
    >>> label({"system": "fp32", "bits": 32})
    'fp32'
    """
    if run["bits"] >= FULL_PRECISION:
        return run["system"]
    return f"{run['system']} {bits_text(run)} bit"


def size_text(size):
    """Bytes as text, in KiB below one MiB.

    Arguments
    ---------
    size : int
        Bytes.

    Returns
    -------
    str
        As "293 KiB" or "2.00 MiB".

    Example
    -------
    >>> size_text(300000), size_text(2 * 2**20)
    ('293 KiB', '2.00 MiB')
    """
    return f"{size / KIB:.0f} KiB" if size < MIB else f"{size / MIB:.2f} MiB"


def table_order(run):
    """Sort key that puts runs into the order of the paper's Table 1.

    Arguments
    ---------
    run : dict
        Content of metrics.json.

    Returns
    -------
    tuple
        Full precision first, then uniform precision by bits, then the other
        methods, each by bits and seed.

    Example
    -------
    >>> runs = [("kl", 4), ("uniform", 8), ("hes", 8), ("fp32", 32)]
    >>> runs = [{"system": name, "bits": bits} for name, bits in runs]
    >>> [run["system"] for run in sorted(runs, key=table_order)]
    ['fp32', 'uniform', 'hes', 'kl']
    """
    name = run["system"]
    known = name in _PAPER_ORDER
    return (
        run["bits"] < FULL_PRECISION,
        _PAPER_ORDER.index(name) if known else len(_PAPER_ORDER),
        name,
        run["bits"],
        run.get("estimator") or "",
        run.get("seed") or 0,
    )


def system_key(run):
    """What makes two runs one system: all but the seed.

    Arguments
    ---------
    run : dict
        Content of metrics.json.

    Returns
    -------
    tuple
    """
    return run["system"], run["bits"], run.get("estimator")


def full_label(run, runs):
    """Label of a run, with its estimation where others need it to differ.

    Arguments
    ---------
    run : dict
        Content of metrics.json.
    runs : sequence of dict
        All that are shown together.

    Returns
    -------
    str

    Example
    -------
    >>> one = {"system": "kl", "bits": 4, "estimator": "ADMM"}
    >>> (
    ...     full_label(one, [one]),
    ...     full_label(one, [one, {**one, "estimator": "x"}]),
    ... )
    ('kl 4 bit', 'kl 4 bit ADMM')
    """
    same = [
        other.get("estimator")
        for other in runs
        if (other["system"], other["bits"]) == (run["system"], run["bits"])
    ]
    several = len(set(same)) > 1 and run.get("estimator")
    return f"{label(run)} {run['estimator']}" if several else label(run)
