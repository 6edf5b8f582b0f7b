"""The header of a packed file: names, bits and shapes of quantized tensors.

Names stand in a tree, which takes less room than the names in full. Formats 1
and 2 have {"conv": {"weight": [bits, *shape]}}. Format 3 writes a layer that
comes again only once, which is what the header of a small model is made of:
"shapes" is the tree without the bits, in which {"tcn_0/tcn_1": ...} stands for
two branches that are alike, and "bits" is a list in the order of the full
names. Where a tensor is divided into groups of output channels, its bits are a
list with one number for every group. Format 4 tells moreover, as "axes", of
which tensors the scales are along other dimensions than the first one.
"""

import re
from collections import defaultdict

from .codebook import TERNARY_BITS, check_bits
from .container import check_shape
from .groups import NAME as SLICE
from .groups import first_row, row_slices, slice_name

LONGEST_NAME = 1000  # characters


# One dot-separated part of a name. No slash: it joins branches in format 3,
# and a name must never work as a path.
_PART = re.compile(r"[^\x00-\x1f\x7f-\x9f./\\]+")


def check_name(name):
    """Refuses names that a packed file cannot hold.

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


def _nest(described):
    """{"a.b.weight": ...} to {"a": {"b": {"weight": ...}}}."""
    tree = {}
    for name in sorted(described):
        *parents, leaf = check_name(name).split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = described[name]
    return tree


def _deduplicate(tree):
    """Writes branches of a tree that are alike once, under joined names."""
    alike = []  # pairs of names and branch, few of them
    for name, branch in tree.items():
        branch = _deduplicate(branch) if isinstance(branch, dict) else branch
        same = next((names for names, b in alike if b == branch), None)
        if same is None:
            alike.append(([name], branch))
        else:
            same.append(name)
    return {"/".join(names): branch for names, branch in alike}


def _count_leaves(tree):
    """How many tensors a tree names, without making their names."""
    if not isinstance(tree, dict):
        return 1
    if not tree:
        raise ValueError("a branch without tensors")
    return sum(
        (names.count("/") + 1) * _count_leaves(branch)
        for names, branch in tree.items()
    )


def leaves(tree, prefix="", joined=False):
    """Undoes `_nest` and `_deduplicate`.

    Arguments
    ---------
    tree : dict
        Of a header that may be anybody's.
    prefix : str
        Of all names.
    joined : bool
        Whether `_deduplicate` made it; then call `_count_leaves` first.

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


MAX_NAMED = 2**27  # bytes that all names and shapes may take in memory
ENTRY_BYTES = 256  # of one of them, the name's characters aside


def describe(quantized):
    """Describes quantized tensors.

    Arguments
    ---------
    quantized : dict of str -> NamedTensor
        Tensors and groups of output channels.

    Returns
    -------
    dict of str -> list
        Parameter name -> [bits, *shape]; bits are a list where it is divided.
    """
    bits, shapes = defaultdict(list), {}
    # In the order of rows, which is not that of names.
    for tensor in sorted(quantized.values(), key=lambda t: first_row(t.rows)):
        bits[tensor.parameter_name].append(tensor.fake_quantize.stored_bits)
        shapes[tensor.parameter_name] = list(tensor.shape)
    return {
        name: [b if len(b) > 1 else b[0], *shapes[name]]
        for name, b in bits.items()
    }


def tree_header(described):
    """{"tensors": ...} of formats 1 and 2."""
    return {"tensors": _nest(described)}


def shared_header(described):
    """{"shapes": ..., "bits": ...} of formats 3 and 4."""
    shapes = {name: shape for name, (_, *shape) in described.items()}
    bits = [described[name][0] for name in sorted(described)]
    return {"shapes": _deduplicate(_nest(shapes)), "bits": bits}


def upgraded_header(header):
    """A header of any format as one of format 3.

    Example
    -------
    >>> upgraded_header({"tensors": {"weight": [2, 8], "bias": [4, 8]}})
    {'shapes': {'bias/weight': [8]}, 'bits': [4, 2]}
    """
    header = dict(header)
    if "tensors" in header:
        header |= shared_header(dict(leaves(header.pop("tensors"))))
    return header


def described_tensors(header):
    """What a header says of every tensor and slice.

    Example
    -------
    >>> described_tensors({"shapes": {"bias/weight": [3]}, "bits": [8, 2]})
    [('bias', 8, (3,)), ('weight', 2, (3,))]
    """
    if "shapes" in header:
        rows = _joined(header["shapes"], header["bits"])
    else:
        tree = leaves(header["tensors"])
        rows = [
            (name, *_split_bits(name, leaf)) for name, leaf in _limit_size(tree)
        ]
    rows_of_slices = list(
        _limit_size(piece for row in rows for piece in _slices(*row))
    )
    names = {name for name, _, _ in rows_of_slices}
    if len(names) < len(rows_of_slices):
        raise ValueError("a tensor is described twice")
    return sorted(rows_of_slices)


def scale_axes(header, described):
    """Reads along which dimensions the scales of each tensor are.

    Example
    -------
    >>> described = [("up.weight", 4, (8, 2, 3))]
    >>> scale_axes({"axes": {"up.weight": [1]}}, described)
    {'up.weight': (1,)}
    """
    ranks = {name: len(shape) for name, _, shape in described}
    axes = header.get("axes", {})
    if not isinstance(axes, dict):
        raise ValueError("axes that are no JSON object")
    for name, own in axes.items():
        if own not in ([1], [0, 1]) or ranks.get(name, 0) < 2:
            raise ValueError(f"{name[:80]!r} with scales along {own!r:.40}")
    return {name: tuple(own) for name, own in axes.items()}


def needs_second_version(header):
    """Tells whether only readers of format version 2 understand a header.

    Example
    -------
    >>> needs_second_version({"tensors": {"weight": [2, 8, 4]}})
    False
    >>> needs_second_version({"tensors": {"weight": [1.6, 8, 4]}})
    True
    >>> needs_second_version({"tensors": {"weight": [[2, 3], 8, 4]}})
    True
    """
    if "codebook" in header:
        return True
    bits = [value[0] for _, value in leaves(header["tensors"])]
    return any(b == TERNARY_BITS or isinstance(b, list) for b in bits)


def _joined(shapes, bits):
    """(name, bits, shape) of every tensor of a format 3 header."""
    # Counted first: a short tree can name very many tensors.
    if not isinstance(bits, list) or (
        shapes and _count_leaves(shapes) != len(bits)
    ):
        raise ValueError("not one entry of bits for every shape")
    named = sorted(_limit_size(leaves(shapes, joined=True)))
    return [(name, b, shape) for (name, shape), b in zip(named, bits)]


def _limit_size(named):
    """Tuples that begin with a name, as long as they take sane room."""
    room = MAX_NAMED
    for entry in named:
        room -= ENTRY_BYTES + len(entry[0])
        if room < 0:
            raise ValueError("more names than a model has")
        yield entry


def _split_bits(name, leaf):
    """(bits, shape) of [bits, *shape]."""
    if not isinstance(leaf, list) or not leaf:
        raise ValueError(f"{name} is not described by [bits, *shape]")
    return leaf[0], leaf[1:]


def _slices(name, bits, shape):
    """Yields (name, bits, shape) of a tensor, or of its slices."""
    check_shape(shape, name)
    if not isinstance(bits, list):
        yield name, check_bits(bits), tuple(shape)
        return
    if not shape or not 1 < len(bits) <= shape[0]:
        raise ValueError(f"{len(bits)} slices of {name} {shape}")
    for rows, b in zip(row_slices(shape[0], len(bits)), bits):
        size = rows.stop - rows.start
        yield slice_name(name, rows), check_bits(b), (size, *shape[1:])
