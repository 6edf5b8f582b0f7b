"""Summarise the test items of a run; name, order and read finished runs.

The `Task` says what an item is and which measures it has. Items are averaged
by condition; the average of a run is the unweighted mean over these. A run is
the content of one metrics.json, a dict, checked when it is read; reading adds
its "folder" and, where test_items.json lies beside it, its "items". Runs that
differ in nothing but their seed are one system.
"""

import hashlib
import json
import math
from pathlib import Path
from statistics import fmean

import numpy as np

from ..utils import is_number, read_json
from .signal_tasks import SEPARATION
from .task import DEFAULT_TASK, find_task, mean

FULL_PRECISION = 32  # bits
KIB = 2**10  # bytes
MIB = 2**20  # bytes
# Rows of the paper's Table 1 in its order; others come behind, by name.
_PAPER_ORDER = ("uniform", "hes", "kl", "nas")
_NUMBERS = ("average_bits", "model_bytes", "fp32_bytes", "seconds_per_hour")
_TEXTS = ("task", "test_set", "estimator", "variant", "corpus")


def summarise(items, task=SEPARATION):
    """Average the items of one system by condition, as metrics.json has it.

    A condition without items has None for every average, and so has then the
    average over the conditions, which is the unweighted mean of all.

    Arguments
    ---------
    items : list[dict]
        One dict per test item, with the fields of the task.
    task : Task
        What is scored.

    Returns
    -------
    dict
        `{"test_set": hash, "buckets": {name: {...}}, "average": {...}}`, and
        before these the "task", unless it is separation.
    """
    by_condition = {name: [] for name in task.condition_names}
    for item in items:
        _check_item(item, task)
        by_condition[task.condition_of(item)].append(item)
    blocks = {
        name: task.summarise(inside) for name, inside in by_condition.items()
    }
    # Files of separation are older than tasks and stay as they are.
    named = {} if task.name == DEFAULT_TASK else {"task": task.name}
    return {
        **named,
        "test_set": _hash_test_set(items, task),
        "buckets": blocks,
        "average": {
            key: mean([block[key] for block in blocks.values()])
            for key in task.keys
        },
    }


def _hash_test_set(items, task=SEPARATION):
    """Hash what was tested: ids, conditions and references, in any order."""
    rows = sorted(
        [str(item["id"]), task.condition_of(item), item[task.reference]]
        for item in items
    )
    ids = [row[0] for row in rows]
    twice = {a for a, b in zip(ids, ids[1:]) if a == b}
    if twice:
        raise ValueError(f"items occur twice: {', '.join(sorted(twice))}")
    text = json.dumps(rows, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def significance(items, baseline_items, against="fp32", task=SEPARATION):
    """Test a system against a baseline, as metrics.json has the outcome.

    Arguments
    ---------
    items : list[dict]
        Items of the system.
    baseline_items : list[dict]
        Items of the baseline on the same test set, in any order.
    """
    if _hash_test_set(items, task) != _hash_test_set(baseline_items, task):
        raise ValueError(
            f"this system and {against} were scored on different test sets: "
            "evaluate both again on one"
        )
    theirs = {str(item["id"]): item for item in baseline_items}
    pairs = [(item, theirs[str(item["id"])]) for item in items]
    if task.same_input:
        for own, other in pairs:
            _check_same_input(own, other, against, task)
    return {"against": against, **task.tested.test.run(pairs)}


def _check_same_input(own, other, against, task):
    """Raise where two items of one name had another input."""
    key, tolerance = task.same_input.key, task.same_input.tolerance
    if abs(own.get(key, 0.0) - other.get(key, 0.0)) > tolerance:
        raise ValueError(
            f"{own['id']} was another {task.unprocessed or 'item'} when "
            f"{against} was scored: evaluate both again on one test set"
        )


def _check_item(item, task):
    """Raise where an item lacks a key or holds a number that is none."""
    keys = ["id", *(field.key for field in task.fields)]
    missing = [key for key in keys if key not in item]
    if missing:
        raise ValueError(
            f"item {item.get('id', '?')!r} lacks {', '.join(missing)}"
        )
    _check_kinds([item], task)


def _check_kinds(items, task):
    """Raise where an item has no number where one is meant, and so on."""
    for field in task.fields:
        for item in items:  # those of older files may lack some
            if field.key in item and not field.fits(item[field.key]):
                raise ValueError(
                    f"item {item['id']!r}: {field.key} is {item[field.key]!r}"
                )


def task_of(run):
    """Find the task that a run is of.

    Example
    -------
    >>> task_of({"system": "kl", "bits": 4}).name
    'separation'
    """
    return find_task(run.get("task"))


def bits_text(run):
    """Format the average bits of a run, without needless decimals.

    Example
    -------
    >>> bits_text({"bits": 4, "average_bits": 4.031}), bits_text({"bits": 2})
    ('4.03', '2')
    """
    bits = run.get("average_bits") or run["bits"]
    return f"{bits:.2f}".rstrip("0").rstrip(".")


def label(run):
    """Name a system with its bits.

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
    """Format bytes, in KiB below one MiB.

    Example
    -------
    >>> size_text(300000), size_text(2 * 2**20)
    ('293 KiB', '2.00 MiB')
    """
    return f"{size / KIB:.0f} KiB" if size < MIB else f"{size / MIB:.2f} MiB"


def table_order(run):
    """Sort runs into the order of the paper's Table 1.

    Example
    -------
    >>> runs = [("kl", 4), ("uniform", 8), ("hes", 8), ("fp32", 32)]
    >>> runs = [{"system": name, "bits": bits} for name, bits in runs]
    >>> [run["system"] for run in sorted(runs, key=table_order)]
    ['fp32', 'uniform', 'hes', 'kl']
    """
    name = run["system"]
    in_paper = name in _PAPER_ORDER
    return (
        run["bits"] < FULL_PRECISION,
        _PAPER_ORDER.index(name) if in_paper else len(_PAPER_ORDER),
        name,
        run["bits"],
        run.get("estimator") or "",
        run.get("variant") or "",
        run.get("seed") or 0,
    )


def system_key(run):
    """Identify the system of a run: all but its seed."""
    key = run["system"], run["bits"], run.get("estimator")
    return (*key, run["variant"]) if run.get("variant") else key


def full_label(run, runs):
    """Name a run with its estimation and variant, where others differ in them.

    Example
    -------
    >>> one = {"system": "kl", "bits": 4, "estimator": "ADMM"}
    >>> (
    ...     full_label(one, [one]),
    ...     full_label(one, [one, {**one, "estimator": "x"}]),
    ... )
    ('kl 4 bit', 'kl 4 bit ADMM')
    """
    mine = system_key(run)
    same = [key for key in map(system_key, runs) if key[:2] == mine[:2]]
    name = label(run)
    if len({key[2] for key in same}) > 1 and mine[2]:
        name += f" {mine[2]}"
    if len({key for key in same if key[:3] == mine[:3]}) > 1 and mine[3:]:
        name += f" ({mine[3]})"
    return name


def load_metrics(path):
    """Read and check a metrics.json file."""
    metrics = read_json(path)
    problem = _problem(metrics)
    if problem:
        raise ValueError(
            f"{path} is not a metrics file of this project: {problem}"
        )
    return metrics


def _load_items(folder, task):
    """Read the results of every test item of a finished run."""
    path = Path(folder, "test_items.json")
    items = read_json(path)
    try:
        _hash_test_set(items, task)
        _check_kinds(items, task)
        lacking = [
            field.plural or field.key
            for field in task.fields
            if field.kind is str
            and not all(isinstance(item[field.key], str) for item in items)
        ]
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} holds no test items ({error!r}): evaluate again"
        ) from error
    if not items:
        raise ValueError(f"{path} holds no test items: evaluate again")
    if lacking:
        raise ValueError(f"{path} lacks {', '.join(lacking)}: evaluate again")
    return items


def load_run(folder, with_items=False):
    """Read a finished run."""
    folder = Path(folder)
    run = {**load_metrics(folder / "metrics.json"), "folder": folder}
    path = folder / "test_items.json"
    if with_items or path.exists():
        task = task_of(run)
        items = _load_items(folder, task)
        if run.get("test_set") not in (None, _hash_test_set(items, task)):
            raise ValueError(
                f"{path} does not belong to the metrics.json beside it: they "
                "tell of different test sets; evaluate again"
            )
        run["items"] = items
    return run


def gather(*folders):
    """Read every finished run below some folders.

    Returns
    -------
    list[dict]
        Runs in the order of the paper's Table 1; a run that lies below two
        of the folders comes once.
    """
    places = {}
    for folder in map(Path, folders):
        paths = sorted(folder.rglob("metrics.json"))
        if not paths:
            raise FileNotFoundError(
                f"no metrics.json below {folder}: run an experiment first, "
                "as `python train.py hparams/fp32.yaml`"
            )
        for path in paths:
            places.setdefault(path.resolve(), path.parent)
    return told_apart(sorted(map(load_run, places.values()), key=table_order))


def told_apart(runs):
    """Keep variants where names, bits and estimation do not tell runs apart.

    Returns
    -------
    list[dict]
        The same without a "variant" that nobody needs.

    Example
    -------
    >>> one = {"system": "kl", "bits": 4, "variant": "rows 8"}
    >>> two = {"system": "kl", "bits": 4}
    >>> ["variant" in run for run in told_apart([one, two])]
    [True, False]
    >>> told_apart([one]) == [two]
    True
    """
    runs = list(runs)
    names = [(*system_key(run)[:3], run.get("seed")) for run in runs]
    return [
        run
        if names.count(name) > 1
        else {key: value for key, value in run.items() if key != "variant"}
        for run, name in zip(runs, names)
    ]


def by_test_set(runs):
    """Group runs by what they were scored on.

    Arguments
    ---------
    runs : list[dict]
        Contents of metrics.json files.

    Returns
    -------
    list[list[dict]]
        The largest group first; each fits in one table.

    Example
    -------
    >>> runs = [{"system": name, "bits": 4} for name in ("kl", "hes")]
    >>> runs = [{**run, "test_set": run["system"]} for run in runs]
    >>> [len(group) for group in by_test_set(runs)]
    [1, 1]
    """
    groups = []
    for run in runs:
        if len(runs) > 1:
            _test_set(run)  # it must tell
        for group in groups:
            try:
                check_same_test_set([group[0], run])
            except ValueError:
                continue
            group.append(run)
            break
        else:
            groups.append([run])
    return sorted(groups, key=len, reverse=True)


def check_same_test_set(runs):
    """Refuse systems that were scored on different test sets.

    Arguments
    ---------
    runs : list[dict]
        Contents of metrics.json files, each with `test_set` or `items`.
    """
    if not runs:
        raise ValueError("a table needs the metrics of at least one system")
    if len(runs) == 1:
        return
    named = {run.get("task", DEFAULT_TASK): run for run in runs}
    if len(named) > 1:
        sides = ", ".join(
            f"{_place(run)} of {name}" for name, run in named.items()
        )
        raise ValueError(
            f"runs are of different tasks ({sides}): make a table of each"
        )
    task = task_of(runs[0])
    tested = {}
    for run in runs:
        tested.setdefault(_test_set(run), []).append(_place(run))
    if len(tested) > 1:
        sides = "; ".join(
            f"{', '.join(systems)} on {test_set}"
            for test_set, systems in tested.items()
        )
        raise ValueError(
            f"systems were scored on different test sets ({sides}): "
            "evaluate them again on one, or leave one side out"
        )
    if task.same_input:
        _check_same_inputs(runs, task)


def _check_same_inputs(runs, task):
    """Refuse runs whose inputs had the same ids and words, but were others."""
    # Ids and words may be those of other rooms or interferers
    same = task.same_input
    inputs = {_place(run): _input_levels(run, task) for run in runs}
    first, levels = next(iter(inputs.items()))
    for place, others in inputs.items():
        if not np.allclose(levels, others, atol=same.tolerance, equal_nan=True):
            raise ValueError(
                f"{first} and {place} were scored on other {same.difference}; "
                "evaluate them again on one test set"
            )


def _input_levels(run, task):
    """What tells inputs apart, by condition; NaN: not known."""
    blocks = [run["buckets"].get(name) or {} for name in task.condition_names]
    levels = [block.get(task.same_input.key) for block in blocks]
    return [np.nan if level is None else level for level in levels]


def _problem(metrics):
    """What is wrong with the content of a metrics file, or None."""
    if not isinstance(metrics, dict):
        return f"it holds a {type(metrics).__name__}"
    for key in ("system", "bits", "buckets", "average"):
        if key not in metrics:
            return f"`{key}` is missing"
    if not isinstance(metrics["system"], str):
        return f"`system` is {metrics['system']!r}"
    if not is_number(metrics["bits"]):
        return f"`bits` is {metrics['bits']!r}"
    for key in _TEXTS:
        if not isinstance(metrics.get(key), str | None):
            return f"`{key}` is {metrics[key]!r}"
    for key in (*_NUMBERS, "seed"):
        if metrics.get(key) is not None and not is_number(metrics[key]):
            return f"`{key}` is {metrics[key]!r}"
    try:
        task = task_of(metrics)
    except ValueError as error:
        return str(error)
    return (
        _buckets_problem(metrics["buckets"], task)
        or _block_problem(metrics["average"], "average", task.keys)
        or _average_problem(metrics, task)
        or _test_problem(metrics, task)
    )


def _buckets_problem(buckets, task):
    """What is wrong with the averages by condition, or None."""
    if not isinstance(buckets, dict):
        return f"buckets holds a {type(buckets).__name__}"
    keys = ["n", *task.counts, *task.keys]
    if task.same_input:
        keys.append(task.same_input.key)
    for name in task.condition_names:
        if name not in buckets:
            return f"bucket {name} is missing"
        problem = _block_problem(buckets[name], f"bucket {name}", keys)
        if not problem and buckets[name]["n"] is None:
            problem = f"`n` of bucket {name} is None"
        if problem:
            return problem
    return None


def _block_problem(block, name, keys):
    """What is wrong with one block of numbers, or None."""
    if not isinstance(block, dict):
        return f"{name} holds a {type(block).__name__}"
    for key in keys:
        if key not in block:
            return f"`{key}` of {name} is missing"
        if block[key] is not None and not is_number(block[key]):
            return f"`{key}` of {name} is {block[key]!r}"
    return None


def _average_problem(metrics, task):
    """Whether an average is not the mean of the conditions, or None."""
    for key in task.keys:
        blocks = metrics["buckets"]
        values = [blocks[name][key] for name in task.condition_names]
        mean = None if None in values else fmean(values)
        average = metrics["average"][key]
        if mean is None and average is None:
            continue
        if None in (mean, average) or not math.isclose(
            mean, average, rel_tol=1e-6, abs_tol=1e-9
        ):
            return (
                f"`{key}` of average is {average}, that of its buckets {mean}"
            )
    return None


def _test_problem(metrics, task):
    """What is wrong with the significance test, or None."""
    test = task.tested and task.tested.test
    outcome = metrics.get(test.key) if test else None
    if outcome is None:
        return None
    problem = _block_problem(outcome, test.key, ("z", "p", test.samples))
    if problem:
        return problem
    if not isinstance(outcome.get("against"), str):
        return f"`against` of {test.key} is {outcome.get('against')!r}"
    if None in (outcome["z"], outcome["p"]):
        return f"`z` or `p` of {test.key} is not known"
    return None


def _test_set(run):
    """Hash of the test set of a run."""
    if run.get("test_set"):
        return run["test_set"]
    if run.get("items"):
        return _hash_test_set(run["items"], task_of(run))
    raise ValueError(
        f"the metrics of {_place(run)} tell no `test_set`: evaluate it again"
    )


def _place(run):
    """Name of a run, and where it was read if that is known."""
    folder = f" ({run['folder']})" if run.get("folder") else ""
    return f"{label(run)}{folder}"
