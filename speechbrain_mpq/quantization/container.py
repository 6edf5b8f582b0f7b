"""The header of a safetensors file, checked before anything is allocated.

Files come from strangers. What the header declares is held against the size
of the file first: no declared number makes the reader reserve memory that the
file does not fill.

Integers of a codebook to bytes without gaps, and back.

One safetensors file with a configuration and a checksum in its header.
"""

import hashlib
import json
import math
import os
import struct
from dataclasses import dataclass, field

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from ..utils import write_chunks
from .codebook import TERNARY_BITS, check_bits, has_zero, largest_level
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


def strict_json(text):
    """Parses JSON; refuses duplicate keys, NaN and infinity."""
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        content = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
        if "\\u" in text:  # half a character passes the parser
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    return content


def _read_header(content):
    """The header of a safetensors file in memory."""
    header = strict_json(content[8:])
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


def _unique(pairs):
    """A dictionary; ValueError where a key comes twice."""
    content = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {key!r} twice")
        content[key] = value
    return content


def _finite(digits):
    """A float; ValueError where it is beyond all floats, as 1e999."""
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:40]} is no finite number")
    return value


def _no_constant(word):
    """Refuse the words that Python takes for numbers and JSON does not."""
    raise ValueError(f"{word} is no JSON")


TRITS = 3 ** np.arange(5)  # values of the five digits in a byte


def pack_bits(integers, bits, codebook="midtread"):
    """Integers of a codebook to bytes without gaps, lowest bit first.

    Stored is the integer's number in the table, from 0: value + 2^(bits - 1)
    for Eq. 7, where 0 stands for no value, and (value + 2^bits - 1) / 2 for
    the odd levels of a table without zero. At 1.6 bits five values make a
    byte, value + 1 as digits to base 3, the first one lowest.
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
    """The integers that ``pack_bits`` stored."""
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


# 2: slices, other tables than Eq. 7's, 1.6 bits. 3: an architecture, and the
# shapes of layers that are alike only once.
VERSIONS = ("1", "2", "3")
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


def write_container(path, tensors, config, version="1"):
    """Writes tensors and a configuration as one safetensors file.

    The safetensors library writes the metadata in an order of its own, which
    changes from run to run; here the bytes depend on the content only.
    """
    config = json.dumps(config, separators=(",", ":"), allow_nan=False)
    header = {
        "__metadata__": {
            "format": "pt",
            "mpq_version": version,
            "mpq_config": config,
            "sha256": digest(tensors, config, version),
        }
    }
    # Wide types first keep every tensor aligned.
    names = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))
    start = 0
    for name in names:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    payload = [_bytes(tensors[name]) for name in names]
    write_chunks(path, [struct.pack("<Q", len(text)), text, *payload])


@dataclass(frozen=True)
class Container:
    """What a file holds, verified.

    Arguments
    ---------
    tensors : dict of str -> torch.Tensor
        All tensors of the file.
    config : dict
        The configuration.
    version : str
        Version of the format.
    content : bytes
        The whole file, as it was read.
    """

    tensors: dict
    config: dict
    version: str
    content: bytes = field(repr=False)


def read_container(path):
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
        content, entries, metadata = _read_checked(path)
    except (ValueError, OSError) as error:
        raise PackedModelError(
            path, f"damaged or no safetensors file ({error})"
        ) from error
    version = _version(path, metadata)
    try:
        tensors = _tensors(content, entries)
        config = metadata["mpq_config"]
        if metadata["sha256"] != digest(tensors, config, version):
            raise ValueError("SHA-256 does not match")
        return Container(tensors, strict_json(config), version, content)
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise PackedModelError(path, f"damaged ({error})") from error


def _read_checked(path):
    """(content, entries, metadata) of a file that is as long as it says."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = _header_length(start, size)
        header = start + file.read(length)
        entries, metadata = _read_header(header)
        _check_entries(entries, size - 8 - length)
        content = header + file.read(size - 8 - length)
    if len(content) != size:
        raise ValueError(f"{len(content)} bytes of {size}")
    return content, entries, metadata


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


def _tensors(content, entries):
    """The tensors of a file whose header is sound."""
    tensors = load(content)
    for name, entry in entries.items():
        tensor = tensors[name]
        if DTYPES[tensor.dtype] != entry["dtype"]:
            raise ValueError(f"tensor {name!r} of another type")
        # A byte other than 0 and 1 is no bool: what it does is undefined.
        if tensor.dtype == torch.bool and tensor.view(torch.uint8).gt(1).any():
            raise ValueError(f"tensor {name!r} holds no truth values")
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
    """Raw little-endian bytes of a tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
