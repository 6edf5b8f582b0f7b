"""The container of a packed model: one safetensors file with a checksum.

Files come from strangers. What the header declares is held against the size of
the file before anything is reserved: no declared number makes the reader take
memory that the file does not fill. Integers of a codebook become bytes without
gaps, and integers again.
"""

import hashlib
import json
import math
import os
import struct
from dataclasses import dataclass, field

import numpy as np
import torch

from ..utils import atomic_write, strict_json
from .codebook import (
    TERNARY_BITS,
    check_bits,
    has_zero,
    largest_level,
    packed_width,
)
from .plan import packed_bytes

MAX_HEADER = 2**24  # bytes; 16 MiB describe more than 100,000 tensors
MAX_RANK = 16
MAX_VALUES = 2**48  # of one tensor, dimensions of 0 counted as 1
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64"), 8),
    **dict.fromkeys(("F32", "I32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL"), 1),
}


def _read_header(content):
    """The header of a safetensors file in memory."""
    header = strict_json(content[8:], packed=True)
    if not isinstance(header, dict):
        raise ValueError("a header that is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise ValueError("metadata that are no strings")
    return header, metadata


def _header_length(start, size):
    """How long a header is, where that is possible."""
    if len(start) < 8:
        raise ValueError(f"only {len(start)} bytes")
    (length,) = struct.unpack("<Q", start)
    if length < 2 or length > MAX_HEADER or 8 + length > size:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    return length


def _check_entries(entries, payload):
    """Refuses tensors that do not fill the payload exactly, in one row."""
    spans = []
    for name, entry in entries.items():
        spans.append(_span(name, entry))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise ValueError(f"tensor {name!r} does not follow the one before")
        end = stop
    if end != payload:
        raise ValueError(f"{payload} bytes of tensors where {end} are named")


def _span(name, entry):
    """(start, stop, name) of a tensor whose entry is sound."""
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != keys:
        raise ValueError(f"tensor {name!r} is not described by {sorted(keys)}")
    dtype, shape = entry["dtype"], entry["shape"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"tensor {name!r} of the unknown type {dtype!r}")
    check_shape(shape, f"tensor {name!r}")
    offsets = entry["data_offsets"]
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} with offsets that are none")
    needed = ITEM_BYTES[dtype] * math.prod(shape)
    if offsets[1] - offsets[0] != needed:
        raise ValueError(f"tensor {name!r} in the space of another size")
    if offsets[0] % ITEM_BYTES[dtype]:
        raise ValueError(f"tensor {name!r} is not aligned")
    return offsets[0], offsets[1], name


def check_shape(shape, what):
    """Refuses a shape that no tensor has.

    Example
    -------
    >>> check_shape([2, -1], "weight")
    Traceback (most recent call last):
    ...
    ValueError: weight with a shape that is none
    """
    fits = _whole_numbers(shape) and len(shape) <= MAX_RANK
    if not fits or math.prod(max(size, 1) for size in shape) > MAX_VALUES:
        raise ValueError(f"{what} with a shape that is none")


def _whole_numbers(values):
    """Whether this is a list of integers from 0, bools not counted."""
    return isinstance(values, list) and all(
        type(value) is int and value >= 0 for value in values
    )


PIECE = 40 * 2**14  # values at a time: whole bytes at any bits
TRITS = 3 ** np.arange(5)  # values of the five digits in a byte


def pack_bits(integers, bits, codebook="midtread"):
    """Integers of a codebook to bytes without gaps, lowest bit first.

    Stored is the integer's number in the table, from 0: value + 2^(bits - 1)
    for Eq. 7, where 0 stands for no value, and (value + 2^bits - 1) / 2 for
    the odd levels of a table without zero. At 1.6 bits five values make a
    byte, value + 1 as digits to base 3, the first one lowest.
    """
    largest = largest_level(check_bits(bits), codebook)
    bits = packed_width(bits, codebook)
    values = integers.detach().cpu().numpy().reshape(-1).astype(np.int32)
    zero = has_zero(bits, codebook)
    even = False if zero else (values % 2 == 0).any()
    if np.abs(values).max(initial=0) > largest or even:
        raise ValueError(f"integers are not in the {bits}-bit codebook")
    if bits == TERNARY_BITS:
        numbers = values + 1
    else:
        numbers = values + 2 ** (bits - 1) if zero else (values + largest) // 2
    return torch.from_numpy(bits_of_numbers(numbers, bits))


def bits_of_numbers(numbers, bits):
    """Numbers in a table to bytes without gaps, numpy uint8."""
    if bits == TERNARY_BITS:
        digits = np.zeros((math.ceil(len(numbers) / 5), 5), np.int32)
        digits.reshape(-1)[: len(numbers)] = numbers
        return (digits @ TRITS).astype(np.uint8)
    if bits in (1, 2, 4, 8):  # none crosses a byte: several times as fast
        fields = np.zeros((math.ceil(len(numbers) * bits / 8), 8 // bits), "u1")
        fields.reshape(-1)[: len(numbers)] = numbers
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        return np.bitwise_or.reduce(fields << shifts, axis=1)
    pieces = [
        _bits_of_piece(numbers[start : start + PIECE], bits)
        for start in range(0, len(numbers), PIECE)
    ]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.uint8)


def _bits_of_piece(numbers, bits):
    """Some numbers to bytes; a bit takes a byte in between."""
    as_bytes = numbers.astype("<u2").view(np.uint8).reshape(-1, 2)
    as_bits = np.unpackbits(as_bytes, axis=1, bitorder="little")[:, :bits]
    return np.packbits(as_bits, bitorder="little")


def unpack_bits(packed, bits, shape, codebook="midtread"):
    """The integers that ``pack_bits`` stored."""
    count, bits = math.prod(shape), packed_width(check_bits(bits), codebook)
    needed = packed_bytes(count, bits, scales=0)
    if len(packed) != needed:
        raise ValueError(
            f"{count} values of {bits} bits take {needed} bytes, not "
            f"{len(packed)}"
        )
    numbers = numbers_of_bits(packed.numpy(), bits, count).astype(np.int32)
    if bits == TERNARY_BITS:
        values = numbers - 1
    elif has_zero(bits, codebook):
        values = numbers - 2 ** (bits - 1)
    else:
        values = 2 * numbers - largest_level(bits, codebook)
    return torch.from_numpy(values).reshape(shape)


def numbers_of_bits(packed, bits, count):
    """Undoes ``bits_of_numbers``."""
    if bits == TERNARY_BITS:
        numbers = packed[:, None].astype(np.int32) // TRITS
        if numbers.max(initial=0) >= 3**5:
            raise ValueError("a byte of five three-level values is over 242")
        return (numbers % 3).reshape(-1)[:count]
    if bits in (1, 2, 4, 8):  # none crosses a byte: ten times as fast
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        fields = packed[:, None] >> shifts & np.uint8(2**bits - 1)
        return fields.reshape(-1)[:count]
    as_bits = np.unpackbits(packed, count=count * bits, bitorder="little")
    padded = np.zeros((count, 16), np.uint8)
    padded[:, :bits] = as_bits.reshape(count, bits)
    return np.packbits(padded, axis=1, bitorder="little").view("<u2")[:, 0]


# 2: groups of output channels, other tables than Eq. 7's, 1.6 bits. 3: an
# architecture, and the shapes of layers that are alike only once. 4: scales
# along other dimensions than the first one. 5: integers by their frequencies.
VERSIONS = ("1", "2", "3", "4", "5")
METADATA = ("format", "mpq_version", "mpq_config", "sha256")
DTYPES = {  # names of the safetensors format
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class PackedModelError(ValueError):
    """A packed model that is damaged or does not fit; the model is as before.

    Arguments
    ---------
    path : str or Path
        The file.
    problem : str
        What is wrong with it.
    fix : str
        What to do.
    """

    def __init__(self, path, problem, fix="copy or download the file again"):
        super().__init__(f"{path}: {problem}; {fix}")


def write_container(path, tensors, config, version="1", check=None):
    """Writes tensors and a configuration as one safetensors file.

    The safetensors library writes the metadata in an order of its own, which
    changes from run to run; here the bytes depend on the content only. The
    dict of tensors is empty before `check` reads the file: both would be in
    memory otherwise.
    """
    config = json.dumps(config, separators=(",", ":"), allow_nan=False)
    kinds = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    text, names = _header_text(kinds, config, version, tensors)
    with atomic_write(path) as part:
        with open(part, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                file.write(_bytes(tensors[name]))
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            tensors.clear()
            check(part)


def container_bytes(kinds, config, version="1"):
    """Computes how long a file will be, before there is one."""
    config = json.dumps(config, separators=(",", ":"), allow_nan=False)
    text, _ = _header_text(kinds, config, version)
    sizes = (
        math.prod(shape) * dtype.itemsize for dtype, shape in kinds.values()
    )
    return 8 + len(text) + sum(sizes)


def _header_text(kinds, config, version, tensors=None):
    """The header of a file, and its tensors' names in order."""
    sha = digest(tensors, config, version) if tensors is not None else "0" * 64
    header = {
        "__metadata__": {
            "format": "pt",
            "mpq_version": version,
            "mpq_config": config,
            "sha256": sha,
        }
    }
    # Wide types first keep every tensor aligned.
    names = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))
    start = 0
    for name in names:
        dtype, shape = kinds[name]
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), names


@dataclass(frozen=True)
class Container:
    """What a file holds, verified."""

    tensors: dict  # dict of str -> torch.Tensor: all tensors of the file
    config: dict  # the configuration
    version: str  # version of the format
    header: bytes = field(repr=False)  # of the file, as it was read
    # the bytes behind it, which the tensors are views of
    payload: np.ndarray = field(repr=False)

    @property
    def content(self):
        """The whole file, as it was read."""
        return self.header + self.payload.tobytes()


def read_container(path, check=None):
    """Reads and verifies what ``write_container`` wrote.

    The file is read once, so that what was verified is what is returned.
    Nothing is reserved that the file does not fill.
    """
    if not path.is_file():
        inside = path.parent / "packed"  # of an experiment's folder
        hint = f", as {inside}" if (inside / path.name).is_file() else ""
        raise PackedModelError(
            path, "no such file", f"name a folder that save_packed wrote{hint}"
        )
    try:
        return _read(path, check)
    except PackedModelError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path, error):
    """What is no file of tensors."""
    return PackedModelError(path, f"damaged or no safetensors file ({error})")


def _read(path, check):
    """A file's content; what is in its header is checked first."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            start = file.read(8)
            length = _header_length(start, size)
            header = start + file.read(length)
            entries, metadata = _read_header(header)
            _check_entries(entries, size - 8 - length)
        except ValueError as error:
            raise _unreadable(path, error) from error
        version = _version(path, metadata)
        try:
            config = strict_json(metadata["mpq_config"], packed=True)
        except ValueError as error:
            raise PackedModelError(path, f"damaged ({error})") from error
        if check is not None:
            try:
                check(config, version, _kinds(entries))
            except PackedModelError:
                # A file that was damaged is told as such, in no more memory.
                start = 8 + length
                if start < size:
                    mapped = np.memmap(file, np.uint8, "c", start)
                    _verified(path, mapped, entries, metadata)
                raise
        payload = np.empty(size - 8 - length, np.uint8)
        if file.readinto(payload) != len(payload) or file.read(1):
            raise PackedModelError(
                path, "damaged (it changes while it is read)"
            )
    tensors = _verified(path, payload, entries, metadata)
    return Container(tensors, config, version, header, payload)


def _verified(path, payload, entries, metadata):
    """The tensors of a payload whose checksum is right."""
    version, config = metadata["mpq_version"], metadata["mpq_config"]
    try:
        tensors = _tensors(payload, entries)
        if metadata["sha256"] != digest(tensors, config, version):
            raise ValueError("SHA-256 does not match")
    except (ValueError, RuntimeError) as error:
        raise PackedModelError(path, f"damaged ({error})") from error
    return tensors


def _kinds(entries):
    """Type and shape of each tensor of a header."""
    types = {name: dtype for dtype, name in DTYPES.items()}
    return {
        name: (types[entry["dtype"]], tuple(entry["shape"]))
        for name, entry in entries.items()
    }


def _version(path, metadata):
    """The format version of a packed model that can be read."""
    if metadata.get("format") != "pt" or "mpq_version" not in metadata:
        raise PackedModelError(
            path, "not a packed model", "write one with save_packed"
        )
    version = metadata["mpq_version"]
    if version not in VERSIONS:
        raise PackedModelError(
            path,
            f"format version {version!r} is not in {VERSIONS}",
            "install a speechbrain_mpq that reads it, or pack again",
        )
    if set(metadata) != set(METADATA):
        raise PackedModelError(
            path, f"damaged (metadata are not {', '.join(METADATA)})"
        )
    return version


def _tensors(payload, entries):
    """The tensors of a file whose header is sound, in its own memory."""
    tensors = {}
    for name, (dtype, shape) in _kinds(entries).items():
        start, stop = entries[name]["data_offsets"]
        own = torch.from_numpy(payload[start:stop])
        # A byte other than 0 and 1 is no bool: what it does is undefined.
        if dtype == torch.bool and own.gt(1).any():
            raise ValueError(f"tensor {name!r} holds no truth values")
        # Whatever reads no byte has strides of its own, which `view` refuses.
        tensors[name] = (
            own.view(dtype).reshape(shape)
            if len(own)
            else torch.empty(shape, dtype=dtype)
        )
    return tensors


def digest(tensors, config, version):
    """SHA-256 over version, configuration, names, types, shapes and payload."""
    sha = hashlib.sha256(f"{version}\n{config}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        kind = DTYPES.get(tensor.dtype, "?")
        sha.update(f"{name} {kind} {list(tensor.shape)}\n".encode())
        sha.update(_bytes(tensor))
    return sha.hexdigest()


def _bytes(tensor):
    """Raw little-endian bytes of a tensor, in its own memory."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
