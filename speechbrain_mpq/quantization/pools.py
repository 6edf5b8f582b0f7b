"""What a packed file holds of the quantized tensors: two pools and a header.

``packed`` (uint8) has the integers of all quantized tensors in the order of
their names, each beginning on a byte, and ``scales`` (float32) is in the same
order. The header tells the bits and shape of every tensor (see
``described``).
"""

import math
from dataclasses import dataclass

import torch

from .bit_packing import pack_bits, unpack_bits
from .codebook import GRANULARITIES, quantize_to_integers, scale_shape
from .described import described_tensors
from .name_tree import check_name
from .plan import packed_bytes
from .row_groups import split_name
from .tables import TERNARY_BITS, check_codebook, largest_level

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


def pool(quantized, codebook, describe):
    """The pools of a model's quantized tensors, and what describes them.

    Arguments
    ---------
    quantized : dict of str -> NamedTensor
        All quantized tensors and slices, by name.
    codebook : str
        Kind of their quantization tables.
    describe : callable
        `described.tree_header` or `described.shared_header`.

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
        scales.append(_checked(alpha.detach().cpu().float().reshape(-1)))
    kind = {} if codebook == "midtread" else {"codebook": codebook}
    header = {
        "granularity": _granularity(quantized),
        **kind,
        **describe(quantized),
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
    described = described_tensors(header)
    if not described:  # full precision
        return {}, _named(floats)
    packed, scales = (floats.pop(name) for name in POOLS)
    if packed.dtype != torch.uint8 or scales.dtype != torch.float32:
        raise ValueError("packed is not uint8 or scales not float32")
    if packed.dim() != 1 or scales.dim() != 1:
        raise ValueError("packed or scales is no vector")
    _checked(scales)
    codebook = check_codebook(header.get("codebook", "midtread"))
    quantized = {}
    for name, bits, shape in described:
        alpha_shape = scale_shape(shape, header["granularity"])
        count = math.prod(alpha_shape)
        size = packed_bytes(math.prod(shape), bits, scales=0)
        if len(packed) < size or len(scales) < count:
            raise ValueError(f"no integers or scales left for {name}")
        if split_name(name)[0] in floats:
            raise ValueError(f"{name} is stored twice")
        integers = _integers(packed[:size], bits, shape, codebook)
        alpha = scales[:count].reshape(alpha_shape)
        _checked(alpha * largest_level(bits, codebook))
        quantized[name] = PackedTensor(bits, integers, alpha)
        packed, scales = packed[size:], scales[count:]
    if len(packed) or len(scales):
        raise ValueError("more integers or scales than tensors")
    return quantized, _named(floats)


def _integers(packed, bits, shape, codebook):
    """The integers of a tensor; all bits of all bytes count."""
    integers = unpack_bits(packed, bits, shape, codebook)
    count = math.prod(shape)
    if not count:
        return integers
    if integers.abs().max() > largest_level(bits, codebook):
        raise ValueError(f"integers that are not in the {bits}-bit codebook")
    if bits == TERNARY_BITS:
        room = 3 ** (count % 5) if count % 5 else 256
    else:
        room = 2 ** (count * bits % 8) if count * bits % 8 else 256
    if int(packed[-1]) >= room:
        raise ValueError("a last byte with more than the last integers")
    return integers


def _checked(scales):
    """Scales, or largest values, that are finite and not negative."""
    if not torch.isfinite(scales).all() or (scales < 0).any():
        raise ValueError("scales must be finite and not negative")
    return scales


def _named(floats):
    """Tensors whose names are sound."""
    for name in floats:
        check_name(name)
    return floats


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
