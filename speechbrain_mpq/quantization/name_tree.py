"""Trees of tensor names, which take less room than the names in full."""

import re

from .row_groups import NAME as SLICE

LONGEST_NAME = 1000  # characters
# One dot-separated part of a name. No slash: it joins branches in format 3,
# and a name must never work as a path.
_PART = re.compile(r"[^\x00-\x1f\x7f-\x9f./\\]+")


def check_name(name):
    """Refuses names that a packed file cannot hold.

    Arguments
    ---------
    name : str
        Name of a parameter or buffer.

    Returns
    -------
    str

    Example
    -------
    >>> check_name("conv.weight")
    'conv.weight'
    >>> check_name("../weight")
    Traceback (most recent call last):
    ...
    ValueError: '../weight' is no name of a tensor
    """
    parts = name.split(".")
    fits = len(name) <= LONGEST_NAME and all(map(_PART.fullmatch, parts))
    if not fits or SLICE.fullmatch(name):
        raise ValueError(f"{name[:80]!r} is no name of a tensor")
    return name


def nest(described):
    """{"a.b.weight": ...} to {"a": {"b": {"weight": ...}}}.

    Written in full, the names would be most of the header.

    Arguments
    ---------
    described : dict
        By dotted name.

    Returns
    -------
    dict

    Example
    -------
    >>> nest({"a.weight": [2], "a.bias": [1]})
    {'a': {'bias': [1], 'weight': [2]}}
    """
    tree = {}
    for name in sorted(described):
        *parents, leaf = check_name(name).split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = described[name]
    return tree


def share(tree):
    """Writes branches of a tree that are alike once, under joined names.

    Arguments
    ---------
    tree : dict
        As `nest` makes it.

    Returns
    -------
    dict

    Example
    -------
    >>> share({"a": {"bias": [1], "weight": [1]}, "b": {"c": [2]}})
    {'a': {'bias/weight': [1]}, 'b': {'c': [2]}}
    """
    alike = []  # pairs of names and branch, few of them
    for name, branch in tree.items():
        branch = share(branch) if isinstance(branch, dict) else branch
        same = next((names for names, b in alike if b == branch), None)
        if same is None:
            alike.append(([name], branch))
        else:
            same.append(name)
    return {"/".join(names): branch for names, branch in alike}


def count_leaves(tree):
    """How many tensors a tree names, without making their names.

    A short tree can name very many.

    Arguments
    ---------
    tree : dict
        As `share` makes it, or anybody.

    Returns
    -------
    int

    Example
    -------
    >>> count_leaves({"a/b": {"c/d": [1], "e": [2]}})
    6
    """
    if not isinstance(tree, dict):
        return 1
    if not tree:
        raise ValueError("a branch without tensors")
    return sum(
        (names.count("/") + 1) * count_leaves(branch)
        for names, branch in tree.items()
    )


def leaves(tree, prefix="", joined=False):
    """Undoes `nest` and `share`.

    Arguments
    ---------
    tree : dict
        Of a header that may be anybody's.
    prefix : str
        Of all names.
    joined : bool
        Whether `share` made it; then call `count_leaves` first.

    Yields
    ------
    (str, object)
        Dotted name and leaf.

    Example
    -------
    >>> dict(leaves({"a/b": {"c": [1]}}, joined=True))
    {'a.c': [1], 'b.c': [1]}
    """
    if not isinstance(tree, dict):
        raise ValueError("a tree of tensors that is no JSON object")
    for names, branch in tree.items():
        for name in names.split("/") if joined else [names]:
            if "." in name:
                raise ValueError(f"{name!r} is no part of a name")
            if isinstance(branch, dict):
                yield from leaves(branch, f"{prefix}{name}.", joined)
            else:
                yield check_name(prefix + name), branch
