"""Files of results: written whole or not at all, named where broken."""

import json
from pathlib import Path

from ..whole_files import write_text


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


def read_json(path):
    """Read a JSON file; an error names it.

    Arguments
    ---------
    path : str | Path
        The file.

    Returns
    -------
    dict | list
        Its content.

    Example
    -------
    >>> path = getfixture("tmpdir") / "plan.json"
    >>> path.write_text("[1, ", "utf-8")
    >>> read_json(path)
    Traceback (most recent call last):
    ...
    ValueError: ...plan.json is no JSON (...): delete it and evaluate again
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: run the experiment that writes it"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is no JSON ({error}): delete it and evaluate again"
        ) from error


def _plain(value):
    """Plain number of a numpy or torch scalar."""
    if hasattr(value, "item"):
        return value.item()
    raise ValueError(f"{type(value).__name__} has no place in a JSON file")
