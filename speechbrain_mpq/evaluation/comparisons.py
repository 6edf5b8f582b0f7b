"""Compare systems: significance marks, and differences over the seeds.

The paper's Table 1 marks a system that does not differ significantly in WER
from full precision, from uniform 4-bit and from uniform 8-bit precision (its
systems 1, 3 and 4). Runs are compared with the baseline's run of the same
seed, by the significance test of their task.
"""

import re
from itertools import combinations
from statistics import fmean, stdev

from .runs import (
    FULL_PRECISION,
    full_label,
    label,
    significance,
    system_key,
    task_of,
)
from .significance import SIGNIFICANCE_LEVEL

MARKS = "*†‡§¶#"
_PAPER_BASELINES = (("fp32", 32), ("uniform", 4), ("uniform", 8))


def compare(run, baseline):
    """Test the difference between two runs, as their task tests it.

    It is computed where both hold their items, else taken from the metrics.

    Arguments
    ---------
    run : dict
        Metrics of the system.
    baseline : dict
        Metrics of the baseline.

    Returns
    -------
    dict | None
        `{"against", "z", "p", "segments"}`, or None where it was not tested.

    Example
    -------
    >>> test = {"against": "fp32", "z": 0.8, "p": 0.42, "segments": 90}
    >>> kl = {"system": "kl", "bits": 4, "mapsswe": test}
    >>> compare(kl, {"system": "fp32", "bits": 32})["p"]
    0.42
    >>> compare(kl, {"system": "uniform", "bits": 4}) is None
    True
    """
    task = task_of(run)
    if task.tested is None:
        return None
    if run.get("items") and baseline.get("items"):
        items = run["items"], baseline["items"]
        return significance(*items, baseline["system"], task)
    test = run.get(task.tested.test.key)
    # Only full precision is sure to be the one system of its name.
    known = test and baseline["bits"] >= FULL_PRECISION
    return test if known and test["against"] == baseline["system"] else None


def choose_baselines(runs, against=None):
    """Choose the systems that the others are tested against."""
    known = list(dict.fromkeys(map(system_key, runs)))
    if against is None:
        paper = [[k for k in known if k[:2] == row] for row in _PAPER_BASELINES]
        systems = [keys[0] for keys in paper if keys]
    else:
        systems = [_one_named(name, known) for name in against]
    if len(systems) > len(MARKS):
        raise ValueError(f"at most {len(MARKS)} baselines can be marked")
    return dict(zip(MARKS, systems))


def significance_marks(run, runs, baselines):
    """Mark the baselines that a run does not differ from significantly.

    Example
    -------
    >>> fp32 = {"system": "fp32", "bits": 32, "seed": 1}
    >>> test = {"against": "fp32", "z": 0.8, "p": 0.42, "segments": 90}
    >>> kl = {"system": "kl", "bits": 4, "seed": 1, "mapsswe": test}
    >>> significance_marks(kl, [fp32, kl], {"*": ("fp32", 32, None)})
    {'*': True}
    """
    marks = {}
    for mark, key in baselines.items():
        if system_key(run) == key:
            break
        test = None
        for other in runs:
            same_seed = other.get("seed") == run.get("seed")
            if system_key(other) == key and same_seed:
                test = compare(run, other)
        marks[mark] = None if test is None else test["p"] >= SIGNIFICANCE_LEVEL
    return marks


def _one_named(name, known):
    """The one system of a name such as "fp32" or "uniform_4bit"."""
    matching = [key for key in known if name in _names(*key)]
    if len(matching) == 1:
        return matching[0]
    problem = "names several systems" if matching else "is not there"
    there = ", ".join(_names(*key)[-1] for key in known)
    raise ValueError(f"the baseline {name!r} {problem}; choose from: {there}")


def _names(system, bits, estimator, variant=None):
    """Names that a system is called by, the longest last."""
    names = [system, f"{system}_{bits:g}bit"]
    if estimator:
        names.append(f"{names[1]}_{estimator}")
    if variant:
        suffix = re.sub(r"[ ,]+", "_", variant)
        names = [f"{name}_{suffix}" for name in names]
    return names


EQUAL_BYTES = 0.01  # largest relative difference of sizes called equal


def by_system(runs):
    """Group runs by system, in the order of their first run."""
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
    """Average a system's runs over its seeds, with standard deviations."""
    return tuple(_over_seeds(runs, merge) for merge in (fmean, stdev))


def paired_differences(runs, tolerance=EQUAL_BYTES):
    """Compare systems of equal bytes, seed by seed."""
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
        for key in task_of(second[0]).keys:
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

    keys = task_of(runs[0]).keys
    return {
        "buckets": {
            name: {key: merged("buckets", name, key) for key in keys}
            for name in runs[0]["buckets"]
        },
        "average": {key: merged("average", key) for key in keys},
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
