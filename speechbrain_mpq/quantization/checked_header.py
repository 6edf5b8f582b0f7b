"""The header of a safetensors file, checked before anything is allocated.

Files come from strangers. What the header declares is held against the size
of the file first: no declared number makes the reader reserve memory that the
file does not fill.
"""

import json
import math
import struct

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
    """Parses JSON; refuses duplicate keys, NaN and infinity.

    Arguments
    ---------
    text : str or bytes
        UTF-8 where it is bytes.

    Returns
    -------
    object

    Example
    -------
    >>> strict_json('{"bits": 4}')
    {'bits': 4}
    >>> strict_json('{"bits": 4, "bits": 8}')
    Traceback (most recent call last):
    ...
    ValueError: the key 'bits' twice
    """
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


def read_header(content):
    """The header of a safetensors file in memory.

    Arguments
    ---------
    content : bytes
        The beginning of the file, header included.

    Returns
    -------
    entries : dict of str -> dict
        Tensor name -> dtype, shape, data_offsets, as they are in the file.
    metadata : dict of str -> str
        What stands beside them.
    """
    header = strict_json(content[8:])
    if not isinstance(header, dict):
        raise ValueError("a header that is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise ValueError("metadata that are no strings")
    return header, metadata


def header_length(start, size):
    """How long a header is, where that is possible.

    Arguments
    ---------
    start : bytes
        The first eight bytes of the file.
    size : int
        Bytes of the whole file.

    Returns
    -------
    int

    Example
    -------
    >>> header_length(bytes([16, 0, 0, 0, 0, 0, 0, 0]), 100)
    16
    >>> header_length(bytes([93, 0, 0, 0, 0, 0, 0, 0]), 100)
    Traceback (most recent call last):
    ...
    ValueError: a header of 93 bytes in a file of 100
    """
    if len(start) < 8:
        raise ValueError(f"only {len(start)} bytes")
    (length,) = struct.unpack("<Q", start)
    if length < 2 or length > MAX_HEADER or 8 + length > size:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    return length


def check_entries(entries, payload):
    """Refuses tensors that do not fill the payload exactly, in one row.

    Arguments
    ---------
    entries : dict of str -> dict
        As `read_header` gives them.
    payload : int
        Bytes behind the header.

    Example
    -------
    >>> one = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
    >>> check_entries({"a": one}, 12)
    >>> check_entries({"a": {**one, "shape": [2**50]}}, 12)
    Traceback (most recent call last):
    ...
    ValueError: tensor 'a' with a shape that is none
    """
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
    if not whole_numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} with offsets that are none")
    needed = ITEM_BYTES[dtype] * math.prod(shape)
    if offsets[1] - offsets[0] != needed:
        raise ValueError(f"tensor {name!r} in the space of another size")
    if offsets[0] % ITEM_BYTES[dtype]:
        raise ValueError(f"tensor {name!r} is not aligned")
    return offsets[0], offsets[1], name


def check_shape(shape, what):
    """Refuses a shape that no tensor has.

    Arguments
    ---------
    shape : object
        From JSON.
    what : str
        Whose it is, for the message.

    Example
    -------
    >>> check_shape([2, -1], "weight")
    Traceback (most recent call last):
    ...
    ValueError: weight with a shape that is none
    """
    fits = whole_numbers(shape) and len(shape) <= MAX_RANK
    if not fits or math.prod(max(size, 1) for size in shape) > MAX_VALUES:
        raise ValueError(f"{what} with a shape that is none")


def whole_numbers(values):
    """Whether this is a list of integers from 0, bools not counted.

    Arguments
    ---------
    values : object
        From JSON.

    Returns
    -------
    bool

    Example
    -------
    >>> whole_numbers([2, 3]), whole_numbers([2.0]), whole_numbers([True])
    (True, False, False)
    """
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
