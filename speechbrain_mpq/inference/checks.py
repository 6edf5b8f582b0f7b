"""Checks of what a file says that a class shall be built with.

Each check takes a value from JSON and the place where it stands, and returns
the value or raises ValueError. Ranges are wide enough for any separator and
narrow enough that a forged file cannot ask for the memory of a data centre.
"""

import math


def whole(low, high):
    """A check for integers of a range.

    Arguments
    ---------
    low, high : int
        Smallest and largest.

    Returns
    -------
    callable

    Example
    -------
    >>> whole(1, 8)(4, "layers")
    4
    >>> whole(1, 8)(9, "layers")
    Traceback (most recent call last):
    ...
    ValueError: layers must be an integer from 1 to 8, not 9
    """

    def check(value, place):
        if type(value) is not int or not low <= value <= high:
            raise ValueError(
                f"{place} must be an integer from {low} to {high}, not "
                f"{_short(value)}"
            )
        return value

    return check


def number(low, high):
    """A check for finite numbers of a range.

    Arguments
    ---------
    low, high : float
        Smallest and largest.

    Returns
    -------
    callable

    Example
    -------
    >>> number(0, 100)(2.5, "gap")
    2.5
    """

    def check(value, place):
        plain = type(value) in (int, float) and math.isfinite(value)
        if not plain or not low <= value <= high:
            raise ValueError(
                f"{place} must be a number from {low} to {high}, not "
                f"{_short(value)}"
            )
        return value

    return check


def choice(*values):
    """A check for one of some values.

    Arguments
    ---------
    *values : str or int or bool
        What there is to choose from.

    Returns
    -------
    callable

    Example
    -------
    >>> choice("ipd", "steered")("ipd", "phase")
    'ipd'
    """

    def check(value, place):
        if not any(type(value) is type(v) and value == v for v in values):
            raise ValueError(
                f"{place} must be one of {values}, not {_short(value)}"
            )
        return value

    return check


flag = choice(True, False)


def optional(check):
    """A check that lets None pass.

    Arguments
    ---------
    check : callable
        For everything else.

    Returns
    -------
    callable

    Example
    -------
    >>> optional(whole(1, 2))(None, "filters") is None
    True
    """
    return lambda value, place: None if value is None else check(value, place)


def several(check, least, most):
    """A check for lists.

    Arguments
    ---------
    check : callable
        For every entry.
    least, most : int
        Length of the list.

    Returns
    -------
    callable

    Example
    -------
    >>> several(whole(1, 9), 1, 3)([8, 1], "pair")
    [8, 1]
    """

    def check_all(value, place):
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise ValueError(
                f"{place} must be a list of {least} to {most} entries, not "
                f"{_short(value)}"
            )
        return [check(entry, f"{place}[{i}]") for i, entry in enumerate(value)]

    return check_all


def fields(checks, needed=()):
    """A check for objects with known keys.

    Arguments
    ---------
    checks : dict of str -> callable
        For the value of each key.
    needed : iterable of str
        Keys that must be there.

    Returns
    -------
    callable

    Example
    -------
    >>> fields({"bits": whole(1, 16)})({"byte": 8}, "plan")
    Traceback (most recent call last):
    ...
    ValueError: plan has no 'byte', only ['bits']
    """

    def check(value, place):
        if not isinstance(value, dict):
            raise ValueError(f"{place} must be an object, not {_short(value)}")
        for key in value:
            if key not in checks:
                raise ValueError(
                    f"{place} has no {key[:40]!r}, only {sorted(checks)}"
                )
        for key in needed:
            if key not in value:
                raise ValueError(f"{place} lacks {key!r}")
        return {k: checks[k](v, f"{place}.{k}") for k, v in value.items()}

    return check


def _short(value):
    """A value from a stranger, for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
