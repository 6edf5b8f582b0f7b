"""Integers of a codebook to bytes without gaps, and back."""

import math

import numpy as np
import torch

from .plan import packed_bytes
from .tables import TERNARY_BITS, check_bits, has_zero, largest_level

TRITS = 3 ** np.arange(5)  # values of the five digits in a byte


def pack_bits(integers, bits, codebook="midtread"):
    """Integers of a codebook to bytes without gaps, lowest bit first.

    Stored is the integer's number in the table, from 0: value + 2^(bits - 1)
    for Eq. 7, where 0 stands for no value, and (value + 2^bits - 1) / 2 for
    the odd levels of a table without zero. At 1.6 bits five values make a
    byte, value + 1 as digits to base 3, the first one lowest.

    Arguments
    ---------
    integers : torch.Tensor
        Levels of an n-bit codebook, any shape.
    bits : int or float
        Bits of one value, 1 to 16, or 1.6.
    codebook : str
        "midtread" or "midrise".

    Returns
    -------
    torch.Tensor
        uint8, ceil(n * bits / 8) bytes.

    Example
    -------
    >>> pack_bits(torch.tensor([-1, 0, 1, 0, 1]), 2)
    tensor([185,   3], dtype=torch.uint8)
    >>> pack_bits(torch.tensor([-1, 0, 1, 0, 1]), 1.6)
    tensor([210], dtype=torch.uint8)
    >>> pack_bits(torch.tensor([-3, -1, 1, 3]), 2, "midrise")
    tensor([228], dtype=torch.uint8)
    >>> pack_bits(torch.tensor([-1, 1, 1]), 1)
    tensor([6], dtype=torch.uint8)
    """
    largest = largest_level(check_bits(bits), codebook)
    values = integers.detach().cpu().numpy().reshape(-1).astype(np.int32)
    zero = has_zero(bits, codebook)
    even = False if zero else (values % 2 == 0).any()
    if np.abs(values).max(initial=0) > largest or even:
        raise ValueError(f"integers are not in the {bits}-bit codebook")
    if bits == TERNARY_BITS:
        digits = np.zeros((math.ceil(len(values) / 5), 5), np.int32)
        digits.reshape(-1)[: len(values)] = values + 1
        return torch.from_numpy((digits @ TRITS).astype(np.uint8))
    codes = values + 2 ** (bits - 1) if zero else (values + largest) // 2
    as_bytes = codes.astype("<u2").view(np.uint8).reshape(-1, 2)
    as_bits = np.unpackbits(as_bytes, axis=1, bitorder="little")[:, :bits]
    return torch.from_numpy(np.packbits(as_bits, bitorder="little"))


def unpack_bits(packed, bits, shape, codebook="midtread"):
    """The integers that ``pack_bits`` stored.

    Arguments
    ---------
    packed : torch.Tensor
        uint8 bytes.
    bits : int or float
        Bits of one value, 1 to 16, or 1.6.
    shape : tuple of int
        Shape of the integers.
    codebook : str
        "midtread" or "midrise".

    Returns
    -------
    torch.Tensor
        int32.

    Example
    -------
    >>> unpack_bits(torch.tensor([185, 3], dtype=torch.uint8), 2, (5,))
    tensor([-1,  0,  1,  0,  1], dtype=torch.int32)
    >>> unpack_bits(torch.tensor([210], dtype=torch.uint8), 1.6, (5,))
    tensor([-1,  0,  1,  0,  1], dtype=torch.int32)
    """
    count, bits = math.prod(shape), check_bits(bits)
    needed = packed_bytes(count, bits, scales=0)
    if len(packed) != needed:
        raise ValueError(
            f"{count} values of {bits} bits take {needed} bytes, not "
            f"{len(packed)}"
        )
    if bits == TERNARY_BITS:
        codes = packed.numpy()[:, None].astype(np.int32) // TRITS
        if codes.max(initial=0) >= 3**5:
            raise ValueError("a byte of five three-level values is over 242")
        values = (codes % 3).reshape(-1)[:count].reshape(shape) - 1
        return torch.from_numpy(values.astype(np.int32))
    codes = _codes(packed.numpy(), bits, count)
    codes = codes.reshape(shape).astype(np.int32)
    if has_zero(bits, codebook):
        return torch.from_numpy(codes - 2 ** (bits - 1))
    return torch.from_numpy(2 * codes - largest_level(bits, codebook))


def _codes(packed, bits, count):
    """Numbers of `bits` bits that follow each other in bytes."""
    if bits in (1, 2, 4, 8):  # none crosses a byte: ten times as fast
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        fields = packed[:, None] >> shifts & np.uint8(2**bits - 1)
        return fields.reshape(-1)[:count]
    as_bits = np.unpackbits(packed, count=count * bits, bitorder="little")
    padded = np.zeros((count, 16), np.uint8)
    padded[:, :bits] = as_bits.reshape(count, bits)
    return np.packbits(padded, axis=1, bitorder="little").view("<u2")
