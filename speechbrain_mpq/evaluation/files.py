"""Files of results: written whole or not at all, checked when read."""

import json
import math
import os
from pathlib import Path

from .metrics import AVERAGED, BUCKET_NAMES


def write_json(path, content):
    """Write a JSON file whole or not at all.

    Arguments
    ---------
    path : str | Path
        The file; its folder must exist.
    content : dict | list
        Plain values; numpy and torch scalars are made plain. NaN and infinity
        are refused, as they are no JSON.

    Example
    -------
    >>> tmpdir = getfixture("tmpdir")
    >>> write_json(tmpdir / "a.json", {"wer": 21.5})
    >>> (tmpdir / "a.json").read_text("utf-8").split()
    ['{', '"wer":', '21.5', '}']
    """
    try:
        text = json.dumps(content, indent=2, allow_nan=False, default=_plain)
    except ValueError as error:
        raise ValueError(f"{path} is not written: {error}") from error
    write_text(path, text + "\n")


def write_text(path, text):
    """Write a text file whole or not at all.

    Arguments
    ---------
    path : str | Path
        The file; its folder must exist.
    text : str
        Its content.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_metrics(path):
    """Read and check a metrics.json file.

    Arguments
    ---------
    path : str | Path
        The file.

    Returns
    -------
    dict
        Its content.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: run the experiment that writes it"
        )
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is no JSON ({error}): delete it and evaluate again"
        ) from error
    problem = _problem(metrics)
    if problem:
        raise ValueError(
            f"{path} is not a metrics file of this project: {problem}"
        )
    return metrics


def gather(results_folder):
    """Read every metrics.json below a folder, full precision first.

    Arguments
    ---------
    results_folder : str | Path
        As `results`, with one folder per experiment.

    Returns
    -------
    list[dict]
        Metrics; 32 bits first, then by bits, system and seed.
    """
    paths = sorted(Path(results_folder).rglob("metrics.json"))
    if not paths:
        raise FileNotFoundError(
            f"no metrics.json below {results_folder}: run an experiment first, "
            "as `python train.py hparams/fp32.yaml`"
        )
    return sorted(
        map(load_metrics, paths),
        key=lambda m: (
            m["bits"] < 32,
            m["bits"],
            m["system"] != "uniform",
            m["system"],
            m.get("seed", 0),
        ),
    )


def _plain(value):
    """Plain number of a numpy or torch scalar."""
    if hasattr(value, "item"):
        return value.item()
    raise ValueError(f"{type(value).__name__} has no place in a JSON file")


def _problem(metrics):
    """What is wrong with the content of a metrics file, or None."""
    if not isinstance(metrics, dict):
        return f"it holds a {type(metrics).__name__}"
    for key in ("system", "bits", "buckets", "average"):
        if key not in metrics:
            return f"`{key}` is missing"
    if not _is_number(metrics["bits"]):
        return f"`bits` is {metrics['bits']!r}"
    if not isinstance(metrics.get("test_set", ""), str):
        return f"`test_set` is {metrics['test_set']!r}"
    buckets = metrics["buckets"]
    if not isinstance(buckets, dict):
        return f"buckets holds a {type(buckets).__name__}"
    for name in BUCKET_NAMES:
        if name not in buckets:
            return f"bucket {name} is missing"
        keys = ("n", "si_snr_mixture", "words", *AVERAGED)
        problem = _block_problem(buckets[name], name, keys)
        if problem:
            return problem
    return _block_problem(metrics["average"], "average", AVERAGED)


def _block_problem(block, name, keys):
    """What is wrong with one block of averages, or None."""
    if not isinstance(block, dict):
        return f"{name} holds a {type(block).__name__}"
    for key in keys:
        if key not in block:
            return f"`{key}` of {name} is missing"
        if block[key] is not None and not _is_number(block[key]):
            return f"`{key}` of {name} is {block[key]!r}"
    return None


def _is_number(value):
    """Whether a value read from JSON is a finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)
