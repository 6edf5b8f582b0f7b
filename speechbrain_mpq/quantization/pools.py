"""What a packed file holds of the quantized tensors: two pools and a header.

``packed`` (uint8) has the integers of all quantized tensors in the order of
their names, each beginning on a byte, and ``scales`` (float32) is in the same
order. The header tells the bits and shape of every tensor; where it is cut,
the bits of every slice.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch

from .bit_packing import pack_bits, unpack_bits
from .codebook import GRANULARITIES, quantize_to_integers, scale_shape
from .plan import packed_bytes
from .row_groups import first_row, row_slices, slice_name
from .tables import TERNARY_BITS, check_bits, check_codebook

POOLS = ("packed", "scales")


@dataclass
class PackedTensor:
    """A quantized tensor, or some rows of one, as it is stored.

    Arguments
    ---------
    bits : int or float
        Bits of one value.
    integers : torch.Tensor
        int32, in the shape of the weight.
    alpha : torch.Tensor
        float32 scale, broadcastable to the integers.
    """

    bits: int | float
    integers: torch.Tensor
    alpha: torch.Tensor


def pool(quantized, codebook):
    """The pools of a model's quantized tensors, and what describes them.

    Arguments
    ---------
    quantized : dict of str -> NamedTensor
        All quantized tensors and slices, by name.
    codebook : str
        Kind of their quantization tables.

    Returns
    -------
    pools : dict of str -> torch.Tensor
        ``packed`` and ``scales``.
    header : dict
        For JSON; ``unpool`` reads it.
    """
    packed, scales = [], []
    for name in sorted(quantized):
        tensor = quantized[name]
        bits = tensor.fake_quantize.stored_bits
        alpha = tensor.fake_quantize.alpha
        integers = quantize_to_integers(tensor.weight, bits, alpha, codebook)
        packed.append(pack_bits(integers, bits, codebook))
        scales.append(alpha.detach().cpu().float().reshape(-1))
    kind = {} if codebook == "midtread" else {"codebook": codebook}
    header = {
        "granularity": _granularity(quantized),
        **kind,
        "tensors": _nest(_described(quantized)),
    }
    if not quantized:
        return {}, header
    return dict(zip(POOLS, (torch.cat(packed), torch.cat(scales)))), header


def unpool(tensors, header):
    """Takes the quantized tensors out of a file's content.

    Arguments
    ---------
    tensors : dict of str -> torch.Tensor
        All tensors of the file.
    header : dict
        As made by ``pool``.

    Returns
    -------
    quantized : dict of str -> PackedTensor
        What was quantized, by the name of the tensor or slice.
    floats : dict of str -> torch.Tensor
        What was not.
    """
    floats = dict(tensors)
    if not header["tensors"]:  # full precision
        return {}, floats
    packed, scales = (floats.pop(name) for name in POOLS)
    if packed.dtype != torch.uint8 or scales.dtype != torch.float32:
        raise ValueError("packed is not uint8 or scales not float32")
    if not torch.isfinite(scales).all():
        raise ValueError("scales must be finite")
    codebook = check_codebook(header.get("codebook", "midtread"))
    quantized = {}
    for name, bits, shape in sorted(_flatten(header["tensors"])):
        alpha_shape = scale_shape(shape, header["granularity"])
        count = math.prod(alpha_shape)
        size = packed_bytes(math.prod(shape), bits, scales=0)
        if len(packed) < size or len(scales) < count:
            raise ValueError(f"no integers or scales left for {name}")
        integers = unpack_bits(packed[:size], bits, shape, codebook)
        alpha = scales[:count].reshape(alpha_shape)
        quantized[name] = PackedTensor(bits, integers, alpha)
        packed, scales = packed[size:], scales[count:]
    if len(packed) or len(scales):
        raise ValueError("more integers or scales than tensors")
    return quantized, floats


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
    found = [(name, bits) for name, bits, _ in _flatten(header["tensors"])]
    return any(bits == TERNARY_BITS or name[-1] == "]" for name, bits in found)


def _granularity(quantized):
    """The one granularity that all scales' shapes follow."""
    shapes = [
        (tuple(t.weight.shape), tuple(t.fake_quantize.alpha.shape))
        for t in quantized.values()
    ]
    for granularity in GRANULARITIES:
        if all(scale_shape(shape, granularity) == a for shape, a in shapes):
            return granularity
    raise ValueError(
        "packing needs one scale per tensor, or one per entry of the first "
        "dimension, in the whole model"
    )


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


def _nest(described):
    """{"a.b.weight": ...} to {"a": {"b": {"weight": ...}}}.

    Written in full, the names would be most of the header.
    """
    tree = {}
    for name in sorted(described):
        *parents, leaf = name.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = described[name]
    return tree


def _flatten(tree, prefix=""):
    """Undoes ``_nest``: yields (name, bits, shape) of tensors and slices."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
            continue
        name, (bits, *shape) = prefix + key, value
        if any(type(size) is not int or size < 0 for size in shape):
            raise ValueError(f"shape {shape} of {name}")
        if isinstance(bits, list):
            for rows, b in zip(row_slices(shape[0], len(bits)), bits):
                size = rows.stop - rows.start
                yield slice_name(name, rows), check_bits(b), (size, *shape[1:])
        else:
            yield name, check_bits(bits), tuple(shape)
