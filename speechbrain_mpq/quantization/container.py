"""One safetensors file with a configuration and a checksum in its header."""

import hashlib
import json
import os
import struct

import torch
from safetensors import SafetensorError, safe_open

VERSIONS = ("1", "2")  # 2: slices, other tables than Eq. 7's, 1.6 bits
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
    config = json.dumps(config, separators=(",", ":"))
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


def read_container(path):
    """Reads and verifies what ``write_container`` wrote.

    Arguments
    ---------
    path : Path
        The file.

    Returns
    -------
    tensors : dict of str -> torch.Tensor
        All tensors of the file.
    config : dict
        The configuration.
    """
    if not path.is_file():
        raise PackedModelError(
            path, "no such file", "name a folder that save_packed wrote"
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
    except (SafetensorError, KeyError, RuntimeError, OSError) as error:
        raise PackedModelError(
            path, f"damaged or no safetensors file ({error})"
        ) from error
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
    config = metadata.get("mpq_config", "")
    if metadata.get("sha256") != digest(tensors, config, version):
        raise PackedModelError(path, "damaged (SHA-256 does not match)")
    return tensors, json.loads(config)


def write_whole(path, chunks):
    """Writes a file whole or leaves what was there.

    Arguments
    ---------
    path : Path
        Where to.
    chunks : list of bytes
        The content.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
