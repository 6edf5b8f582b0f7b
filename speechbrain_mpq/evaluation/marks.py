"""Which word error rates do not differ: the marks of the paper's Table 1.

The paper marks a system that does not differ significantly in WER from full
precision, from uniform 4-bit and from uniform 8-bit precision (its systems 1,
3 and 4). Runs are compared with the baseline's run of the same seed.
"""

from .mapsswe import SIGNIFICANCE_LEVEL
from .metrics import significance
from .systems import FULL_PRECISION, system_key

MARKS = "*†‡§¶#"
_PAPER_BASELINES = (("fp32", 32), ("uniform", 4), ("uniform", 8))


def compare(run, baseline):
    """Significance of the WER difference between two runs.

    It is computed where both hold their items, else taken from `mapsswe`.

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
    if run.get("items") and baseline.get("items"):
        return significance(run["items"], baseline["items"], baseline["system"])
    test = run.get("mapsswe")
    # Only full precision is sure to be the one system of its name.
    known = test and baseline["bits"] >= FULL_PRECISION
    return test if known and test["against"] == baseline["system"] else None


def choose_baselines(runs, against=None):
    """Systems that the others are tested against.

    Arguments
    ---------
    runs : sequence of dict
        Contents of metrics.json files.
    against : sequence of str | None
        Systems by name, as "fp32", or by name and bits as folders are named,
        "uniform_4bit" or, to tell estimators apart, "uniform_4bit_ADMM".
        None: those of the paper's Table 1 that are there.

    Returns
    -------
    dict
        Mark -> system key (see `systems.system_key`).

    Example
    -------
    >>> runs = [("fp32", 32), ("uniform", 3), ("uniform", 4), ("kl", 4)]
    >>> runs = [{"system": name, "bits": bits} for name, bits in runs]
    >>> choose_baselines(runs)
    {'*': ('fp32', 32, None), '†': ('uniform', 4, None)}
    >>> choose_baselines(runs, ["uniform_3bit"])
    {'*': ('uniform', 3, None)}
    """
    known = list(dict.fromkeys(map(system_key, runs)))
    if against is None:
        paper = [[k for k in known if k[:2] == row] for row in _PAPER_BASELINES]
        found = [keys[0] for keys in paper if keys]
    else:
        found = [_one_named(name, known) for name in against]
    if len(found) > len(MARKS):
        raise ValueError(f"at most {len(MARKS)} baselines can be marked")
    return dict(zip(MARKS, found))


def significance_marks(run, runs, baselines):
    """Marks of one run: baselines that it does not differ from in WER.

    Arguments
    ---------
    run : dict
        Metrics of the system.
    runs : sequence of dict
        All runs, among them the baselines'.
    baselines : dict
        From `choose_baselines`.

    Returns
    -------
    dict
        Mark -> True (no significant difference), False, or None where it was
        not tested. Of two baselines the later one is marked.

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


def _one_named(asked, known):
    """The one system of a name such as "fp32" or "uniform_4bit"."""
    found = [key for key in known if asked in _names(*key)]
    if len(found) == 1:
        return found[0]
    problem = "names several systems" if found else "is not there"
    there = ", ".join(_names(*key)[-1] for key in known)
    raise ValueError(f"the baseline {asked!r} {problem}; choose from: {there}")


def _names(system, bits, estimator):
    """Names that a system is called by, the longest last."""
    names = [system, f"{system}_{bits:g}bit"]
    return [*names, f"{names[1]}_{estimator}"] if estimator else names
