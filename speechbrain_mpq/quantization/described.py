"""What a packed file's header says of the quantized tensors.

Formats 1 and 2 have one tree, {"conv": {"weight": [bits, *shape]}}. Format 3
writes a layer that comes again only once, which is what the header of a
small model is made of: "shapes" is the tree without the bits, in which
{"tcn_0/tcn_1": ...} stands for two branches that are alike, and "bits" is a
list in the order of the full names. Where a tensor is cut, its bits are a
list with one number for every slice.
"""

from collections import defaultdict

from .checked_header import check_shape
from .name_tree import count_leaves, leaves, nest, share
from .row_groups import first_row, row_slices, slice_name
from .tables import TERNARY_BITS, check_bits

MAX_NAMED = 2**27  # bytes that all names and shapes may take in memory
ENTRY_BYTES = 256  # of one of them, the name's characters aside


def tree_header(quantized):
    """{"tensors": ...} of formats 1 and 2.

    Arguments
    ---------
    quantized : dict of str -> NamedTensor
        All quantized tensors and slices, by name.

    Returns
    -------
    dict
    """
    return {"tensors": nest(_described(quantized))}


def shared_header(quantized):
    """{"shapes": ..., "bits": ...} of format 3.

    Arguments
    ---------
    quantized : dict of str -> NamedTensor
        All quantized tensors and slices, by name.

    Returns
    -------
    dict
    """
    return _shared(_described(quantized))


def upgraded_header(header):
    """A header of any format as one of format 3.

    Arguments
    ---------
    header : dict
        Of a file that was verified.

    Returns
    -------
    dict

    Example
    -------
    >>> upgraded_header({"tensors": {"weight": [2, 8], "bias": [4, 8]}})
    {'shapes': {'bias/weight': [8]}, 'bits': [4, 2]}
    """
    header = dict(header)
    if "tensors" in header:
        header |= _shared(dict(leaves(header.pop("tensors"))))
    return header


def described_tensors(header):
    """What a header says of every tensor and slice.

    Arguments
    ---------
    header : dict
        Made by `tree_header` or `shared_header`, or by a stranger.

    Returns
    -------
    list of (str, int or float, tuple of int)
        Name, bits and shape, in the order of the names.

    Example
    -------
    >>> described_tensors({"shapes": {"bias/weight": [3]}, "bits": [8, 2]})
    [('bias', 8, (3,)), ('weight', 2, (3,))]
    """
    if "shapes" in header:
        rows = _joined(header["shapes"], header["bits"])
    else:
        tree = leaves(header["tensors"])
        rows = [(name, *_parted(name, leaf)) for name, leaf in _few(tree)]
    found = list(_few(piece for row in rows for piece in _slices(*row)))
    names = {name for name, _, _ in found}
    if len(names) < len(found):
        raise ValueError("a tensor is described twice")
    return sorted(found)


def needs_second_version(header):
    """Whether only readers of format version 2 understand a header.

    Arguments
    ---------
    header : dict
        As made by ``pool``.

    Returns
    -------
    bool

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


def _shared(described):
    """Format 3's description, from parameter name -> [bits, *shape]."""
    shapes = {name: shape for name, (_, *shape) in described.items()}
    bits = [described[name][0] for name in sorted(described)]
    return {"shapes": share(nest(shapes)), "bits": bits}


def _joined(shapes, bits):
    """(name, bits, shape) of every tensor of a format 3 header."""
    # Counted first: a short tree can name very many tensors.
    if not isinstance(bits, list) or (
        shapes and count_leaves(shapes) != len(bits)
    ):
        raise ValueError("not one entry of bits for every shape")
    named = sorted(_few(leaves(shapes, joined=True)))
    return [(name, b, shape) for (name, shape), b in zip(named, bits)]


def _few(named):
    """Tuples that begin with a name, as long as they take sane room.

    One long branch name, written once, comes back in the name of every leaf.
    """
    room = MAX_NAMED
    for entry in named:
        room -= ENTRY_BYTES + len(entry[0])
        if room < 0:
            raise ValueError("more names than a model has")
        yield entry


def _parted(name, leaf):
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


def _described(quantized):
    """Parameter name -> [bits, *shape]; bits are a list where it is cut."""
    bits, shapes = defaultdict(list), {}
    # In the order of rows, which is not that of names.
    for tensor in sorted(quantized.values(), key=lambda t: first_row(t.rows)):
        bits[tensor.parameter_name].append(tensor.fake_quantize.stored_bits)
        shapes[tensor.parameter_name] = list(tensor.parameter.shape)
    return {
        name: [b if len(b) > 1 else b[0], *shapes[name]]
        for name, b in bits.items()
    }
