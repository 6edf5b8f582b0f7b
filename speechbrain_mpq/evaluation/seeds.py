"""Runs of one system with several seeds: means, and differences by seed."""

from itertools import combinations
from statistics import fmean, stdev

from .metrics import AVERAGED
from .systems import full_label, label, system_key

EQUAL_BYTES = 0.01  # largest relative difference of sizes called equal


def by_system(runs):
    """Runs of every system, in the order of their first run.

    Arguments
    ---------
    runs : sequence of dict
        Contents of metrics.json files.

    Returns
    -------
    list of list of dict
        One list a system; two runs with one seed are refused.

    Example
    -------
    >>> runs = [{"system": "kl", "bits": 4, "seed": seed} for seed in (1, 2)]
    >>> [len(system) for system in by_system(runs)]
    [2]
    >>> by_system([*runs, runs[0]])
    Traceback (most recent call last):
    ...
    ValueError: two runs of kl 4 bit have the seed 1: ...
    """
    systems = {}
    for run in runs:
        others = systems.setdefault(system_key(run), [])
        for other in others:
            if other.get("seed") == run.get("seed"):
                raise ValueError(
                    f"two runs of {label(run)} have the seed "
                    f"{run.get('seed')}{_places(other, run)}: leave one out, "
                    "or run it again with a --system name of its own"
                )
        others.append(run)
    return list(systems.values())


def mean_and_spread(runs):
    """Mean and standard deviation of a system's runs over its seeds.

    Arguments
    ---------
    runs : sequence of dict
        Runs of one system, at least two.

    Returns
    -------
    tuple of dict
        Two dicts of a run's shape with the numbers of the table; None where
        one of the runs does not know a number.

    Example
    -------
    >>> runs = [
    ...     {"buckets": {}, "average": {"si_snr": x, "pesq": 2.0, "wer": None}}
    ...     for x in (8.0, 9.0)
    ... ]
    >>> mean, spread = mean_and_spread(runs)
    >>> mean["average"]
    {'si_snr': 8.5, 'pesq': 2.0, 'wer': None}
    >>> round(spread["average"]["si_snr"], 3)
    0.707
    """
    return tuple(_over_seeds(runs, merge) for merge in (fmean, stdev))


def paired_differences(runs, tolerance=EQUAL_BYTES):
    """Differences between systems of equal bytes, seed by seed.

    Arguments
    ---------
    runs : sequence of dict
        Contents of metrics.json files.
    tolerance : float
        Largest difference of two sizes over the larger.

    Returns
    -------
    list of dict
        `{"system", "against", "n", "si_snr", "pesq", "wer"}` for every pair
        with two common seeds or more; the last three are (mean, standard
        deviation) of system minus against, or None where not all are known.

    Example
    -------
    >>> def run(system, seed, wer):
    ...     average = {"si_snr": 7.0, "pesq": None, "wer": wer}
    ...     return {
    ...         "system": system,
    ...         "bits": 4,
    ...         "seed": seed,
    ...         "model_bytes": 1000,
    ...         "average": average,
    ...     }
    >>> runs = [run("uniform", 1, 28.0), run("uniform", 2, 29.0)]
    >>> runs += [run("kl", 1, 26.0), run("kl", 2, 26.0)]
    >>> pair = paired_differences(runs)[0]
    >>> pair["system"], pair["against"], pair["n"], pair["wer"][0]
    ('kl 4 bit', 'uniform 4 bit', 2, -2.5)
    """
    pairs = []
    for first, second in combinations(by_system(runs), 2):
        theirs = {run.get("seed"): run for run in first}
        common = [
            (run, theirs[run.get("seed")])
            for run in second
            if run.get("seed") in theirs
        ]
        if len(common) < 2 or not all(
            _equal_bytes(*pair, tolerance) for pair in common
        ):
            continue
        row = {"system": full_label(second[0], runs), "n": len(common)}
        row["against"] = full_label(first[0], runs)
        for key in AVERAGED:
            row[key] = _difference_of(common, key)
        pairs.append(row)
    return pairs


def _places(*runs):
    """Where runs were read, as far as it is known."""
    folders = [str(run["folder"]) for run in runs if run.get("folder")]
    return f" ({' and '.join(folders)})" if folders else ""


def _over_seeds(runs, merge):
    """Numbers of the table, each merged over the runs."""

    def merged(*path):
        values = []
        for run in runs:
            for key in path:
                run = (run or {}).get(key)
            values.append(run)
        return None if None in values else merge(values)

    return {
        "buckets": {
            name: {key: merged("buckets", name, key) for key in AVERAGED}
            for name in runs[0]["buckets"]
        },
        "average": {key: merged("average", key) for key in AVERAGED},
        "model_bytes": merged("model_bytes"),
        "seconds_per_hour": merged("seconds_per_hour"),
    }


def _equal_bytes(run, other, tolerance):
    """Whether the files of two runs are of one size."""
    sizes = [run.get("model_bytes"), other.get("model_bytes")]
    return all(sizes) and max(sizes) - min(sizes) <= tolerance * max(sizes)


def _difference_of(pairs, key):
    """(mean, standard deviation) of first minus second, or None."""
    values = [(a["average"][key], b["average"][key]) for a, b in pairs]
    if any(None in pair for pair in values):
        return None
    differences = [a - b for a, b in values]
    return fmean(differences), stdev(differences)
