"""Summarise the test items of one system as metrics.json holds them.

The `Task` says what an item is and which measures it has. Items are averaged
by condition; the average of a run is the unweighted mean over these.
"""

import hashlib
import json
import math

from .separation_task import SEPARATION
from .task import DEFAULT_TASK, mean


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
        "test_set": hash_test_set(items, task),
        "buckets": blocks,
        "average": {
            key: mean([block[key] for block in blocks.values()])
            for key in task.keys
        },
    }


def hash_test_set(items, task=SEPARATION):
    """Hash what was tested: ids, conditions and references, in any order.

    Arguments
    ---------
    items : list[dict]
        One dict per test item.

    Example
    -------
    >>> items = [{"id": i, "angle": 20, "reference": "yes"} for i in "ab"]
    >>> hash_test_set(items) == hash_test_set(items[::-1])
    True
    >>> hash_test_set(items) == hash_test_set(items[:1])
    False
    """
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
    if hash_test_set(items, task) != hash_test_set(baseline_items, task):
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
    for field in task.fields:
        value = item[field.key]
        if field.kind is str or value is None and field.optional:
            continue
        if not math.isfinite(value):
            raise ValueError(f"item {item['id']!r}: {field.key} is {value}")
