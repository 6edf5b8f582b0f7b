"""One safetensors file with a configuration and a checksum in its header."""

import hashlib
import json
import os
import struct
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from ..whole_files import write_whole
from .checked_header import (
    check_entries,
    header_length,
    read_header,
    strict_json,
)

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

    Arguments
    ---------
    path : Path
        Where to.
    tensors : dict of str -> torch.Tensor
        Contiguous tensors on the CPU.
    config : dict
        Anything that JSON can hold.
    version : str
        Version of the format that is needed to read it.
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
    write_whole(path, [struct.pack("<Q", len(text)), text, *payload])


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

    Arguments
    ---------
    path : Path
        The file.

    Returns
    -------
    Container
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
        length = header_length(start, size)
        header = start + file.read(length)
        entries, metadata = read_header(header)
        check_entries(entries, size - 8 - length)
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
    """SHA-256 over version, configuration, names, types, shapes and payload.

    Arguments
    ---------
    tensors : dict of str -> torch.Tensor
        Contiguous tensors on the CPU.
    config : str
        The configuration as it is written.
    version : str
        Version of the format.

    Returns
    -------
    str
        Hexadecimal digits.
    """
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
